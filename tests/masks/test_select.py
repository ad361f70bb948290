"""Selection: exact counts, ties, devices of choice (counting, sorting, thresholds) agree with a sorted list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.masks.select import (
    _LONG,
    _SAMPLE,
    best_in_rows,
    checked_pattern,
    keep_groups,
    keep_in_rows,
    keep_of_all,
    keep_slots,
    pruned_count,
)


def _sorted_keep(values: list[float], kept: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda j: (-values[j], j))
    return [j in order[:kept] for j in range(len(values))]


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([2, 3, 4, 8, 16, 17, 32]), st.data())
def test_groups_equal_a_sorted_list_even_with_ties(rows: int, groups: int, group: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, group - 1))
    seed = data.draw(st.integers(0, 1000))
    scores = torch.randint(0, 4, (rows, groups * group), generator=torch.Generator().manual_seed(seed)).float()
    mask = keep_groups(scores, kept, group)
    for i in range(rows):
        for g in range(0, groups * group, group):
            assert mask[i, g : g + group].tolist() == _sorted_keep(scores[i, g : g + group].tolist(), kept)
    slots = scores.view(-1, group).T.contiguous()
    out = torch.empty(slots.shape, dtype=torch.bool)
    keep_slots(slots, kept, out)
    assert torch.equal(out.T.reshape(mask.shape), mask)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6), st.data())
def test_rows_equal_a_sorted_list_even_with_ties(rows: int, n: int, levels: int, data: st.DataObject) -> None:
    pruned = data.draw(st.integers(0, n))
    seed = data.draw(st.integers(0, 1000))
    scores = torch.randint(0, levels, (rows, n), generator=torch.Generator().manual_seed(seed)).double()
    scores[scores == 0] = -torch.inf
    mask = keep_in_rows(scores, pruned)
    best = best_in_rows(scores, n - pruned)
    for i in range(rows):
        assert mask[i].tolist() == _sorted_keep(scores[i].tolist(), n - pruned)
        assert best[i].tolist() == sorted(range(n), key=lambda j: (-float(scores[i, j]), j))[: n - pruned]


@pytest.mark.parametrize("kind", ["random", "ties", "sorted", "misleading", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_row_is_selected_exactly_whatever_a_sample_of_it_says(kind: str, dtype: torch.dtype) -> None:
    count = _LONG + 4099
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if kind == "ties":
        scores[1::2] = 0.25
    elif kind == "sorted":
        scores = scores.sort().values
    elif kind == "misleading":  # what the sample sees lies above all else
        scores[:: count // _SAMPLE | 1] += 100
    elif kind == "infinite":
        scores[::3] = -torch.inf
    order = torch.sort(scores, descending=True, stable=True).indices
    for pruned in (1, 7, 2100, count // 2, count - 2100, count - 1):
        expected = torch.zeros(count, dtype=torch.bool).scatter(0, order[: count - pruned], True)
        assert torch.equal(keep_of_all(scores, pruned), expected), pruned


def test_all_counts_the_whole_tensor_row_by_row() -> None:
    scores = torch.tensor([[1.0, 1.0, 3.0], [1.0, 0.0, 3.0]])
    assert keep_of_all(scores, 3).tolist() == [[True, False, True], [False, False, True]]
    assert keep_of_all(scores.T, 3).T.tolist() == [[True, False, True], [False, False, True]]


def test_long_rows_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(7, 11, generator=torch.Generator().manual_seed(0))
    whole = keep_in_rows(scores, 4)
    monkeypatch.setattr("spp.masks.select._CHUNK", 13)
    assert torch.equal(keep_in_rows(scores, 4), whole)


def test_the_count_is_that_of_the_decimal_number() -> None:
    assert pruned_count(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert pruned_count(0.5, 7) == 3
    assert pruned_count(0.999, 10) == 9
    assert pruned_count(1e-9, 10) == 0


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(3,\)"):
        checked_pattern(torch.ones(3), "2:4")
    with pytest.raises(ConfigError, match="int64"):
        checked_pattern(torch.ones(2, 4, dtype=torch.int64), "2:4")
    with pytest.raises(PatternError, match="has 6"):
        checked_pattern(torch.ones(2, 6), "2:4")
    with pytest.raises(NonFiniteError):
        checked_pattern(torch.tensor([[1.0, torch.nan, 1.0, 1.0]]), "2:4")
    with pytest.raises(PatternError, match="groups of 4"):
        keep_groups(torch.ones(2, 6), 2, 4)
