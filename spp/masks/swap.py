"""Exchange some kept weights for pruned ones: sparsity, and N:M in every group, stay what they are.

    unstructured    the c kept weights of the lowest drop score go, the c pruned ones of the highest grow score come
    N:M             at most one pair a group, its worst kept for its best pruned; the c pairs of the highest grow score

Of equals the lower index (row-major) is kept, and is grown first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spp.masks.select import keep_of_all

LARGEST_GROUP = 32
FULL = 0.9  # of the groups of an N:M mask keep N; fewer where the dense weight had zeros of its own
CHANCE = 1e-9  # that a mask without a pattern would leave no group with more than N


def group_of(kept: Tensor) -> int | None:
    """Return M of the smallest N:M pattern that a mask (m, n) has, N any number below M; None for an unstructured one.

    It is N:M if no group keeps more than N, and nine tenths of what such groups can keep is kept. Where fewer are, as
    of a sparse weight that was pruned to N:M, it is the N:M that chance would leave least likely, if hardly ever:
    P(no group keeps more than N) = P(X ≤ N)^groups with X ~ Binomial(M, share that is kept).
    """
    m, n = kept.shape
    kept, total = kept.contiguous(), int(torch.count_nonzero(kept))
    least, likely = math.log(CHANCE), None
    for group in range(2, LARGEST_GROUP + 1):
        if n % group or not kept.numel():
            continue
        most = int(kept.view(m, n // group, group).sum(-1, dtype=torch.int16).max())
        if 0 < most < group:
            groups, share = m * (n // group), total / kept.numel()
            if total >= FULL * most * groups:
                return group
            at_most = sum(math.comb(group, k) * share**k * (1 - share) ** (group - k) for k in range(most + 1))
            if (chance := groups * math.log(at_most)) < least:
                least, likely = chance, group
    return likely


def swap(kept: Tensor, drop: Tensor, grow: Tensor, count: int, group: int | None = None) -> Tensor:
    """Return a mask with up to `count` pairs exchanged.

    Args:
        kept: bool (m, n), the mask.
        drop: (m, n); the lowest go. Read where `kept`.
        grow: (m, n); the highest come; −inf never does. Read where not `kept`.
        count: c; fewer where there are not so many candidates.
        group: M of an N:M mask, whose groups keep as many as they did; None exchanges over the whole matrix.
    """
    kept = kept.contiguous()
    new = kept.clone()
    if count < 1 or not kept.numel():
        return new
    drop, grow = drop.contiguous(), grow.contiguous()
    candidates = grow.masked_fill(kept, -math.inf)
    if group is None:
        going, coming = kept.view(-1).nonzero()[:, 0], (candidates.view(-1) > -math.inf).nonzero()[:, 0]
        count = min(count, len(going), len(coming))
        if count:
            flat = new.view(-1)
            flat[going] = keep_of_all(drop.view(-1)[going], count)
            flat[coming] = keep_of_all(grow.view(-1)[coming], len(coming) - count)
        return new
    low, worst = drop.masked_fill(~kept, math.inf).view(-1, group).flip(1).min(1)  # (groups,)
    high, best = candidates.view(-1, group).max(1)
    possible = (low < math.inf) & (high > -math.inf)
    gain = high.masked_fill(~possible, -math.inf)
    count = min(count, int(torch.count_nonzero(possible)))
    if count:
        chosen = keep_of_all(gain, len(gain) - count).nonzero()[:, 0]
        grouped = new.view(-1, group)
        grouped[chosen, group - 1 - worst[chosen]] = False
        grouped[chosen, best[chosen]] = True
    return new
