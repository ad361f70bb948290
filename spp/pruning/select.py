"""Which weights a score keeps: per group for N:M, per row for a count.

Higher is better; of equals the lower index is kept. Nothing here depends on the order in which a device
sorts: the same scores give the same mask everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.patterns import Pattern, all_finite

_LONGEST_COUNTED_GROUP = 16  # up to here comparing all pairs of a group is faster than sorting it
_CHUNK = 1 << 22  # scores looked at together


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
        return torch.stack(keep_slots(grouped.unbind(-1), kept), dim=-1).view(scores.shape)
    order = grouped.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :kept], True).view(scores.shape)


def keep_slots(slots: Sequence[Tensor], kept: int) -> list[Tensor]:
    """`keep_groups` where slot k holds the k-th score of every group: one mask a slot.

    A slot is kept if fewer than `kept` others of its group beat it; an equal one beats it from a lower index only.
    """
    beaten = [torch.zeros(slot.shape, dtype=torch.int8, device=slot.device) for slot in slots]
    for low in range(len(slots)):
        for high in range(low + 1, len(slots)):
            low_wins = slots[low] >= slots[high]
            beaten[high] += low_wins
            beaten[low] += low_wins.logical_not_()
    return [count < kept for count in beaten]


def keep_in_rows(scores: Tensor, pruned: int) -> Tensor:
    """Return a mask (m, n) that prunes exactly the `pruned` lowest scores of every row."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    step = max(1, _CHUNK // max(1, scores.shape[1]))
    for part, out in zip(scores.split(step), mask.split(step), strict=True):
        if pruned == 0 or part.numel() == 0:
            out.fill_(True)
            continue
        threshold = part.kthvalue(pruned, dim=1, keepdim=True).values  # (rows, 1)
        torch.gt(part, threshold, out=out)
        missing = scores.shape[1] - pruned - out.sum(dim=1)  # (rows,) equals kept too
        tied = missing.nonzero().squeeze(1)
        if tied.numel():
            equal = part[tied] == threshold[tied]
            out[tied] |= equal & (equal.cumsum(dim=1) <= missing[tied, None])
    return mask


def keep_of_all(scores: Tensor, pruned: int) -> Tensor:
    """Return a mask of scores' shape that prunes exactly the `pruned` lowest scores of the whole tensor."""
    return keep_in_rows(scores.reshape(1, -1), pruned).view(scores.shape)


def best_in_rows(scores: Tensor, count: int) -> Tensor:
    """Return the columns (m, count) of each row's `count` highest scores, best first, of equals the lower first."""
    kept = keep_in_rows(scores, scores.shape[1] - count)
    columns = kept.nonzero()[:, 1].view(scores.shape[0], count)  # ascending in each row
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)
