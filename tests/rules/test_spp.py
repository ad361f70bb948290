"""The rule of SPP on tensors: groups, canonical order of operations, rescue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.errors import ConfigError
from spp.functional import effective_weight
from spp.kernels.cpu import may_vanish
from spp.rules import get_rule
from spp.rules.spp import row_groups
from tests.helpers.layers import SHAPES, make_case
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros

SMALLEST = {
    torch.float64: 2.0**-1022,
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-24,
}


@given(st.integers(1, 400), st.data())
def test_groups_follow_the_floor_rule(m: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, m))
    groups = row_groups(m, r)
    for k in range(r):
        rows = (groups == k).nonzero().flatten().tolist()
        assert rows == list(range(k * m // r, (k + 1) * m // r))
    sizes = groups.bincount()
    assert len(sizes) == r and int(sizes.max() - sizes.min()) <= 1


def test_five_rows_in_two_groups_are_two_and_three() -> None:
    assert row_groups(5, 2).tolist() == [0, 0, 1, 1, 1]


def test_blocks_are_contiguous_rows_and_not_tiled() -> None:
    alpha = torch.arange(1.0, 4.0).view(3, 1).expand(3, 4).contiguous()
    merged = effective_weight(torch.ones(6, 4), alpha, torch.ones(6, 1), 1.0)
    assert merged[:, 0].tolist() == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_canonical_order_of_operations(dtype: torch.dtype) -> None:
    for m, n, r, leading in SHAPES:
        case = make_case(m, n, r, leading, dtype)
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        scaled = case.beta.detach() * torch.tensor(case.scaling, dtype=arithmetic)
        update = scaled * case.alpha.detach()[row_groups(m, r)]
        expected = (case.weight.to(arithmetic) * (1 + update)).to(dtype)
        actual = effective_weight(case.weight, case.alpha, case.beta, case.scaling)
        assert_same_bits(actual, expected)
        exact = case.weight.double() * (1 + case.scaling * case.beta.double() * case.alpha.double()[row_groups(m, r)])
        assert_matches(actual, exact, dtype, plain=exact.to(dtype))
        assert_same_zeros(actual, case.weight)


@pytest.mark.parametrize("dtype", SMALLEST, ids=str)
def test_a_weight_that_would_vanish_is_rescued_with_its_sign(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.5, -2.0, 0.0, -0.0], [1.0, -1.0, 3.0, 0.0]], dtype=dtype)
    alpha = torch.ones(1, 4)
    merged = effective_weight(weight, alpha, torch.tensor([[-0.5], [0.0]]), 2.0)  # M = 0 in the first row
    tiny = SMALLEST[dtype]
    assert merged[0].tolist() == [tiny, -tiny, 0.0, 0.0]
    assert_same_bits(merged[1], weight[1])


def test_the_smallest_float16_weights_survive_a_shrinking_factor() -> None:
    weight = torch.full((2, 4), 2.0**-24, dtype=torch.float16)
    merged = effective_weight(weight, torch.ones(1, 4), torch.full((2, 1), -0.4), 2.0)  # M = 0.2
    assert_same_bits(merged, weight)


@given(
    st.sampled_from(list(SMALLEST)),
    st.integers(0, 2**31),
    st.floats(0.01, 3e4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.data(),
)
def test_zeros_never_change(dtype: torch.dtype, seed: int, size: float, m: int, n: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-30, 3, (m, n), generator=generator)
    weight = (
        torch.randn(m, n, generator=generator) * 2.0**exponents * (torch.rand(m, n, generator=generator) > 0.5)
    ).to(dtype)
    alpha, beta = size * torch.randn(r, n, generator=generator), torch.randn(m, 1, generator=generator)
    beta[torch.rand(m, 1, generator=generator) < 0.2] = 0
    merged = effective_weight(weight, alpha, beta, 2.0)
    if bool(torch.isfinite(merged).all()):
        assert_same_zeros(merged, weight)


def test_flushing_denormals_cannot_change_a_mask() -> None:
    weight = torch.tensor([[2.0**-130, 1.0, 0.0, -(2.0**-127)]])
    expected = torch.tensor([[True, True, False, True]])
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot flush denormals")
        merged = effective_weight(weight, torch.ones(1, 4), torch.full((1, 1), -0.25), 2.0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(merged != 0, expected)


def bound(params: tuple[torch.Tensor, ...]) -> float:
    rule = get_rule("spp")
    return rule.largest_factor(rule.prepare(params, 2.0, 2, torch.float32))


def test_the_cheap_bound_never_misses_a_vanishing_weight() -> None:
    plain = torch.tensor([[1.0, -0.5], [0.0, 2.0]])
    params = (torch.full((1, 2), 0.1), torch.full((2, 1), 0.1))
    assert not may_vanish(plain, bound(params))
    large = (params[0] * 100, params[1])
    assert may_vanish(plain, bound(large))
    plain[0, 0] = 2.0**-126  # in place: the remembered minimum is found anew
    assert may_vanish(plain, bound(params))
    nan = (params[0] * float("nan"), params[1])
    assert may_vanish(torch.ones(2, 2), bound(nan))


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="no rule 'lora'; known: full, hira, masked_lora, spp"):
        get_rule("lora")
