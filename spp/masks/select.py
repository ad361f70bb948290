"""Which weights a score keeps: per group for N:M, per row for a count.

Higher is better; of equals the lower index is kept. Nothing here depends on the order in which a device
sorts: the same scores give the same mask everywhere.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.masks.patterns import Pattern, all_finite, nonzero_mask

_LONGEST_COUNTED_GROUP = 16  # up to here comparing all pairs of a group is faster than sorting it
_CHUNK = 1 << 22  # scores looked at together
_SAMPLE = 1 << 12  # scores of a long row that tell about where its k-th lowest is
_LONG = 1 << 16  # from here on that is faster than to select among all of them
_MARGIN = 3  # standard deviations of a quantile of the sample, to either side


def pruned_count(fraction: float, total: int) -> int:
    """Return ⌊fraction · total⌋ of the decimal number as written: 0.29 of 100 is 29, whatever 0.29 * 100 says."""
    return int(Fraction(repr(float(fraction))) * total)


def checked_pattern(weight: Tensor, pattern: str | float | Pattern) -> Pattern:
    """Return the parsed pattern of a weight that can be pruned: (m, n), floating point, finite, n in whole groups.

    Raises:
        PatternError: the pattern makes no sense, or its groups do not divide n.
        ConfigError: the weight is no floating-point matrix.
        NonFiniteError: the weight holds NaN or infinity.
    """
    parsed = Pattern.parse(pattern)
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        found = f"{tuple(weight.shape)} {weight.dtype}"
        raise ConfigError(f"the weight is {found}; expected a floating-point (m, n) matrix")
    parsed.require_fit(weight.shape[1])
    if not all_finite(weight):
        raise NonFiniteError("the weight holds NaN or infinity; a score of it would mean nothing")
    return parsed


def work_dtype(weight: Tensor) -> torch.dtype:
    """Return the type that scores are computed in: float32, or float64 for a float64 weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def zeros_to_keep(weight: Tensor, keep_zeros: bool) -> Tensor | None:
    """Return where a weight is zero, bool of its shape; None where that does not matter, or nothing is."""
    zeros = nonzero_mask(weight).logical_not_() if keep_zeros else None
    return zeros if zeros is not None and bool(zeros.any()) else None


def rank_last(scores: Tensor, zeros: Tensor) -> None:
    """Lower some scores, none of which is negative, below all others; a masked fill takes five times as long."""
    scores.add_(zeros, alpha=-torch.finfo(scores.dtype).max)


def keep_by_rows(scores: Tensor, pattern: Pattern, zeros: Tensor | None = None) -> Tensor:
    """Return a mask (m, n) that keeps the highest scores of every group, or of every row.

    Args:
        scores: (m, n), none negative; overwritten.
        pattern: "N:M", or the fraction pruned of each row.
        zeros: bool (m, n), weights that go before all others and are never kept, so that a group or a row with more
            of them than it is to lose keeps all the others.
    """
    if zeros is not None:
        rank_last(scores, zeros)
    if pattern.kept is not None and pattern.group is not None:
        mask = keep_groups(scores, pattern.kept, pattern.group)
    else:
        mask = keep_in_rows(scores, pruned_count(pattern.sparsity, scores.shape[1]))
    return mask if zeros is None else mask.logical_and_(~zeros)


def keep_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """Return a mask of scores' shape that keeps the `kept` highest of every `group` along the last dimension.

    Raises:
        PatternError: `group` does not divide the last dimension.
    """
    inputs = scores.shape[-1]
    if inputs % group:
        raise PatternError(f"groups of {group} do not divide {inputs} inputs")
    grouped = scores.reshape(*scores.shape[:-1], inputs // group, group)  # (…, n / M, M)
    if group <= _LONGEST_COUNTED_GROUP:
        slots = grouped.unbind(-1)
        beaten = [torch.zeros(slot.shape, dtype=torch.int8, device=slot.device) for slot in slots]
        for low in range(group):
            for high in range(low + 1, group):
                low_wins = slots[low] >= slots[high]  # an equal one wins from the lower index
                beaten[high] += low_wins
                beaten[low] += low_wins.logical_not_()
        return torch.stack([count < kept for count in beaten], dim=-1).view(scores.shape)
    order = grouped.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :kept], True).view(scores.shape)


def keep_slots(slots: Tensor, kept: int, out: Tensor) -> None:
    """Write into `out` the mask of `keep_groups` for one group in each column of `slots`; made for few columns.

    A matrix of ±1 adds up who beats whom: five small operations, where `keep_groups` does some for each pair.

    Args:
        slots: (M, k), whose row i holds the i-th score of every group.
        kept: N.
        out: bool (M, k).
    """
    if len(slots) > _LONGEST_COUNTED_GROUP:
        out.copy_(keep_groups(slots.T, kept, len(slots)).T)
        return
    low, high, beats, unbeaten = _pairs(len(slots), slots.dtype, slots.device)
    low_wins = (slots.index_select(0, low) >= slots.index_select(0, high)).to(slots.dtype)  # (pairs, k)
    torch.lt(torch.addmm(unbeaten, beats, low_wins), kept, out=out)


@functools.lru_cache(maxsize=16)
def _pairs(group: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the lower and the higher slot of each pair, and B (M, pairs) and b (M, 1).

    With 1 in x (pairs, k) where the lower slot wins, else 0, B x + b says how many of its group beat each slot.
    """
    low, high = torch.triu_indices(group, group, 1, device=device)  # (pairs,)
    pairs = torch.arange(len(low), device=device)
    beats = torch.zeros(group, len(low), dtype=dtype, device=device)
    beats[high, pairs] = 1
    beats[low, pairs] = -1
    return low, high, beats, torch.arange(group - 1, -1, -1, dtype=dtype, device=device)[:, None]


def keep_in_rows(scores: Tensor, pruned: int) -> Tensor:
    """Return a mask (m, n) that prunes exactly the `pruned` lowest scores of every row."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    step = max(1, _CHUNK // max(1, scores.shape[1]))
    for part, out in zip(scores.split(step), mask.split(step), strict=True):
        if pruned == 0 or part.numel() == 0:
            out.fill_(True)
            continue
        threshold = _kth_lowest(part, pruned)  # (rows, 1)
        torch.gt(part, threshold, out=out)
        missing = scores.shape[1] - pruned - torch.count_nonzero(out, dim=1)  # (rows,) equals kept too
        tied = missing.nonzero().squeeze(1)
        if tied.numel():
            equal = part[tied] == threshold[tied]
            out[tied] |= equal & (equal.cumsum(dim=1) <= missing[tied, None])
    return mask


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th lowest score (rows, 1) of every row.

    In a long row that is alone a sample says between which two scores it is; it is selected among those only.
    """
    rows, length = scores.shape
    if rows > 1 or length < _LONG or scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    row = scores[0]
    sample = row[:: length // _SAMPLE | 1].sort().values  # an odd step: groups and rows are even
    middle, margin = k / length * len(sample), _MARGIN * 0.5 * len(sample) ** 0.5
    first, last = int(middle - margin), int(middle + margin)
    low = float(sample[first]) if first > 0 else -math.inf
    high = float(sample[last]) if last < len(sample) else math.inf
    below = int(torch.count_nonzero(row < low))
    between = row[(row >= low) & (row <= high)]
    if not below < k <= below + len(between):  # the sample misled
        return scores.kthvalue(k, dim=1, keepdim=True).values
    return between.kthvalue(k - below).values.view(1, 1)


def keep_of_all(scores: Tensor, pruned: int) -> Tensor:
    """Return a mask of scores' shape that prunes exactly the `pruned` lowest scores of the whole tensor."""
    return keep_in_rows(scores.reshape(1, -1), pruned).view(scores.shape)


def best_in_rows(scores: Tensor, count: int) -> Tensor:
    """Return the columns (m, count) of each row's `count` highest scores, best first, of equals the lower first."""
    kept = keep_in_rows(scores, scores.shape[1] - count)
    columns = kept.nonzero()[:, 1].view(scores.shape[0], count)  # ascending in each row
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


# ---- Exchange some kept weights for pruned ones: sparsity, and N:M in every group, stay what they are.
#
#     unstructured    the c kept weights of the lowest drop score go, the c pruned ones of the highest grow score come
#     N:M             at most one pair a group, its worst kept for its best pruned; the c of the highest grow score
#
# Of equals the lower index (row-major) is kept, and is grown first.

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


def exchange(kept: Tensor, drop: Tensor, grow: Tensor, count: int, group: int | None = None) -> Tensor:
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
