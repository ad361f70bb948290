"""A sum of SPP terms on one weight: bits, values, gradients and zeros, against float64 and against one term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.kernels import backend
from spp.kernels.linear import linear
from spp.rules import Adapter, effective_weight, get_rule
from spp.rules.spp import row_groups
from spp.rules.terms import TermsRule
from tests.helpers.layers import Case, make_case
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros

SPP = get_rule("spp")
SHAPES = [
    (12, 8, (4, 3), (5,)),
    (13, 7, (5, 13, 1), (2, 3)),
    (1, 3, (1, 1), (2,)),
    (31, 64, (16, 4), ()),
    (6, 4, (2, 2), (0,)),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALINGS = (2.0, -0.75, 0.5)


def terms(m: int, n: int, ranks: tuple[int, ...], dtype: torch.dtype) -> tuple[TermsRule, list[Tensor]]:
    rule = TermsRule(SPP, ranks, SCALINGS[: len(ranks)])
    cases = [make_case(m, n, r, (1,), dtype, seed=10 + t) for t, r in enumerate(ranks)]
    return rule, [p for case in cases for p in (case.alpha, case.beta)]


def plain(rule: TermsRule, case: Case, params: list[Tensor], mask: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the branches written out, computed in `dtype`."""
    low, given = case.to(dtype), [p.detach().to(dtype).requires_grad_() for p in params]
    out = rule.oracle(low.x, low.weight, low.bias, given, 1.0, None if mask is None else mask.to(dtype))
    assert low.bias is not None
    return [out, *torch.autograd.grad(out, [low.x, low.bias, *given], low.dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_terms_are_added_in_order_and_rounded_once(dtype: torch.dtype) -> None:
    for m, n, ranks, leading in SHAPES:
        rule, params = terms(m, n, ranks, dtype)
        weight = make_case(m, n, 1, leading, dtype).weight
        update = torch.zeros(m, n, dtype=params[0].dtype)
        for t, r in enumerate(ranks):
            alpha, beta = (p.detach() for p in params[2 * t : 2 * t + 2])
            update = update + (beta * rule.scalings[t]) * alpha[row_groups(m, r)]
        expected = (weight.to(update.dtype) * (1 + update)).to(dtype)
        actual = effective_weight(weight, Adapter(rule, params, 1.0))
        assert_same_bits(actual, expected)
        assert_same_zeros(actual, weight)


def test_one_term_has_the_bits_of_its_rule() -> None:
    case = make_case(13, 8, 5, (2,), torch.bfloat16)
    params = [case.alpha, case.beta]
    one = effective_weight(case.weight, Adapter(TermsRule(SPP, (5,), (2.0,)), params, 1.0))
    assert_same_bits(one, effective_weight(case.weight, Adapter(SPP, params, 2.0)))
    other = effective_weight(case.weight, Adapter(TermsRule(SPP, (5,), (1.0,)), params, 1.0))
    assert not torch.equal(one, other)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("elements", [2**22, 24])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, dropout: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    for m, n, ranks, leading in SHAPES:
        case = make_case(m, n, 1, leading, dtype)
        rule, params = terms(m, n, ranks, dtype)
        assert case.bias is not None
        torch.manual_seed(3)
        mask = torch.nn.functional.dropout(torch.ones_like(case.x), dropout) if dropout else None
        torch.manual_seed(3)
        y = linear(case.x, case.weight, case.bias, Adapter(rule, params, 1.0, dropout))
        grads = torch.autograd.grad(y, [case.x, case.bias, *params], case.dy)
        for actual, exact, low in zip(
            [y, *grads],
            plain(rule, case, params, mask, torch.float64),
            plain(rule, case, params, mask, dtype),
            strict=True,
        ):
            assert_matches(actual, exact, dtype, low)


@pytest.mark.parametrize("name", ["hira", "masked_lora"])
def test_terms_of_other_rules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", 24)
    case, one = make_case(13, 7, 1, (5,), torch.float64), get_rule(name)
    rule = TermsRule(one, (4, 3), SCALINGS[:2])
    params = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in rule.shapes(13, 7, 7)]
    mask, change = case.weight != 0, torch.zeros(13, 7, dtype=torch.float64)
    for t in range(2):
        change = change + SCALINGS[t] * params[2 * t + 1] @ params[2 * t]
    expected = case.weight * (1 + change) if name == "hira" else case.weight + change * mask
    assert_matches(effective_weight(case.weight, Adapter(rule, params, 1.0)), expected, torch.float64)
    assert_same_zeros(effective_weight(case.weight, Adapter(rule, params, 1.0)), case.weight)
    y = linear(case.x, case.weight, case.bias, Adapter(rule, params, 1.0))
    grads = torch.autograd.grad(y, [case.x, *params], case.dy)
    exact = torch.nn.functional.linear(case.x, expected, case.bias)
    wanted = torch.autograd.grad(exact, [case.x, *params], case.dy)
    by_oracle = rule.oracle(case.x, case.weight, case.bias, params, 1.0, None)
    for actual, right in zip([y, by_oracle, *grads], [exact, exact, *wanted], strict=True):
        assert_matches(actual, right, torch.float64)
    alone = effective_weight(case.weight, Adapter(TermsRule(one, (4,), (2.0,)), params[:2], 1.0))
    assert_same_bits(alone, effective_weight(case.weight, Adapter(one, params[:2], 2.0)))


def test_only_the_gradients_that_are_wanted() -> None:
    case = make_case(12, 8, 1, (5,))
    rule, params = terms(12, 8, (4, 3), torch.float32)
    params[0].requires_grad_(False)
    params[3].requires_grad_(False)
    linear(case.x, case.weight, None, Adapter(rule, params, 1.0)).sum().backward()
    assert [p.grad is not None for p in params] == [False, True, True, False]


def test_shapes_ranks_and_names() -> None:
    rule, params = terms(12, 8, (4, 3), torch.float32)
    assert rule.shapes(12, 8, 7) == ((4, 8), (12, 1), (3, 8), (12, 1))
    assert rule.attribute_names() == ("terms_alpha[0]", "terms_beta[0]", "terms_alpha[1]", "terms_beta[1]")
    assert rule.rank(params) == 7
    rule.check_shapes(params, 12, 8, "here")
    with pytest.raises(ConfigError, match="their sum, 7"):
        rule.shapes(12, 8, 4)
    with pytest.raises(ConfigError, match="here: r = 4"):
        rule.check_rank(3, 8, 7, "here")
    generator = torch.Generator().manual_seed(0)
    rule.init_([p.data for p in params], generator)
    assert not params[1].any() and not params[3].any() and params[2].abs().max() <= 8**-0.5
