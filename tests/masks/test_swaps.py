"""Optimal exchanges against every pair tried out in float64: the best one, patterns, errors, refusals."""

from __future__ import annotations

import pytest
import torch

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.masks import swaps
from spp.pruning import magnitude_mask, swap, wanda_mask
from tests.masks.test_least_squares import _errors, _problem


def _best_pair(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, group: int | None) -> torch.Tensor:
    """Return the mask of one row after the best of all exchanges, or as it was."""
    best, lowest = mask, float(_errors(weight[None], (weight * mask)[None], hessian))
    for q in mask.nonzero()[:, 0].tolist():
        for p in (~mask & (weight != 0)).nonzero()[:, 0].tolist():
            if group is None or q // group == p // group:
                tried = mask.clone()
                tried[q], tried[p] = False, True
                error = float(_errors(weight[None], (weight * tried)[None], hessian))
                if error < lowest:
                    best, lowest = tried, error
    return best


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "8:16", 0.5, 0.75])
def test_each_exchange_is_the_best_of_all_pairs(pattern: str | float) -> None:
    weight, hessian = _problem(6, 16)
    weight[2, 5] = 0
    mask = magnitude_mask(weight, pattern)
    group = None if isinstance(pattern, float) else int(pattern.split(":")[1])
    expected = mask
    for count in range(1, 4):
        expected = torch.stack([_best_pair(*rows, group) for rows in zip(weight, [hessian] * 6, expected, strict=True)])
        found = swap(weight, hessian, mask, pattern, max_swaps=count)
        if group is None or group <= swaps._ALL_PAIRS:
            assert torch.equal(found, expected)
        else:  # the pair of the lowest s: no worse than none
            assert (_errors(weight, weight * found, hessian) <= _errors(weight, weight * mask, hessian)).all()
    assert not torch.equal(expected, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "16:32", 0.5])
def test_errors_fall_and_every_group_and_row_keeps_as_many(pattern: str | float, dtype: torch.dtype) -> None:
    weight, hessian = _problem(20, 64, dtype=dtype)
    mask = wanda_mask(weight, hessian.diagonal().float().sqrt(), pattern)
    better = swap(weight, hessian.float(), mask, pattern)
    before, after = (_errors(weight, weight * m, hessian.float()) for m in (mask, better))
    assert (after <= before).all()
    assert after.sum() < 0.85 * before.sum()
    size = 64 if isinstance(pattern, float) else int(pattern.split(":")[1])
    assert torch.equal(mask.view(20, -1, size).sum(-1), better.view(20, -1, size).sum(-1))


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = _problem(9, 32)
    mask = magnitude_mask(weight, "2:4")
    whole = swap(weight, hessian, mask, "2:4")
    monkeypatch.setattr(swaps, "_BLOCK", 64)
    assert torch.equal(swap(weight, hessian, mask, "2:4"), whole)


def test_a_pruned_zero_never_comes_back_as_kept() -> None:
    weight, hessian = _problem(8, 16)
    weight[:, ::4] = 0
    mask = magnitude_mask(weight, "2:4")
    better = swap(weight, hessian, mask, "2:4", max_swaps=100)
    assert not better[:, ::4].any()


def test_groups_that_keep_less_than_their_number_stay_so_and_nothing_to_do_is_nothing_done() -> None:
    weight, hessian = _problem(4, 16)
    mask = magnitude_mask(weight, "1:4")
    assert (swap(weight, hessian, mask, "2:4").view(4, 4, 4).sum(-1) == 1).all()
    assert torch.equal(swap(weight, hessian, mask, "1:4", max_swaps=0), mask)
    every = torch.ones(4, 16, dtype=torch.bool)
    assert torch.equal(swap(weight, hessian, every, 0.0), every)
    assert torch.equal(swap(weight, hessian, ~every, 0.5), ~every)
    assert swap(weight[:0], hessian, mask[:0], "1:4").shape == (0, 16)


def test_refusals() -> None:
    weight, hessian = _problem(4, 16)
    mask = magnitude_mask(weight, "3:4")
    with pytest.raises(PatternError, match="a group of the mask keeps 3 of 4 weights; pattern 2:4 keeps 2"):
        swap(weight, hessian, mask, "2:4")
    with pytest.raises(PatternError, match="5"):
        swap(weight, hessian, mask, "2:5")
    with pytest.raises(ConfigError, match="max_swaps is -1"):
        swap(weight, hessian, mask, "3:4", max_swaps=-1)
    with pytest.raises(NonFiniteError, match="the weight holds NaN"):
        swap(weight.fill_(float("nan")), hessian, mask, "3:4")
