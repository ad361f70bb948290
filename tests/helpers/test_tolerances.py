"""The comparison helpers fail on wrong values."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros


@pytest.mark.parametrize("wrong", [1.001, float("nan"), float("inf")])
def test_assert_matches_fails_on_a_wrong_element(wrong: float) -> None:
    oracle = torch.ones(7, dtype=torch.float64)
    actual = torch.ones(7)
    assert_matches(actual, oracle, torch.float32)
    actual[3] = wrong
    with pytest.raises(AssertionError):
        assert_matches(actual, oracle, torch.float32)


def test_assert_matches_fails_on_another_shape_or_a_permutation() -> None:
    oracle = torch.arange(6, dtype=torch.float64).view(2, 3)
    with pytest.raises(AssertionError):
        assert_matches(oracle.view(3, 2), oracle, torch.float64)
    with pytest.raises(AssertionError):
        assert_matches(oracle.flip(0), oracle, torch.float64)


def test_sixteen_bit_rule_allows_twice_the_plain_error_and_no_more() -> None:
    oracle = torch.ones(4, dtype=torch.float64)
    plain = torch.full((4,), 1.01)
    assert_matches(torch.full((4,), 1.019), oracle, torch.bfloat16, plain)
    with pytest.raises(AssertionError):
        assert_matches(torch.full((4,), 1.03), oracle, torch.bfloat16, plain)


def test_bits_tell_zeros_apart_and_zero_patterns_do_not() -> None:
    plus, minus = torch.zeros(3), -torch.zeros(3)
    assert_same_zeros(plus, minus)
    with pytest.raises(AssertionError):
        assert_same_bits(plus, minus)
    with pytest.raises(AssertionError):
        assert_same_zeros(plus, torch.tensor([0.0, 1.0, 0.0]))
