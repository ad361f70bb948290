"""The kernels on packed weights: what they decode, build and reduce is what they do with the same W dense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.kernels.triton.tile import GROUPS, MASK
from spp.rules import get_rule
from spp.rules.spp import Factors
from spp.weights import PackedWeight
from tests.helpers.tolerances import assert_matches, assert_same_bits

RULE = get_rule("spp")
WHOLE = slice(None)
# (N of M or None for any pattern, rows, columns, form): several tiles, several stretches
MATRICES = [
    ((1, 2), 5, 38, GROUPS),
    ((1, 4), 5, 52, GROUPS),
    ((2, 16), 3, 560, MASK),
    ((4, 32), 3, 96, MASK),
    ((2, 4), 13, 36, GROUPS),
    ((4, 8), 3, 1032, GROUPS),
    ((2, 8), 1, 8, GROUPS),
    (None, 13, 7, MASK),
    (None, 3, 2500, MASK),
    (None, 1, 1, MASK),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDED = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def matrix(pattern: tuple[int, int] | None, m: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator)
    if pattern is None:
        weight *= torch.rand(m, n, generator=generator) > 0.6
    else:
        kept, group = pattern
        order = torch.rand(m, n // group, group, generator=generator).argsort(-1)[..., :kept]
        weight *= torch.zeros(m, n // group, group).scatter_(2, order, 1.0).view(m, n)
    return weight.to(device, dtype)


def packed_as(weight: Tensor, form: int) -> PackedWeight:
    from spp.kernels.triton.tile import operand

    packed = PackedWeight.pack(weight)
    assert operand(packed)[2]["FORM"] == form
    return packed


def factors_of(weight: Tensor, r: int) -> Factors:
    m, n = weight.shape
    generator = torch.Generator().manual_seed(1)
    alpha, beta = (0.5 * torch.randn(*shape, generator=generator) for shape in ((r, n), (m, 1)))
    factors: Factors = RULE.prepare((alpha.to(weight.device), beta.to(weight.device)), 2.0, m, torch.float32)
    return factors


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "m", "n", "form"), MATRICES)
def test_any_rectangle_is_decoded(
    pattern: tuple[int, int] | None, m: int, n: int, form: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    from spp.kernels.triton import decode

    weight = matrix(pattern, m, n, dtype, triton_device)
    packed = packed_as(weight, form)
    for rows, cols in (
        (WHOLE, WHOLE),
        (slice(m // 2, m), slice(n // 3, n - n // 4)),
        (slice(0, 1), slice(n - 1, n)),
        (slice(0, m), slice(n // 2, n // 2)),
        (slice(m, m), WHOLE),
    ):
        expected = weight[rows, cols].contiguous()
        out = torch.full_like(expected, float("nan"))
        assert decode(packed, rows, cols, out) is out
        assert torch.equal(out, expected)


def test_groups_with_fewer_values_than_they_may_have(triton_device: torch.device) -> None:
    from spp.kernels.triton import decode

    for pattern, form in (((2, 4), GROUPS), ((2, 8), GROUPS)):
        weight = matrix(pattern, 4, 64, torch.float16, triton_device)
        weight[0, :8] = 0
        weight[2, weight[2].nonzero()[0]] = 0
        assert torch.equal(decode(packed_as(weight, form), WHOLE, WHOLE, torch.empty_like(weight)), weight)


def test_nothing_is_kept(triton_device: torch.device) -> None:
    from spp.kernels.triton import decode

    weight = torch.zeros(3, 9, device=triton_device)
    out = torch.full_like(weight, float("nan"))
    assert torch.equal(decode(packed_as(weight, MASK), WHOLE, WHOLE, out), weight)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize(("pattern", "m", "n", "form"), MATRICES)
def test_the_effective_weight_and_the_update_have_the_bits_of_the_dense_ones(
    pattern: tuple[int, int] | None, m: int, n: int, form: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    from spp.kernels.triton import build, delta

    weight = matrix(pattern, m, n, dtype, triton_device) + 0.0  # a packed −0.0 comes back as 0.0
    factors = factors_of(weight, max(1, m // 2))
    for function in (build, delta):
        results = []
        for given in (weight, packed_as(weight, form)):
            results.append(torch.full((m, n), float("nan"), dtype=dtype, device=triton_device))
            function(given, factors, results[-1])
        assert_same_bits(results[1], results[0])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize(("pattern", "m", "n", "form"), MATRICES)
def test_gradients(
    pattern: tuple[int, int] | None, m: int, n: int, form: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    from spp.kernels.triton import reduce

    weight = matrix(pattern, m, n, dtype, triton_device)
    packed = packed_as(weight, form)
    factors = factors_of(weight, max(1, m // 2))
    gradient = torch.randn(m, n, generator=torch.Generator().manual_seed(2)).to(triton_device, dtype)
    exact = RULE.prepare((factors.alpha, factors.beta), 2.0, m, torch.float64)
    oracle = RULE.empty_grads(exact, (True, True))
    RULE.reduce(weight, exact, WHOLE, WHOLE, gradient.double(), oracle, accumulate=False)
    for step in (n, 128):
        found = RULE.empty_grads(factors, (True, True))
        for grad in found:
            assert grad is not None
            grad.zero_()
        for first in range(0, n, step):
            cols = slice(first, min(first + step, n))
            reduce(packed, factors, cols, gradient[:, cols].contiguous(), found, accumulate=True)
        for one, expected in zip(found, oracle, strict=True):
            assert one is not None and expected is not None
            assert_matches(one, expected, torch.float32)
