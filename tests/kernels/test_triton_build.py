"""The kernel that builds W_eff: every bit of the plain function's, whatever the shape, the dtype and the strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.rules import get_rule
from spp.rules.adapter import arithmetic_dtype, effective_block
from spp.rules.spp import Factors, row_groups
from tests.helpers.layers import SHAPES, make_case
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros

RULE = get_rule("spp")
WHOLE = slice(None)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
MATRICES = [*sorted({shape[:3] for shape in SHAPES}), (37, 521, 5), (9, 1025, 2), (130, 3, 11)]  # several tiles


def prepare(weight: Tensor, alpha: Tensor, beta: Tensor, scaling: float = 2.0) -> Factors:
    factors: Factors = RULE.prepare((alpha, beta), scaling, weight.shape[0], torch.float32)
    return factors


def twin(weight: Tensor, factors: Factors) -> Tensor:
    scratch = torch.empty(weight.shape, dtype=arithmetic_dtype(weight.dtype), device=weight.device)
    return effective_block(RULE, weight, factors, WHOLE, WHOLE, scratch)


def built(weight: Tensor, factors: Factors, dtype: torch.dtype | None = None) -> Tensor:
    from spp.kernels.triton.build_kernel import build

    out = torch.full(weight.shape, float("nan"), dtype=dtype or weight.dtype, device=weight.device)
    build(weight, factors, out)
    return out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r"), MATRICES)
def test_every_bit_is_the_twins(m: int, n: int, r: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    case = make_case(m, n, r, (1,), dtype)
    weight, alpha, beta = (t.detach().to(triton_device) for t in (case.weight, case.alpha, case.beta))
    factors = prepare(weight, alpha, beta)
    found = built(weight, factors)
    assert_same_bits(found, twin(weight, factors))
    exact = weight.double() * (1 + 2.0 * beta.double() * alpha.double()[row_groups(m, r, triton_device)])
    assert_matches(found, exact, dtype, plain=exact.to(dtype))
    assert_same_zeros(found, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_weight(dtype: torch.dtype, triton_device: torch.device) -> None:
    case = make_case(13, 34, 5, (1,), dtype)
    weight = case.weight.t().contiguous().t().to(triton_device)
    assert weight.stride() == (1, 13)
    factors = prepare(weight, case.alpha.to(triton_device), case.beta.to(triton_device))
    assert_same_bits(built(weight, factors), twin(weight, factors))


@pytest.mark.parametrize(("stored", "product"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_autocast_rounds_to_the_stored_then_to_the_products_dtype(
    stored: torch.dtype, product: torch.dtype, triton_device: torch.device
) -> None:
    case = make_case(37, 70, 4, (1,), stored)
    weight = case.weight.to(triton_device)
    factors = prepare(weight, case.alpha.to(triton_device), case.beta.to(triton_device))
    assert_same_bits(built(weight, factors, product), twin(weight, factors).to(product))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_would_vanish_is_rescued_and_every_zero_stays(dtype: torch.dtype, triton_device: torch.device) -> None:
    tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    below = tiny if dtype == torch.float16 else tiny / 4  # a subnormal is a kept weight
    rows = [[1.5, -2.0, 0.0, -0.0], [tiny, -tiny, below, -below], [1.0, -1.0, 3.0, 0.0]]
    weight = torch.tensor(rows, dtype=dtype, device=triton_device)
    alpha = torch.ones(1, 4, device=triton_device)
    beta = torch.tensor([[-0.5], [-0.5 + 2.0**-25], [0.0]], device=triton_device)  # M = 0, 2⁻²⁴, 1
    factors = prepare(weight, alpha, beta)
    found = built(weight, factors)
    assert_same_bits(found, twin(weight, factors))
    assert found[0].tolist() == [tiny, -tiny, 0.0, 0.0]
    assert found[1].tolist() == [tiny, -tiny, tiny, -tiny]
    assert_same_zeros(found, weight)
    assert_same_bits(found[2], weight[2])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r"), [(13, 7, 5), (1, 3, 1), (37, 521, 5)])
def test_the_update_alone(m: int, n: int, r: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    from spp.kernels.triton.build_kernel import delta

    case = make_case(m, n, r, (1,), dtype)
    weight = case.weight.to(triton_device)
    factors = prepare(weight, case.alpha.to(triton_device), case.beta.to(triton_device))
    expected = torch.empty(m, n, device=triton_device)
    RULE.delta(weight, factors, WHOLE, WHOLE, expected)
    for product in (dtype, torch.float32):
        out = torch.empty(m, n, dtype=product, device=triton_device)
        delta(weight, factors, out)
        assert_same_bits(out, expected.to(product))


def test_nothing_to_build(triton_device: torch.device) -> None:
    weight = torch.empty(4, 0, device=triton_device)
    factors = prepare(weight, torch.empty(2, 0, device=triton_device), torch.ones(4, 1, device=triton_device))
    assert built(weight, factors).shape == (4, 0)
