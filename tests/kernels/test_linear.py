"""The three-product function against the separate branches in float64: outputs, every gradient, every path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spp.errors import GradientError
from spp.functional import effective_weight, spp_linear
from spp.kernels import backend, choice, release_workspace, use_kernels, workspace_bytes
from spp.kernels.cpu import linear_product
from spp.rules import spp as spp_rule
from tests.helpers.forks import in_threads
from tests.helpers.layers import SHAPES, Case, make_case
from tests.helpers.tolerances import ROUNDING, assert_matches, assert_same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ONE_BLOCK, SMALL_BLOCKS = 2**22, 24


@pytest.fixture(autouse=True)
def _plain_torch() -> Iterator[None]:
    with use_kernels("torch"):  # the compiled products run the tests of test_native.py
        yield


def run(case: Case, **options: float) -> tuple[Tensor, list[Tensor]]:
    y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, case.scaling, **options)
    return y, list(torch.autograd.grad(y, case.inputs(), case.dy))


def run_reference(case: Case, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    y = case.reference(mask)
    return y, list(torch.autograd.grad(y, case.inputs(), case.dy.to(y.dtype)))


def check(case: Case, y: Tensor, grads: list[Tensor], dtype: torch.dtype, mask: Tensor | None = None) -> None:
    y64, grads64 = run_reference(case.to(torch.float64), None if mask is None else mask.double())
    plain, plain_grads = run_reference(case.to(dtype), None if mask is None else mask.to(dtype))
    assert y.dtype == case.x.dtype
    assert_matches(y, y64, dtype, plain, "output")
    for name, actual, oracle, low, given in zip(
        ("x", "bias", "alpha", "beta") if case.bias is not None else ("x", "alpha", "beta"),
        grads,
        grads64,
        plain_grads,
        case.inputs(),
        strict=True,
    ):
        assert actual.dtype == given.dtype
        assert_matches(actual, oracle, dtype, low, f"gradient of {name}")


@pytest.mark.sampled(24)
@pytest.mark.parametrize("elements", [ONE_BLOCK, SMALL_BLOCKS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r", "leading"), SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(
    m: int,
    n: int,
    r: int,
    leading: tuple[int, ...],
    dtype: torch.dtype,
    bias: bool,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    case = make_case(m, n, r, leading, dtype, bias=bias)
    check(case, *run(case), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_products_in_float32_where_the_cpu_lacks_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_products in (True, False):
        monkeypatch.setattr(backend, "has_products", lambda dtype, answer=has_products: answer)
        case = make_case(13, 24, 5, (6,), dtype)
        check(case, *run(case), dtype)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("m", "n", "r", "leading"), [s for s in SHAPES if 0 not in s[3]])
def test_gradcheck(m: int, n: int, r: int, leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", SMALL_BLOCKS)
    case = make_case(min(m, 13), min(n, 8), min(r, m, 13), leading, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, bias, alpha, beta: spp_linear(x, case.weight, bias, alpha, beta, 2.0), case.inputs()
    )


@pytest.mark.parametrize("group_rows", [1, 10**9], ids=["loops over groups", "does not loop"])
@pytest.mark.parametrize("elements", [ONE_BLOCK, SMALL_BLOCKS])
def test_groups_one_by_one_or_together(elements: int, group_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(spp_rule, "GROUP_ROWS", group_rows)
    for m, n, r, leading in SHAPES:
        case = make_case(m, n, r, leading, torch.float64)
        check(case, *run(case), torch.float64)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("elements", [ONE_BLOCK, SMALL_BLOCKS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_dropout_is_the_papers_formula_with_the_mask_of_torch(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    for m, n, r, leading in SHAPES:
        case = make_case(m, n, r, leading, dtype)
        torch.manual_seed(3)
        mask = torch.nn.functional.dropout(torch.ones_like(case.x), 0.3)
        torch.manual_seed(3)
        y, grads = run(case, dropout=0.3)
        check(case, y, grads, dtype, mask)


def test_forward_multiplies_by_the_effective_weight_bit_for_bit() -> None:
    for dtype in DTYPES:
        case = make_case(37, 20, 4, (6,), dtype)
        y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
        merged = effective_weight(case.weight, case.alpha, case.beta, 2.0)
        has = choice.has_products(dtype)
        expected = (
            linear_product(case.x, merged, case.bias)
            if has
            else torch.nn.functional.linear(case.x.float(), merged.float(), case.bias.float()).to(dtype)  # type: ignore[union-attr]
        )
        assert_same_bits(y, expected, str(dtype))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_to_the_stored_then_to_the_autocast_dtype(
    dtype: torch.dtype, autocast_dtype: torch.dtype
) -> None:
    case = make_case(12, 16, 4, (5,), dtype)
    with torch.autocast("cpu", dtype=autocast_dtype):
        y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
        stored = effective_weight(case.weight, case.alpha, case.beta, 2.0)
    assert y.dtype == autocast_dtype
    with torch.no_grad():
        operands = [t.to(autocast_dtype).to(torch.float64) for t in (case.x, stored, case.bias) if t is not None]
        oracle = torch.nn.functional.linear(*operands)
        plain = torch.nn.functional.linear(*(t.to(autocast_dtype) for t in operands))
    assert_matches(y, oracle, autocast_dtype, plain)
    grads = torch.autograd.grad(y, case.inputs(), case.dy.to(autocast_dtype))
    _, grads64 = run_reference(case.to(torch.float64))
    coarser = max(dtype, autocast_dtype, key=ROUNDING.__getitem__)
    _, plain_grads = run_reference(case.to(coarser))
    for given, actual, expected, low in zip(case.inputs(), grads, grads64, plain_grads, strict=True):
        assert actual.dtype == given.dtype
        assert_matches(actual, expected, coarser, low)


def test_autocast_leaves_float64_alone() -> None:
    case = make_case(6, 4, 2, (3,), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
    assert_matches(y, case.reference(), torch.float64)


def test_non_contiguous_input_weight_and_gradient() -> None:
    case = make_case(12, 8, 4, (5,), torch.float64)
    reference, grads64 = run_reference(case)
    strided = Case(
        torch.stack([case.x.detach()] * 2, -1)[..., 0].requires_grad_(),
        case.weight.t().contiguous().t(),
        case.bias,
        case.alpha,
        case.beta,
        case.dy.t().contiguous().t(),
    )
    assert not strided.x.is_contiguous() and not strided.weight.is_contiguous() and not strided.dy.is_contiguous()
    y, grads = run(strided)
    assert_matches(y, reference, torch.float64)
    for actual, oracle in zip(grads, grads64, strict=True):
        assert_matches(actual, oracle, torch.float64)
    y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
    y.sum().backward()  # an expanded gradient with strides 0
    assert case.alpha.grad is not None


@pytest.mark.parametrize("trains", ["x", "alpha", "beta", "bias", "x alpha", "alpha beta"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_only_what_requires_a_gradient_gets_one(trains: str, dropout: float) -> None:
    case = make_case(13, 7, 5, (3,), torch.float64)
    everything = dict(zip(("x", "bias", "alpha", "beta"), case.inputs(), strict=True))
    torch.manual_seed(2)
    mask = torch.nn.functional.dropout(torch.ones_like(case.x), dropout) if dropout else None
    _, oracle = run_reference(case, mask)
    expected = dict(zip(everything, oracle, strict=True))
    for name, tensor in everything.items():
        tensor.requires_grad_(name in trains.split())
    torch.manual_seed(2)
    spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0, dropout).backward(case.dy)
    for name, tensor in everything.items():
        if name in trains.split():
            assert_matches(tensor.grad, expected[name], torch.float64, what=name)  # type: ignore[arg-type]
        else:
            assert tensor.grad is None


def test_the_weight_is_frozen_even_when_it_requires_a_gradient() -> None:
    case = make_case(6, 4, 2, (3,))
    weight = case.weight.requires_grad_()
    spp_linear(case.x, weight, case.bias, case.alpha, case.beta, 2.0).backward(case.dy)
    assert weight.grad is None and case.alpha.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_retain_graph_and_repeated_calls_give_the_same_gradients(dropout: float) -> None:
    case = make_case(13, 7, 5, (3,))
    y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0, dropout)
    first = torch.autograd.grad(y, case.inputs(), case.dy, retain_graph=True)
    other = make_case(20, 16, 4, (8,), seed=1)
    run(other)  # uses the same workspace in between
    second = torch.autograd.grad(y, case.inputs(), case.dy)
    for one, two in zip(first, second, strict=True):
        assert_same_bits(one, two)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, case.inputs(), case.dy)


def test_a_second_derivative_is_refused_with_the_way_out() -> None:
    case = make_case(6, 4, 2, (3,), torch.float64)
    y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
    (grad,) = torch.autograd.grad(y.square().sum(), case.alpha, create_graph=True)
    with pytest.raises(GradientError, match="spp_linear_reference"):
        grad.sum().backward()


def test_a_second_derivative_is_refused_for_a_constant_gradient_too() -> None:
    case = make_case(6, 4, 2, (3,), torch.float64)
    y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
    (grad,) = torch.autograd.grad(y.sum(), case.x, create_graph=True)
    with pytest.raises(GradientError):
        torch.autograd.grad(grad.sum(), case.alpha)


def test_in_place_changes_between_forward_and_backward_are_detected() -> None:
    for name in ("x", "alpha", "weight"):
        case = make_case(6, 4, 2, (3,))
        x = case.x * 1.0
        y = spp_linear(x, case.weight, case.bias, case.alpha, case.beta, 2.0)
        with torch.no_grad():
            {"x": x, "alpha": case.alpha, "weight": case.weight}[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Saved:
    """Counts what autograd saves: bytes per storage, once each."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.keep: list[Tensor] = []

    def __enter__(self) -> Saved:
        def pack(tensor: Tensor) -> Tensor:
            self.keep.append(tensor)
            self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


@pytest.mark.parametrize(("dropout", "extra"), [(0.0, 0), (0.25, 40 * 32 // 8)], ids=["no dropout", "one bit an entry"])
def test_nothing_is_saved_beyond_the_input_and_what_the_layer_owns(dropout: float, extra: int) -> None:
    case = make_case(64, 32, 8, (40,))
    x = case.x * 1.0
    with Saved() as saved:
        y = spp_linear(x, case.weight, case.bias, case.alpha, case.beta, 2.0, dropout)
    for owned in (x, case.weight, case.alpha, case.beta):
        saved.storages.pop(owned.untyped_storage().data_ptr(), None)
    assert sum(saved.storages.values()) == extra
    y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, dropout: float) -> None:
    case = make_case(12, 12, 4, (5,), torch.float64)

    def block(x: Tensor) -> Tensor:
        hidden = spp_linear(x, case.weight, case.bias, case.alpha, case.beta, 2.0, dropout)
        return spp_linear(hidden.tanh(), case.weight, case.bias, case.alpha, case.beta, 2.0, dropout)

    torch.manual_seed(5)
    expected = torch.autograd.grad(block(case.x), case.inputs(), case.dy)
    torch.manual_seed(5)
    y = checkpoint(block, case.x, use_reentrant=reentrant)
    y.backward(case.dy)  # type: ignore[union-attr]
    for tensor, oracle in zip(case.inputs(), expected, strict=True):
        assert_same_bits(tensor.grad, oracle)  # type: ignore[arg-type]


def test_recomputation_skips_the_last_product_of_a_checkpointed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from spp.kernels import linear as module

    calls: list[tuple[int, ...]] = []
    forward = module._forward
    monkeypatch.setattr(
        module, "_forward", lambda b, o, x, *rest: (calls.append(tuple(x.shape)), forward(b, o, x, *rest))[1]
    )
    case = make_case(12, 12, 4, (5,))

    def block(x: Tensor) -> Tensor:
        hidden = spp_linear(x, case.weight, None, case.alpha, case.beta, 2.0)
        return spp_linear(hidden.tanh(), case.weight, None, case.alpha, case.beta, 2.0)

    y = checkpoint(block, case.x, use_reentrant=False)
    assert len(calls) == 2
    y.sum().backward()  # type: ignore[union-attr]
    assert len(calls) == 3  # the first product only is computed again


class _CountProducts(TorchDispatchMode):
    """Counts matrix products of two factors of the layers' width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "_linear_pointwise"):
            factors = [t.shape for t in args if isinstance(t, Tensor) and t.ndim == 2]
            self.count += all(self.width in shape for shape in factors)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reentrant", "recomputed"), [(None, 0), (False, 2), (True, 3)])
def test_checkpointing_computes_no_product_again_that_it_need_not(reentrant: bool | None, recomputed: int) -> None:
    width = 40
    layers = [make_case(width, width, 4, (5,), bias=False, seed=seed) for seed in range(3)]

    def block(x: Tensor) -> Tensor:
        for case in layers[:2]:
            x = spp_linear(x, case.weight, None, case.alpha, case.beta, 2.0).tanh()
        return spp_linear(x, layers[2].weight, None, layers[2].alpha, layers[2].beta, 2.0)

    x = layers[0].x
    with _CountProducts(width) as found:
        y: Any = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
        y.backward(layers[0].dy)
    assert found.count == 3 * 3 + recomputed


def test_threads_do_not_share_scratch_memory() -> None:
    cases = [make_case(40, 24, 8, (16,), torch.float64, seed=seed) for seed in range(4)]
    expected = [run_reference(case) for case in cases]

    def work(index: int) -> None:
        for _ in range(20):
            y, grads = run(cases[index])
            assert_matches(y, expected[index][0], torch.float64)
            for actual, oracle in zip(grads, expected[index][1], strict=True):
                assert_matches(actual, oracle, torch.float64)

    in_threads(work, 4)


def test_the_workspace_is_bounded_and_can_be_given_back() -> None:
    release_workspace()
    case = make_case(4096, 700, 16, (2,), bias=False)  # more than one block
    run(case)
    assert 0 < workspace_bytes() <= 2 * backend.BLOCK_ELEMENTS * 4
    release_workspace()
    assert workspace_bytes() == 0


def test_inference_mode_before_training_leaves_a_usable_workspace() -> None:
    release_workspace()
    case = make_case(12, 8, 4, (5,))
    with torch.inference_mode():
        spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
    check(case, *run(case), torch.float32)


def test_meta_tensors_give_shapes() -> None:
    case = make_case(12, 8, 4, (5,))
    y = spp_linear(
        *(t.to("meta") for t in (case.x, case.weight)), None, case.alpha.to("meta"), case.beta.to("meta"), 2.0
    )
    assert y.is_meta and y.shape == (5, 12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_without_inputs_gives_its_bias(dtype: torch.dtype, dropout: float) -> None:
    case = make_case(12, 0, 4, (3, 40), dtype)
    y, (d_x, d_bias, d_alpha, d_beta) = run(case, dropout=dropout)
    assert case.bias is not None
    assert_same_bits(y, case.bias.expand(3, 40, 12))
    assert d_x.shape == (3, 40, 0) and d_alpha.shape == (4, 0) and not bool(d_beta.any())
    assert_same_bits(d_bias, case.dy.reshape(-1, 12).sum(0))


def test_mixed_dtypes_and_wrong_shapes_are_explained() -> None:
    case = make_case(12, 8, 4, (5,))
    with pytest.raises(TypeError, match="autocast"):
        spp_linear(case.x.double(), case.weight, None, case.alpha, case.beta, 2.0)
    with pytest.raises(ValueError, match="must be 8"):
        spp_linear(torch.zeros(5, 7), case.weight, None, case.alpha, case.beta, 2.0)
    with pytest.raises(ValueError, match=r"beta is \(11, 1\), expected \(12, 1\)"):
        spp_linear(case.x, case.weight, None, case.alpha, case.beta[:11], 2.0)
    with pytest.raises(ValueError, match="r = 13"):
        spp_linear(case.x, case.weight, None, torch.zeros(13, 8), case.beta, 2.0)
