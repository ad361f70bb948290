"""Adapters that change nothing: told by their parameters, or by the first weight that differs; both kinds apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.rules import Adapter, Rule, effective_weight, get_rule
from spp.rules.adapter import effect_of, idle_reason
from spp.rules.terms import TermsRule

M, N, R = 13, 8, 5
RULES = ("spp", "hira", "masked_lora")


def params_of(rule: Rule, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in rule.shapes(M, N, R)]


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    kept = torch.rand(M, N, generator=generator) < 0.5
    return (torch.randn(M, N, generator=generator) * kept).to(dtype)


@pytest.mark.parametrize("name", RULES)
def test_a_zero_factor_of_the_update_is_named(name: str) -> None:
    rule = get_rule(name)
    params, last = params_of(rule), {"spp": "β"}.get(name, "B")
    assert idle_reason([Adapter(rule, params, 2.0)]) is None and not rule.is_idle(params, 2.0)
    assert idle_reason([Adapter(rule, params, 0.0)]) == "its scaling is zero"
    zero = [params[0], torch.zeros_like(params[1])]
    assert idle_reason([Adapter(rule, zero, 2.0)] * 2) == f"{last} is zero everywhere"
    assert idle_reason([Adapter(rule, zero, 2.0), Adapter(rule, params, 2.0)]) is None, (
        "one layer has learned something"
    )
    first = [torch.zeros_like(params[0]), params[1]]
    assert idle_reason([Adapter(rule, first, 2.0)]) == f"{ {'spp': 'α'}.get(name, 'A') } is zero everywhere"
    assert (
        idle_reason([Adapter(rule, first, 2.0), Adapter(rule, zero, 2.0)])
        == "the product of its parameters is zero everywhere"
    )
    assert idle_reason([]) is None


@pytest.mark.parametrize("name", RULES)
def test_a_product_is_zero_where_no_pair_of_factors_meets(name: str) -> None:
    """A β, or a column of B, that is not zero scales nothing where its row of α, or of A, is."""
    rule, params = get_rule(name), params_of(get_rule(name))
    w = weight()
    params[0][1:] = 0  # the first row is left
    if name == "spp":
        params[1][: M // R] = 0  # and the rows of W that it scales are not
    else:
        params[1][:, 0] = 0
    assert rule.is_idle(params, 2.0)
    assert torch.equal(effective_weight(w, Adapter(rule, params, 2.0)), w)
    experts = [torch.stack([p, p]) for p in params]
    assert rule.is_idle(experts, 2.0)
    experts[0][1, 1:] = 1.0
    assert not rule.is_idle(experts, 2.0)


@pytest.mark.parametrize("name", RULES)
def test_a_sum_of_terms_is_idle_where_every_term_is(name: str) -> None:
    one = get_rule(name)
    rule = TermsRule(one, (R, R), (2.0, 0.5))
    trained, other = params_of(one), params_of(one, seed=3)
    idle = [other[0], torch.zeros_like(other[1])]
    assert not rule.is_idle([*trained, *idle], 1.0) and rule.is_idle([*idle, *idle], 1.0)
    assert TermsRule(one, (R, R), (0.0, 0.5)).is_idle([*trained, *idle], 1.0)
    w = weight()
    assert not torch.equal(effective_weight(w, Adapter(rule, [*trained, *idle], 1.0)), w)


def test_both_kinds_are_told_apart_by_the_weights() -> None:
    rule, params = get_rule("spp"), params_of(get_rule("spp"))
    small = [params[0].clamp(-1, 1), torch.full((M, 1), 2.0**-12)]  # |s·β·α| below 2⁻⁹
    assert effect_of(weight(torch.bfloat16), Adapter(rule, small, 2.0)) == (True, False)
    assert effect_of(weight(), Adapter(rule, small, 2.0)) == (True, True)
    assert effect_of(torch.zeros(M, N), Adapter(rule, params, 2.0)) == (False, False), "nothing is scaled"
    one = torch.zeros(M, N, dtype=torch.bfloat16)
    one[-1, -1] = 1.0  # a single weight moves, in the last block
    params[0][-1, -1], params[1][-1] = 1.0, 1.0
    assert effect_of(one, Adapter(rule, params, 2.0)) == (True, True)
