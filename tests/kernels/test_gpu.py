"""Layers computed whole, as on a GPU, by plain torch and by Triton's kernels: outputs, gradients, the weight's bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spp.functional import effective_weight, spp_linear
from spp.kernels import gpu, release_workspace, use_kernels
from spp.kernels.linear import linear
from spp.rules import Adapter, get_rule
from spp.weights import PackedWeight
from tests.helpers.layers import SHAPES, Case, make_case
from tests.helpers.tolerances import assert_matches, assert_same_bits
from tests.kernels.test_linear import check, run, run_reference

WIDE = (20, 300, 3, (5,))  # several chunks of columns, the last one narrow
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole-layer path on any device, in chunks of few columns."""
    monkeypatch.setattr(gpu.Whole, "takes", lambda self, operation, x: True)
    monkeypatch.setattr(gpu, "COLUMN_UNIT", 128)
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 2**12)


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest, small_chunks: None, triton_device: torch.device) -> Iterator[str]:
    """Either kind of kernels."""
    with use_kernels(request.param):
        yield request.param


def on(device: torch.device, case: Case) -> Case:
    def move(t: Tensor | None) -> Tensor | None:
        return t if t is None else t.detach().to(device).requires_grad_(t.requires_grad)

    moved = [move(t) for t in (case.x, case.weight, case.bias, case.alpha, case.beta, case.dy)]
    return Case(*moved, case.scaling)  # type: ignore[arg-type]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r", "leading"), [*SHAPES, WIDE])
def test_values_and_gradients(
    m: int, n: int, r: int, leading: tuple[int, ...], dtype: torch.dtype, kernels: str, triton_device: torch.device
) -> None:
    case = on(triton_device, make_case(m, n, r, leading, dtype))
    check(case, *run(case), dtype)


def test_float64_is_plain_torchs(small_chunks: None, triton_device: torch.device) -> None:
    for shape in (*SHAPES, WIDE):
        case = on(triton_device, make_case(*shape, torch.float64))
        check(case, *run(case), torch.float64)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "r", "leading"), [(13, 7, 5, (3,)), (8, 4, 2, (0,)), WIDE])
def test_input_dropout(
    m: int, n: int, r: int, leading: tuple[int, ...], dtype: torch.dtype, kernels: str, triton_device: torch.device
) -> None:
    case = on(triton_device, make_case(m, n, r, leading, dtype))
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(case.x), 0.3)
    torch.manual_seed(3)
    y, grads = run(case, dropout=0.3)
    check(case, y, grads, dtype, mask.detach())


def test_forward_multiplies_by_the_effective_weight_bit_for_bit(kernels: str, triton_device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        case = on(triton_device, make_case(37, 20, 4, (6,), dtype))
        y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
        merged = effective_weight(case.weight, case.alpha, case.beta, 2.0)
        assert_same_bits(y, torch.nn.functional.linear(case.x, merged, case.bias), str(dtype))


def test_both_kinds_of_kernels_give_the_same_bits_in_forward(
    monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    monkeypatch.setattr(gpu.Whole, "takes", lambda self, operation, x: True)
    case = on(triton_device, make_case(31, 45, 7, (6,), torch.float16))
    results = []
    for choice in ("torch", "triton"):
        with use_kernels(choice):
            torch.manual_seed(0)
            results.append([spp_linear(case.x, case.weight, None, case.alpha, case.beta, 2.0, p) for p in (0.0, 0.5)])
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_weights_give_the_bits_of_dense_ones(
    pattern: tuple[int, int] | None, dropout: float, kernels: str, triton_device: torch.device
) -> None:
    for dtype in (torch.float32, torch.float16):
        case = on(triton_device, make_case(*WIDE, dtype))
        if pattern is not None:
            kept = torch.arange(300, device=triton_device) % pattern[1] < pattern[0]
            case.weight = (case.weight.sign() + 0.5) * kept
        packed = PackedWeight.pack(case.weight)
        assert packed.layout.group == (pattern[1] if pattern else 0)
        results = []
        for weight in (case.weight + 0.0, packed):  # a packed −0.0 comes back as 0.0
            torch.manual_seed(5)
            params = (case.alpha, case.beta)
            y = linear(case.x, weight, case.bias, Adapter(get_rule("spp"), params, 2.0, dropout))
            results.append([y, *torch.autograd.grad(y, case.inputs(), case.dy)])
        for dense, found in zip(*results, strict=True):
            assert_same_bits(found, dense)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("trains", ["x", "alpha", "beta", "bias", "x alpha"])
def test_only_what_requires_a_gradient_gets_one(trains: str, kernels: str, triton_device: torch.device) -> None:
    case = on(triton_device, make_case(*WIDE))
    everything = dict(zip(("x", "bias", "alpha", "beta"), case.inputs(), strict=True))
    _, oracle = run_reference(case.to(torch.float64))
    for name, tensor in everything.items():
        tensor.requires_grad_(name in trains.split())
    spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0).backward(case.dy)
    for (name, tensor), expected in zip(everything.items(), oracle, strict=True):
        if name in trains.split():
            assert tensor.grad is not None
            assert_matches(tensor.grad, expected, torch.float32, what=name)
        else:
            assert tensor.grad is None


def test_autocast_rounds_to_the_stored_then_to_the_autocast_dtype(kernels: str, triton_device: torch.device) -> None:
    case = on(triton_device, make_case(12, 16, 4, (5,)))
    with torch.autocast(triton_device.type, dtype=torch.float16):
        y = spp_linear(case.x, case.weight, case.bias, case.alpha, case.beta, 2.0)
    stored = effective_weight(case.weight, case.alpha, case.beta, 2.0)
    assert case.bias is not None
    assert_same_bits(y, torch.nn.functional.linear(case.x.half(), stored.half(), case.bias.half()))
    grads = torch.autograd.grad(y, case.inputs(), case.dy.half())
    _, exact = run_reference(case.to(torch.float64))
    _, plain = run_reference(case.to(torch.float16))
    for given, found, expected, low in zip(case.inputs(), grads, exact, plain, strict=True):
        assert found.dtype == given.dtype
        assert_matches(found, expected, torch.float16, low)


def test_nothing_points_into_the_workspace(kernels: str, triton_device: torch.device) -> None:
    case, other = (on(triton_device, make_case(*WIDE, seed=seed)) for seed in (0, 1))
    first = run(case)
    kept = [t.clone() for t in (first[0], *first[1])]
    run(other)
    run(other, dropout=0.3)
    for before, after in zip(kept, (first[0], *first[1]), strict=True):
        assert_same_bits(after, before)
    release_workspace()


@pytest.mark.parametrize(
    ("m", "n", "itemsize", "expected"),
    [(4096, 4096, 2, 2048), (11008, 4096, 2, 1024), (4096, 11008, 2, 2816), (1, 1, 2, 1), (576, 576, 4, 576)],
)
def test_chunks_fill_half_the_cache_evenly(
    m: int, n: int, itemsize: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 50 * 2**20)
    step = gpu.gradient_step(m, n, itemsize, torch.device("cuda"))
    assert step == expected
    assert step * m * itemsize <= 25 * 2**20 or step == gpu.COLUMN_UNIT


def test_chunks_of_the_least_width_where_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 2**20)
    assert gpu.gradient_step(100_000, 4096, 2, torch.device("cuda")) == gpu.COLUMN_UNIT
    assert gpu.gradient_step(0, 8, 2, torch.device("cuda")) == 8
    assert gpu.gradient_step(8, 0, 2, torch.device("cuda")) == 1
