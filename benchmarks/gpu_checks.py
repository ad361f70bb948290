"""Every kernel and every path of a GPU against float64, or bit for bit against the CPU: what benchmarks.gpu runs first.

Errors are the largest of any element, relative to the largest element of the exact result. float32 has a bound of its
own; a 16-bit result may be off by twice what the plain formula in that dtype is off by, and one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp.functional import spp_linear_reference
from spp.kernels import use_kernels
from spp.kernels.autograd import draw_dropout
from spp.kernels.gpu import TritonWork, work_for
from spp.kernels.linear import linear
from spp.packing.semi_structured import to_semi_structured
from spp.pruning import magnitude_mask
from spp.rules import Adapter, effective_weight, get_rule
from spp.weights import PackedWeight
from spp.weights.base import as_weight

RULE = get_rule("spp")
WHOLE = slice(None)
SCALING, DROPOUT = 2.0, 0.3
FLOAT32_BOUND = 2e-5
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALL = (  # form of W, m, n, r, T: primes, one row, r = 1, r = m, no tokens, several tiles, every packed form
    ("dense", 13, 7, 5, 3),
    ("dense", 1, 3, 1, 2),
    ("dense", 7, 7, 7, 4),
    ("dense", 67, 40, 1, 9),
    ("dense", 20, 300, 3, 0),
    ("transposed", 34, 13, 4, 5),
    ("2:4", 13, 36, 5, 4),
    ("1:8", 5, 104, 5, 3),
    ("any pattern", 3, 1100, 2, 3),
)
SEMI_STRUCTURED = ("2:4", 1024, 4096, 16, 256)
LARGE = (
    ("dense", 1000, 1031, 16, 333),
    ("dense", 4096, 4096, 16, 512),
    ("2:4", 1024, 4096, 16, 256),
    ("1:8", 1024, 4096, 16, 256),
    ("any pattern", 1111, 3000, 7, 100),
)


@dataclass(frozen=True)
class Check:
    """A comparison, and whether it is within its bound: an error, or the number of elements that differ."""

    what: str
    case: str
    dtype: str
    found: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it is; NaN is not."""
        return self.found <= self.bound


class Layer:
    """One layer's random tensors on a device; the first row and the first column have M = 0, so that W is rescued."""

    def __init__(self, case: tuple[str, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        form, m, n, r, tokens = case
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weight = draw(m, n)
        weight *= magnitude_mask(weight, form) if ":" in form else torch.rand(m, n, generator=generator) > 0.5
        alpha, beta = 0.5 * draw(r, n), 0.5 * draw(m, 1)
        alpha[:, 0], beta[0] = 1.0, -1 / SCALING
        self.name = f"{form} {m} × {n}, r = {r}, T = {tokens}"
        self.weight = (weight + 0.0).to(device, dtype)  # a packed −0.0 comes back as 0.0
        self.given: Tensor | PackedWeight = self.weight
        if form == "transposed":
            self.given = self.weight.t().contiguous().t()
        elif form != "dense":
            self.given = PackedWeight.pack(self.weight)
        self.alpha, self.beta = (t.to(device, torch.float32) for t in (alpha, beta))
        self.x, self.dy = (draw(tokens, k).to(device, dtype) for k in (n, m))
        self.source = as_weight(self.given)
        self.factors: Any = RULE.prepare((self.alpha, self.beta), SCALING, m, torch.float32)
        self.dtype = dtype

    def check(self, what: str, found: float, bound: float) -> Check:
        """Return a check of this layer."""
        return Check(what, self.name, str(self.dtype).removeprefix("torch."), found, bound)

    def compare(self, what: str, found: Tensor, exact: Tensor, plain: Tensor) -> Check:
        """Return the check of a result in this layer's dtype; `plain` is the usual computation in that dtype."""
        if self.dtype == torch.float32:
            return self.check(what, error(found, exact), FLOAT32_BOUND)
        return self.check(what, error(found, exact), 2 * error(plain, exact) + ROUNDING[self.dtype])


def run(device: torch.device, dtypes: Sequence[torch.dtype], *, large: bool) -> Iterator[Check]:
    """Yield every check, made by Triton's kernels on `device`.

    Args:
        device: a CUDA device, or the CPU under Triton's interpreter.
        dtypes: float32 and the 16-bit ones.
        large: also matrices that need many programs.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with use_kernels("triton"):
            for dtype in dtypes:
                for case in (*SMALL, *(LARGE if large else ())):
                    layer = Layer(case, dtype, device)
                    yield from kernel_checks(layer)
                    yield from layer_checks(layer)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            for dtype in dtypes:
                yield from semi_structured_checks(Layer(SEMI_STRUCTURED, dtype, device))
    finally:
        torch.set_float32_matmul_precision(before)


def kernel_checks(layer: Layer) -> Iterator[Check]:
    """Yield the checks of the kernels alone: bits where nothing is summed."""
    from spp.kernels.triton import decode

    dense, params = layer.weight.cpu(), (layer.alpha.cpu(), layer.beta.cpu())
    m, n = dense.shape
    work = work_for(RULE, layer.source, layer.factors)
    assert isinstance(work, TritonWork)
    effective = effective_weight(dense, Adapter(RULE, params, SCALING))
    yield layer.check("W_eff, bits", differing(work.effective(layer.dtype), effective), 0)
    update = torch.empty(m, n)
    RULE.delta(dense, RULE.prepare(params, SCALING, m, torch.float32), WHOLE, WHOLE, update)
    yield layer.check("W′, bits", differing(work.delta(layer.dtype), update.to(layer.dtype)), 0)
    if isinstance(layer.given, PackedWeight):
        for rows, cols in ((WHOLE, WHOLE), (slice(m // 2, m), slice(n // 3, n - 1))):
            expected = dense[rows, cols].contiguous()
            found = decode(layer.given, rows, cols, torch.empty_like(expected, device=layer.weight.device))
            yield layer.check("decoded, bits", differing(found, expected), 0)
    gradient = torch.linspace(-1, 1, m * n, device=layer.weight.device).cos().view(m, n).to(layer.dtype)
    exact = RULE.prepare((layer.alpha, layer.beta), SCALING, m, torch.float64)
    found_grads, exact_grads = (RULE.empty_grads(f, (True, True)) for f in (layer.factors, exact))
    RULE.reduce(layer.weight, exact, WHOLE, WHOLE, gradient.double(), exact_grads, accumulate=False)
    work.reduce(slice(0, n), gradient, found_grads, accumulate=False)
    for name, one, two in zip(("dα", "dβ"), found_grads, exact_grads, strict=True):
        assert one is not None and two is not None
        yield layer.check(f"{name} of a given G", error(one, two), FLOAT32_BOUND)


def layer_checks(layer: Layer) -> Iterator[Check]:
    """Yield the checks of the whole layer, forward and backward, with both kinds of dropout and without."""
    for mode in ("no dropout", "input dropout", "alpha dropout"):
        found, again = (_step(layer, mode, None) for _ in range(2))
        exact, plain = _step(layer, mode, torch.float64), _step(layer, mode, layer.dtype)
        repeated = sum(differing(one, two) for one, two in zip(found, again, strict=True))
        yield layer.check(f"a repeated step, {mode}, bits", repeated, 0)
        for name, one, two, low in zip(("Y", "dX", "dα", "dβ"), found, exact, plain, strict=True):
            yield layer.compare(f"{name}, {mode}", one, two, low)


def semi_structured_checks(layer: Layer) -> Iterator[Check]:
    """Yield the checks of spp.to_semi_structured: a 16-bit layer becomes sparse, and its product is right."""
    if layer.dtype == torch.float32:
        return
    m, n = layer.weight.shape
    linear = nn.Linear(n, m, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    model, exact = nn.Sequential(linear), layer.x.double() @ layer.weight.double().t()
    report = to_semi_structured(model, tokens=len(layer.x), keep="all", target_modules="all-linear")
    yield layer.check("layers that are not semi-structured", 1 - report.converted, 0)
    with torch.no_grad():
        yield layer.compare("X Wᵀ, semi-structured", model(layer.x), exact, F.linear(layer.x, layer.weight))


def error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude of `exact`."""
    if exact.numel() == 0:
        return 0.0
    largest = exact.double().abs().max().clamp_min(1e-30)
    return float(((found.double() - exact.double()).abs().max() / largest).nan_to_num(torch.inf))


def differing(found: Tensor, expected: Tensor) -> int:
    """Return how many elements have other bits."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    return int((found.cpu().contiguous().view(size) != expected.cpu().contiguous().view(size)).sum())


def _step(layer: Layer, mode: str, plain: torch.dtype | None) -> list[Tensor]:
    """Return [Y, dX, dα, dβ] by the kernels, or by the formula with separate branches in the dtype `plain`."""
    torch.manual_seed(3)
    mask = draw_dropout(torch.ones_like(layer.x), DROPOUT)[0] if mode == "input dropout" else None
    spread = F.dropout(torch.ones_like(layer.alpha), DROPOUT) if mode == "alpha dropout" else None
    torch.manual_seed(3)
    given = [layer.x, layer.alpha, layer.beta]
    x, alpha, beta = (t.detach().to(plain or t.dtype).requires_grad_() for t in given)
    used = alpha if spread is None else alpha * spread.to(alpha.dtype)
    dy = layer.dy
    if plain is None:
        dropout = 0.0 if mask is None else DROPOUT
        weight = layer.given if isinstance(layer.given, Tensor) else layer.source
        y = linear(x, weight, None, Adapter(RULE, (used, beta), SCALING, dropout))
    else:
        factor = mask if mask is None else mask.to(plain)
        y = spp_linear_reference(x, layer.weight.to(plain), None, used, beta, SCALING, factor)
        dy = dy.to(plain)
    return [y.detach(), *torch.autograd.grad(y, (x, alpha, beta), dy)]
