"""The compiled products with low-rank factors: against the formula in float64, and bit for bit against plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spp.kernels import backend, native, use_kernels
from spp.kernels.linear import linear
from spp.kernels.native.products import EFFECTIVE, FROZEN, Products, Update, block_of, empty_sums, library
from spp.rules import Adapter, effective_weight, get_rule
from spp.weights import PackedWeight
from tests.helpers.layers import Case, make_case
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros
from tests.kernels.test_native import DTYPES, calls  # noqa: F401  # a fixture
from tests.kernels.test_sources import Forgetful
from tests.rules.test_low_rank import NAMES, SCALING, make_params, plain

SHAPES = [  # across the edges of a tile of tokens, of 64 columns, of a thread's share; one row, one column, no tokens
    (13, 7, 5, (3,)),
    (1, 200, 1, (50,)),
    (9, 1, 1, (40,)),
    (70, 67, 5, (100,)),
    (300, 130, 12, (97,)),
    (64, 576, 16, (3, 33)),
    (8, 4, 2, (0,)),
]

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason=f"no compiled products: {native.why_not()}"),
    pytest.mark.parametrize("name", NAMES),
]


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    with use_kernels("native"):
        yield


def compute(name: str, case: Case, weight: object, params: list[Tensor], dropout: float = 0.0) -> list[Tensor]:
    """Output and every gradient."""
    torch.manual_seed(3)
    y = linear(case.x, weight, case.bias, Adapter(get_rule(name), params, SCALING, dropout))  # type: ignore[arg-type]
    assert case.bias is not None
    return [y, *torch.autograd.grad(y, [case.x, case.bias, *params], case.dy)]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r", "leading"), SHAPES)
def test_values_and_gradients(
    name: str,
    m: int,
    n: int,
    r: int,
    leading: tuple[int, ...],
    dtype: torch.dtype,
    dropout: float,
    calls: list[str],  # noqa: F811
) -> None:
    case, params = make_case(m, n, 1, leading, dtype), make_params(m, n, r, dtype)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(case.x), dropout) if dropout else None
    found = compute(name, case, case.weight, params, dropout)
    products = ["product"] * (4 if dropout else 2)
    assert calls == ([] if 0 in leading else [*products, "reduce"])
    exact, low = (plain(name, case, params, mask, of) for of in (torch.float64, dtype))
    for what, actual, wanted, rough in zip(("Y", "dX", "db", "dA", "dB"), found, exact, low, strict=True):
        assert_matches(actual, wanted, dtype, rough, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_multiplied_weight_is_the_effective_weight_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    m, n = 66, 133
    rule, weight = get_rule(name), make_case(m, n, 1, (1,), dtype).weight
    a, b = (p.detach() for p in make_params(m, n, 4, dtype))
    b[:3] = 0
    a[0], b[0, 0] = 1.0, -1.0 / SCALING  # HiRA: 1 + U = 0, and every kept weight of row 0 is rescued
    weight[1, :2], b[1, 0] = 1.0, -1.0 / SCALING  # masked LoRA: W + U = 0
    weight[2, :4] = torch.tensor([torch.finfo(dtype).smallest_normal, -1.0, -0.0, 0.0], dtype=dtype)
    expected = effective_weight(weight, Adapter(rule, (a, b), SCALING)).float()
    products, found = Products(library()), torch.empty(n, m)
    update = Update(b * SCALING, a, name == "masked_lora")
    block = block_of(weight, 0, m, update, EFFECTIVE, dtype)
    products.product(products.tiles("x", torch.eye(n)), block, found, transposed=False, add=False)
    assert_same_bits(found.T + 0.0, expected + 0.0)  # + 0.0: a sum that starts at 0.0 has no −0.0
    assert_same_zeros(found.T, weight)
    row = 0 if name == "hira" else 1
    assert 0 < float(found.T[row, :2].abs().max()) < 1e-6, "nothing was rescued"
    turned = torch.empty(m, n)
    products.product(products.tiles("x", torch.eye(m)), block, turned, transposed=True, add=False)
    assert_same_bits(turned + 0.0, expected + 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_block_layout_or_thread_changes_a_bit(
    name: str, dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, params = make_case(70, 264, 1, (50,), dtype), make_params(70, 264, 5, dtype)
    expected = compute(name, case, case.weight, params, dropout)
    log: list[tuple[int, ...]] = []
    packed = PackedWeight.pack(case.weight)
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(backend, "_THIN", 256)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for weight in (case.weight, case.weight.T.contiguous().T, Forgetful(log, case.weight), packed):
                for actual, wanted in zip(compute(name, case, weight, params, dropout), expected, strict=True):
                    assert_same_bits(actual, wanted)
    finally:
        torch.set_num_threads(before)
    assert len(log) > 3


def test_long_rows_take_no_more_sums_than_there_should_be(name: str) -> None:
    m, n, r = 3, 64 * 131 + 5, 2  # 132 groups of columns: three to a sum
    case, params = make_case(m, n, 1, (40,)), make_params(m, n, r, torch.float32)
    update = Update(params[1].detach(), params[0].detach())
    assert empty_sums(update).shape == (44, m, r)
    exact = plain(name, case, params, None, torch.float64)
    for actual, wanted in zip(compute(name, case, case.weight, params), exact, strict=True):
        assert_matches(actual, wanted, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        several = compute(name, case, case.weight, params)
    finally:
        torch.set_num_threads(before)
    for actual, wanted in zip(several, compute(name, case, case.weight, params), strict=True):
        assert_same_bits(actual, wanted)


def test_nothing_comes_from_where_the_mask_is_zero(name: str) -> None:
    m, n = 40, 70
    weight = make_case(m, n, 1, (1,)).weight
    a, b = (p.detach() for p in make_params(m, n, 3, torch.float32))
    x, dy = torch.randn(33, n), torch.randn(33, m)
    x[:, 5], weight[:, 5] = 1e30, 0.0  # a pruned column of large inputs
    products, update = Products(library()), Update(b * SCALING, a, name == "masked_lora")
    d_right, d_left = torch.zeros_like(a), empty_sums(update)
    block = block_of(weight, 0, m, update, FROZEN, torch.float32)
    products.reduce(products.tiles("x", x), products.tiles("dy", dy), block, d_right, d_left)
    assert not d_right[:, 5].any() and float(d_left.abs().max()) < 1e9


def test_not_finite_factors_come_out_as_they_go_in(name: str) -> None:
    case, params = make_case(16, 72, 1, (40,)), make_params(16, 72, 4, torch.float32)
    with torch.no_grad():
        params[1][3] = math.nan
    y = compute(name, case, case.weight, params)[0]
    assert bool(y[:, 3].isnan().all()) and int(y.isnan().sum()) == len(y)
