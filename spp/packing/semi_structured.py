"""2:4 weights on NVIDIA GPUs: torch's semi-structured tensors, where they are faster than dense ones.

A GPU of compute capability 8.0 or later multiplies by a 2:4 weight that is stored as half the values and 2 bits for
each. Whether that is faster than the dense product depends on the shape, the tokens of a call and the libraries, so it
is measured: dense and sparse take turns on the device, for each shape, and the faster stays.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp.configs.checks import check_choice, check_int
from spp.configs.pruning import Names
from spp.errors import ConfigError, WrapError
from spp.files import dtype_name
from spp.layers.host import check_packable
from spp.masks.patterns import detect_pattern, is_nm
from spp.models.targets import resolve_projections
from spp.packing.model import packed_layers
from spp.weights import quantized_kind
from spp.wrapping.state import uncompiled
from spp.wrapping.wrap import is_wrapped

KEEP = ("faster", "all")
_CAPABILITY = (8, 0)  # Ampere: the first with 2:4 products
_ROUNDS, _CALLS = 7, 10  # turns of each contender, products of a turn
_CHECKED = 64  # rows of X that the sparse product is compared on
_TOLERANCE = 0.02  # of the largest number of the dense product


@dataclass(frozen=True)
class ProductTiming:
    """X Wᵀ, dense and sparse, of the `layers` weights of one shape (m, n).

    Seconds are medians of a product, `ratio` that of sparse over dense, turn by turn: below 1 the sparse one is faster.
    `sparse`: whether these layers are sparse now.
    """

    shape: tuple[int, int]
    dtype: str
    layers: int
    dense_seconds: float
    sparse_seconds: float
    ratio: float
    sparse: bool


@dataclass(frozen=True, repr=False)
class SemiStructuredReport:
    """Which layers became sparse, and how fast they are.

    Args:
        device: its name.
        tokens: rows of X that were timed.
        timings: one for each shape.
        dense: {module path: why} of the target layers that stay dense.
    """

    device: str
    tokens: int
    timings: tuple[ProductTiming, ...]
    dense: dict[str, str]

    @property
    def converted(self) -> int:
        """How many layers are sparse now."""
        return sum(timing.layers for timing in self.timings if timing.sparse)

    def __repr__(self) -> str:
        found = ", ".join(f"{'×'.join(map(str, t.shape))}: {t.ratio:.2f}" for t in self.timings)
        return f"SemiStructuredReport({self.converted} layers sparse, {len(self.dense)} dense; sparse / dense {found})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        timings = [{**asdict(timing), "shape": list(timing.shape)} for timing in self.timings]
        return {**asdict(self), "timings": timings, "converted": self.converted}


def to_semi_structured(
    model: nn.Module,
    *,
    tokens: int = 4096,
    keep: str = "faster",
    target_modules: Names = None,
    exclude_modules: Names = None,
) -> SemiStructuredReport:
    """Store 2:4 weights of a model on an NVIDIA GPU as torch's semi-structured tensors, in place, where that is faster.

    For inference: these weights do not train, are not saved, and there is no way back but to load the model again. A
    layer whose weight is not 2:4, or of a dtype or shape that torch does not take, stays dense; the report says why.

    Args:
        model: pruned to 2:4 and merged, on the GPU, in float16 or bfloat16.
        tokens: rows of X when products are timed: those of the calls that matter. Generation has few, prompts many.
        keep: "faster" keeps the faster form of each shape; "all" makes sparse whatever can be.
        target_modules, exclude_modules: which weights, as in SPPConfig; those of plain linears become sparse.

    Returns:
        SemiStructuredReport, with the measured times of both forms.

    Raises:
        ConfigError: the model is not on an NVIDIA GPU that has 2:4 products, or no weight can be stored so; or an
            option makes no sense.
        WrapError: the model is wrapped or packed.
        TargetError: nothing matches. In each case the model is left as it was.

    Example:
        >>> spp.to_semi_structured(model.to("cuda"))  # doctest: +SKIP
        SemiStructuredReport(210 layers sparse, 0 dense; sparse / dense 4096×4096: 0.71, 4096×11008: 0.66)
    """
    model = uncompiled(model)
    check_choice("keep", keep, KEEP)
    check_int("tokens", tokens, least=1)
    if is_wrapped(model):
        raise WrapError("the model is wrapped: merge first, spp.merge(model); adapters train on dense weights")
    if packed_layers(model):
        raise WrapError("the model is packed: spp.unpack(model) first")
    projections = resolve_projections(model, target_modules, exclude_modules)
    device = _require_gpu({projection.operand.device for projection in projections.values()})
    targets: dict[str, Any] = {path: projection.module for path, projection in projections.items()}
    dense, groups = {}, defaultdict(list)
    for path, module in targets.items():
        if (reason := _unsuited(path, module)) is None:
            groups[module.weight.shape, module.weight.dtype].append(path)
        else:
            dense[path] = reason
    if not groups:
        reasons = "".join(f"\n  {reason}: {count}" for reason, count in Counter(dense.values()).items())
        raise ConfigError(f"none of the {len(dense)} target weights can be stored as 2:4:{reasons}")
    timings = []
    for paths in groups.values():
        try:
            timings.append(timing := _measure(targets[paths[0]].weight, tokens, len(paths), keep))
        except ConfigError as error:
            dense |= dict.fromkeys(paths, str(error))
            continue
        if not timing.sparse:
            dense |= dict.fromkeys(paths, f"the dense product is faster: sparse / dense {timing.ratio:.2f}")
            continue
        for path in paths:
            targets[path].weight = nn.Parameter(_convert(targets[path].weight), requires_grad=False)
    if any(timing.sparse for timing in timings) and hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse_to_save  # type: ignore[assignment]
    return SemiStructuredReport(torch.cuda.get_device_name(device), tokens, tuple(timings), dict(sorted(dense.items())))


def refuse_to_save(*args: object, **kwargs: object) -> NoReturn:
    """Raise: semi-structured weights are no checkpoint's."""
    raise WrapError(
        "weights of the model are semi-structured tensors, which no checkpoint holds: save it before "
        "spp.to_semi_structured(model), or load the pruned one again"
    )


def sparse_weight(weight: Tensor, x: Tensor) -> Tensor:
    """Return a 2:4 weight (m, n) as torch's semi-structured tensor, whose product with some of x (…, n) is compared.

    Raises:
        ConfigError: torch does not take the weight, or multiplies wrongly by it.
    """
    try:
        sparse = _convert(weight)
        found, exact = F.linear(x[:_CHECKED], sparse).float(), F.linear(x[:_CHECKED], weight).float()
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise ConfigError(f"torch does not take it: {type(error).__name__}: {error}".split("\n")[0]) from error
    if not float((found - exact).abs().max()) <= _TOLERANCE * float(exact.abs().max()):
        raise ConfigError("its sparse product is wrong on this device")
    return sparse


def _measure(weight: Tensor, tokens: int, layers: int, keep: str) -> ProductTiming:
    """Return the times of both products with one weight; a ConfigError where there is no sparse one."""
    (m, n), dtype = weight.shape, weight.dtype
    x = torch.randn(tokens, n, device=weight.device, dtype=dtype)
    sparse = sparse_weight(weight, x)
    times = _time({"dense": lambda: F.linear(x, weight), "sparse": lambda: F.linear(x, sparse)}, weight.device)
    ratio = median(s / d for s, d in zip(times["sparse"], times["dense"], strict=True))
    medians = median(times["dense"]), median(times["sparse"])
    return ProductTiming((m, n), dtype_name(dtype), layers, *medians, ratio, keep == "all" or ratio < 1)


def _time(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of a call, for each of some turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS + 1):
        for name, call in calls.items():
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(_CALLS):
                call()
            torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - start) / _CALLS)
    return {name: found[1:] for name, found in times.items()}  # the first turn warms up


def _convert(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype stage")
        return torch.sparse.to_sparse_semi_structured(weight.detach())


def _require_gpu(devices: set[torch.device]) -> torch.device:
    """Return the device of the target layers; a ConfigError unless it is one GPU that has 2:4 products."""
    (device, *others), found = devices, ", ".join(sorted(map(str, devices)))
    if not others and device.type == "cuda":
        found = torch.cuda.get_device_name(device)
        if torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= _CAPABILITY:
            return device
    raise ConfigError(
        f"the target layers are on {found}: torch's 2:4 products need one NVIDIA GPU of compute capability 8.0 "
        f"(Ampere) or later; model.to('cuda') moves a model there"
    )


def _unsuited(path: str, module: nn.Module) -> str | None:
    """Return why a layer stays dense; None for one that torch may take."""
    if not isinstance(module, nn.Linear) or quantized_kind(module):
        return f"it is no plain torch.nn.Linear, but a {type(module).__name__}"
    check_packable(module, path)
    weight = module.get_parameter("weight")
    if not is_nm(weight, 2, 4):
        return f"its zeros are not 2:4 ({detect_pattern(weight)})"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype_name(weight.dtype)} weights have no 2:4 product; float16 and bfloat16 have"
    return None
