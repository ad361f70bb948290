"""PSTLinear against the plain formula under autograd: initial values, mask, values, gradients, dtypes, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spp.errors import ConfigError, GradientError, NonFiniteError, PatternError, TargetError
from spp.pst import PSTLinear, convert
from tests.helpers.tolerances import assert_matches, assert_same_bits
from tests.pst.plain import plain_weight

SHAPES = [(13, 7, (3,)), (5, 3, (2, 4)), (1, 3, (2,)), (48, 32, (9,)), (8, 4, (0,)), (31, 64, ())]
SCALES = (0.7, 0.5, 1.5)
FACTORS = ("weight_U", "weight_V", "score_A", "score_B", "score_R", "score_C")


def layer(
    m: int,
    n: int,
    dtype: torch.dtype = torch.float64,
    sparsity: float = 0.37,
    pattern: str | None = None,
    **options: Any,
) -> PSTLinear:
    torch.manual_seed(0)
    made = PSTLinear(nn.Linear(n, m).to(dtype), 3, SCALES[0], 2, *SCALES[1:], pattern=pattern, **options)
    with torch.no_grad():
        for factor in made.factors():
            factor.add_(0.3 * torch.randn_like(factor))
    made.sparsity = sparsity
    return made


def oracle(
    made: PSTLinear, x: Tensor, dy: Tensor, pruned: int, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Y and the gradients of X and the six factors, in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (x, *made.factors())]
    weight = plain_weight(made.weight.detach().double(), inputs[1:], SCALES, pruned, pattern)
    assert made.bias is not None
    y = torch.nn.functional.linear(inputs[0], weight, made.bias.detach().double())
    return y.detach(), list(torch.autograd.grad(y, inputs, dy.double()))


def test_initial_values_are_the_authors() -> None:
    linear, x = nn.Linear(300, 200), torch.randn(4, 300)
    weight, y = linear.weight, linear(x)
    made = PSTLinear(linear)
    shapes = [tuple(getattr(made, name).shape) for name in FACTORS]
    assert shapes == [(200, 8), (8, 300), (200, 8), (8, 300), (200,), (300,)]
    for name in ("weight_V", "score_B", "score_R", "score_C"):
        assert not getattr(made, name).any(), name
    for name in ("weight_U", "score_A"):
        value = getattr(made, name).detach()
        assert abs(float(value.mean())) < 0.1 and abs(float(value.std()) - 1) < 0.1, name
    assert made.sparsity == 0.0 and made.weight is weight
    assert {n for n, p in made.named_parameters() if p.requires_grad} == set(FACTORS)
    assert_same_bits(made(x), y)
    made.sparsity = 0.5  # with V, B, R and C zero, the importance is the magnitude
    assert made.mask().sum() == 30000
    assert weight.abs()[made.mask()].min() >= weight.abs()[~made.mask()].max()


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.37, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("m", "n", "_"), SHAPES)
def test_prunes_exactly_the_floor(m: int, n: int, _: Any, sparsity: float) -> None:
    assert int((~layer(m, n, sparsity=sparsity).mask()).sum()) == int(m * n * sparsity + 1e-9)


def test_of_equal_scores_the_lower_index_is_kept() -> None:
    linear = nn.Linear(4, 3)
    nn.init.ones_(linear.weight)
    made = PSTLinear(linear)
    made.sparsity = 0.5
    assert made.mask().flatten().tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize(("m", "n", "leading"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_values_and_gradients_are_those_of_the_plain_formula(m: int, n: int, leading: Any, sparsity: float) -> None:
    made = layer(m, n, sparsity=sparsity)
    x, dy = torch.randn(*leading, n, dtype=torch.float64, requires_grad=True), torch.randn(*leading, m).double()
    y = made(x)
    gradients = torch.autograd.grad(y, [x, *made.factors()], dy)
    expected, expected_gradients = oracle(made, x, dy, int(m * n * sparsity + 1e-9))
    assert_matches(y, expected, torch.float64, what="y")
    for name, found, wanted in zip(("x", *FACTORS), gradients, expected_gradients, strict=True):
        assert_matches(found, wanted, torch.float64, what=name)


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(13, 7), torch.randn(5, 7, dtype=torch.float64)
    whole = torch.autograd.grad(made(x).sum(), made.factors())
    monkeypatch.setattr("spp.pst.function._BLOCK", 2 * 7)
    for found, wanted in zip(torch.autograd.grad(made(x).sum(), made.factors()), whole, strict=True):
        assert_matches(found, wanted, torch.float64)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "pruned"),
    [
        ("2:4", 0.5, 120),
        ("2:4", 0.3, 72),
        ("1:4", 0.75, 180),
        ("5:6", 1 - 5 / 6, 40),
        ("2:4", 0.0, 0),
        ("1:4", 0.7, 168),
        ("2:4", 0.499, 119),
    ],
)
def test_a_pattern_is_filled_by_the_lowest_scores(pattern: str, sparsity: float, pruned: int) -> None:
    kept, group = map(int, pattern.split(":"))
    made = layer(10, 24, sparsity=sparsity, pattern=pattern)
    lost = group - made.mask().view(10, -1, group).sum(-1)
    assert lost.sum() == pruned == made.pruned and lost.max() <= group - kept
    if pruned == 240 * (group - kept) // group:
        assert (lost == group - kept).all()
    x, dy = torch.randn(3, 24).double(), torch.randn(3, 10).double()
    y = made(x)
    expected, gradients = oracle(made, x, dy, pruned, (kept, group))
    assert_matches(y, expected, torch.float64)
    for found, wanted in zip(torch.autograd.grad(y, made.factors(), dy), gradients[1:], strict=True):
        assert_matches(found, wanted, torch.float64)


def test_of_equal_scores_a_pattern_prunes_the_later_ones() -> None:
    made = PSTLinear(nn.Linear(8, 2), 1, mask_rank=1, pattern="2:4")
    with torch.no_grad():
        made.weight.fill_(1.0)
    made.sparsity = 0.25  # four of sixteen: the last two of the last two groups
    assert made.mask().int().tolist() == [[1] * 8, [1, 1, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    made = layer(48, 32, dtype)
    assert all(f.dtype == torch.float32 for f in made.factors())
    x, dy = torch.randn(9, 32).to(dtype).requires_grad_(), torch.randn(9, 48).to(dtype)
    y = made(x)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, [x, *made.factors()], dy)
    expected, expected_gradients = oracle(made, x, dy, int(48 * 32 * 0.37))
    plain_inputs = [x.detach().requires_grad_(), *(f.detach().requires_grad_() for f in made.factors())]
    weight = plain_weight(made.weight.detach().float(), plain_inputs[1:], SCALES, int(48 * 32 * 0.37)).to(dtype)
    plain = torch.nn.functional.linear(plain_inputs[0], weight, made.bias)
    plain_gradients = torch.autograd.grad(plain, plain_inputs, dy)
    assert_matches(y, expected, dtype, plain)
    for found, wanted, rough in zip(gradients, expected_gradients, plain_gradients, strict=True):
        assert_matches(found, wanted, dtype, rough)


def test_autocast() -> None:
    made, x = layer(12, 8, torch.float32), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in made.factors())
    mask, effective = made.mask(), made.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.mask(), mask)
        assert_same_bits(made.effective_weight(), effective)
        assert_same_bits(made.convert().get_parameter("weight").detach(), effective)


def test_nothing_of_the_scores_is_kept() -> None:
    made, x = layer(40, 24, torch.float32), torch.randn(3, 24, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        made(x)
    own = {t.data_ptr() for t in (x, *made.parameters())}
    others = [t for t in kept if t.data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in others) == 40 * 24 // 8  # the bits of the mask
    assert not made._buffers


class Sorted(TorchDispatchMode):
    """The sizes of what is sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.name() for word in ("sort", "topk", "unique")):
            self.sizes.append(args[0].numel())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_scores_are_never_sorted_whole(pattern: str | None) -> None:
    made = layer(512, 256, torch.float32, 0.3, pattern)
    with Sorted() as seen:
        made(torch.randn(2, 256)).sum().backward()
    assert made.pruned == int(512 * 256 * 0.3) == int((~made.mask()).sum())
    assert 0 < sum(seen.sizes) <= 512 * 256 // 16


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    made, x = layer(12, 8), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    direct = torch.autograd.grad(made(x).square().sum(), made.factors())
    checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
    for factor, wanted in zip(made.factors(), direct, strict=True):
        assert factor.grad is not None
        assert_same_bits(factor.grad, wanted)


def test_deepcopy_is_independent() -> None:
    made, x = layer(12, 8), torch.randn(5, 8, dtype=torch.float64)
    twin = copy.deepcopy(made)
    assert_same_bits(twin(x), made(x))
    with torch.no_grad():
        twin.score_R.add_(1.0).mul_(torch.randn(12))
    assert not torch.equal(twin(x), made(x))
    assert convert(twin).weight.data_ptr() != made.weight.data_ptr()


def test_convert_gives_the_same_numbers_and_leaves_the_layer() -> None:
    made, x = layer(12, 8), torch.randn(5, 8, dtype=torch.float64)
    before = made.weight.clone()
    plain = convert(made)
    assert type(plain) is nn.Linear and plain.weight.requires_grad
    assert_same_bits(plain(x), made(x))
    assert torch.equal(plain.weight != 0, made.mask()) and torch.equal(made.weight, before)
    restored = made.restore()
    assert restored.weight.requires_grad and torch.equal(restored.weight, before)


def test_conversion_keeps_what_trains_in_float32() -> None:
    made = layer(12, 8, torch.float32).to(torch.bfloat16)
    assert made.weight.dtype == torch.bfloat16 and made.score_A.dtype == torch.float32
    assert made.double().score_A.dtype == torch.float64


def test_compiled_it_is_one_opaque_call() -> None:
    made, x = layer(12, 8), torch.randn(5, 8, dtype=torch.float64)
    model = nn.Sequential(made, nn.Tanh())
    compiled = torch.compile(model, backend="eager")
    for sparsity in (0.37, 0.6):
        made.sparsity = sparsity
        y, expected = compiled(x), model(x)
        assert_same_bits(y, expected)
        pairs = [torch.autograd.grad(out.square().sum(), made.factors()) for out in (y, expected)]
        for found, wanted in zip(*pairs, strict=True):
            assert_same_bits(found, wanted)


def test_second_derivatives_are_refused() -> None:
    made, x = layer(12, 8), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(GradientError):
        dx.sum().backward()


def test_inputs_that_need_no_gradient_get_none() -> None:
    made, x = layer(12, 8), torch.randn(5, 8, dtype=torch.float64)
    made.score_A.requires_grad_(False)
    made(x).sum().backward()
    assert made.score_A.grad is None and made.score_B.grad is not None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weight_rank": 0}, "weight_rank is 0"),
        ({"mask_rank": True}, "mask_rank is True"),
        ({"low_rank_scale": float("nan")}, "low_rank_scale is nan"),
        ({"structured_scale": 2**64}, "structured_scale is 18446744073709551616; it must be a finite number"),
        ({"weight_scale": -(10**400)}, "weight_scale is -1000"),
        ({"weight_scale": 1e39}, r"weight_scale is 1e\+39"),
        ({"pattern": "3:5"}, "5"),
        ({"pattern": 0.5}, "N:M or None"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        PSTLinear(nn.Linear(8, 4), **options)


def test_bad_bases_and_sparsities() -> None:
    made, linear = PSTLinear(nn.Linear(8, 4), pattern="2:4"), nn.Linear(8, 4)
    for bad in (1.0, -0.1, "0.5", float("nan"), 0.6):
        with pytest.raises(ConfigError, match="sparsity is"):
            made.sparsity = bad
    with pytest.raises(TargetError, match="Conv2d"):
        PSTLinear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ConfigError, match="meta"):
        PSTLinear(nn.Linear(8, 4, device="meta"))
    with pytest.raises(PatternError):
        PSTLinear(nn.Linear(6, 4), pattern="2:4")
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        PSTLinear(linear)
    with torch.no_grad():
        made.score_R[0] = float("nan")
    with pytest.raises(NonFiniteError, match="diverged"):
        convert(made)
