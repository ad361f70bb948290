"""Exchanges of kept and pruned weights: counts, groups, order and ties, against sorted lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spp.masks.select import exchange, group_of
from spp.pruning import magnitude_mask


def plain_exchange(kept: Tensor, drop: Tensor, grow: Tensor, count: int, group: int | None) -> Tensor:
    """The same by sorted lists, index by index."""
    new, n = kept.clone(), kept.shape[1]
    flat, d, g = new.view(-1), drop.flatten().tolist(), grow.flatten().tolist()
    was = kept.flatten().tolist()
    if group is None:
        going = sorted((i for i in range(len(was)) if was[i]), key=lambda i: (d[i], -i))
        coming = sorted((i for i in range(len(was)) if not was[i] and g[i] > -math.inf), key=lambda i: (-g[i], i))
        pairs = list(zip(going, coming, strict=False))[:count]
    else:
        pairs = []
        for first in range(0, kept.shape[0] * n, group):
            inside = range(first, first + group)
            going = sorted((i for i in inside if was[i]), key=lambda i: (d[i], -i))
            coming = sorted((i for i in inside if not was[i] and g[i] > -math.inf), key=lambda i: (-g[i], i))
            pairs += list(zip(going, coming, strict=False))[:1]
        pairs = sorted(pairs, key=lambda pair: -g[pair[1]])[:count]
    for out, into in pairs:
        flat[out], flat[into] = False, True
    return new


@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.sampled_from([None, 2, 4, 5]), st.integers(0, 40)
)
def test_as_by_sorted_lists(seed: int, rows: int, groups: int, group: int | None, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * (group or 3))
    kept = torch.rand(shape, generator=generator) < 0.5
    drop = torch.randint(0, 3, shape, generator=generator).float()
    grow = torch.randint(-1, 3, shape, generator=generator).float()
    grow[grow < 0] = -math.inf
    new = exchange(kept, drop, grow, count, group)
    assert torch.equal(new, plain_exchange(kept, drop, grow, count, group))
    assert int(new.sum()) == int(kept.sum())
    if group is not None:
        assert torch.equal(new.view(-1, group).sum(1), kept.view(-1, group).sum(1))


def test_nothing_to_exchange() -> None:
    kept = torch.ones(2, 4, dtype=torch.bool)
    scores = torch.ones(2, 4)
    for mask in (kept, ~kept, torch.empty(0, 4, dtype=torch.bool)):
        for group in (None, 4):
            assert torch.equal(exchange(mask, scores[: len(mask)], scores[: len(mask)], 3, group), mask)


@pytest.mark.parametrize(
    ("pattern", "group"), [("2:4", 4), ("1:4", 4), ("3:4", 4), ("5:8", 8), ("4:8", 8), ("2:6", 6), (0.5, None)]
)
def test_the_pattern_of_a_mask(pattern: str | float, group: int | None) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, pattern)
    assert group_of(mask) == group
    if group is not None:
        mask[3, :20] = False  # a dense weight with zeros of its own
        assert group_of(mask) == group


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("4:8", 8), ("2:8", 8), ("1:4", 4), ("2:6", 6)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_pattern_of_a_sparse_weight_that_was_pruned_to_it(pattern: str, group: int, sparsity: float) -> None:
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0))
    weight *= magnitude_mask(weight, sparsity)
    assert group_of(weight != 0) is None
    assert group_of(magnitude_mask(weight, pattern, keep_zeros=True)) == group


def test_masks_without_a_pattern() -> None:
    for mask in (torch.ones(4, 8), torch.zeros(4, 8), torch.empty(0, 8)):
        assert group_of(mask.bool()) is None
    sparse = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) < 0.03
    assert group_of(sparse) is None
