"""Better masks by optimal exchanges: row by row, the kept and the pruned weight whose exchange lowers the error most.

With e = w ⊙ mask − w the change that a mask makes to a row w (n), and c = e H, the row's error is e H eᵀ. To prune the
kept q and to keep the pruned p changes e by −w_q at q and by +w_p at p, and so the error by

    Δ_qp = s_q + s_p − 2 w_q w_p H_qp        s_q = w_q² H_qq − 2 w_q c_q        s_p = w_p² H_pp + 2 w_p c_p

The lowest Δ of a row is exchanged as long as it is below 0, so no exchange makes a row worse (the exchange step of
*SparseSwaps*, arXiv 2512.10922). Rows do not depend on each other; all run together. N:M exchanges stay inside a group;
all its pairs are looked at (in groups of more than 8 the pair of the lowest s_q and s_p). Unstructured ones look at all
pairs of the 32 lowest s_q and the 32 lowest s_p of the row. How many weights a row, or a group, keeps does not change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spp.configs.pattern import Pattern
from spp.errors import ConfigError, PatternError
from spp.masks.least_squares import check_operands, row_errors
from spp.masks.select import work_dtype

_BLOCK = 1 << 17  # weights whose rows run together: what an iteration reads stays in a core's cache
_CANDIDATES = 32  # of each kind in a row, for unstructured masks
_ALL_PAIRS = 8  # of groups up to here all pairs are looked at
MAX_SWAPS = 32


@torch.no_grad()
def swap(
    weight: Tensor, hessian: Tensor, mask: Tensor, pattern: str | float | Pattern, *, max_swaps: int = MAX_SWAPS
) -> Tensor:
    """Return a mask of the same pattern whose layer error is lower, or the same mask where no exchange helps.

    Args:
        weight: the dense weight (m, n); not changed. A pruned weight that is zero is never exchanged for a kept one.
        hessian: (n, n), XᵀX of the layer's inputs, undamped.
        mask: bool (m, n), True = kept.
        pattern: that of the mask: "N:M" exchanges inside the groups of M inputs, a fraction inside each row.
        max_swaps: exchanges a row at most.

    Returns:
        Bool (m, n). No row's error tr(… H …) is above that of `mask`.

    Raises:
        PatternError: the pattern makes no sense or does not divide n, or a group of the mask keeps more than N.
        ConfigError: a shape or an option makes no sense.
        NonFiniteError: the weight or the Hessian holds NaN or infinity.

    Example:
        >>> x, w = torch.randn(64, 8), torch.randn(4, 8)
        >>> mask = torch.tensor([True, False]).repeat(4, 4)
        >>> better = swap(w, x.T @ x, mask, "2:4")
        >>> bool((x @ (w * better - w).T).norm() <= (x @ (w * mask - w).T).norm())
        True
    """
    check_operands(weight, hessian, mask)
    if isinstance(max_swaps, bool) or not isinstance(max_swaps, int) or max_swaps < 0:
        raise ConfigError(f"max_swaps is {max_swaps!r}; it must be an int of at least 0")
    parsed = Pattern.parse(pattern)
    parsed.require_fit(weight.shape[1])
    group = parsed.group
    if parsed.kept is not None and group is not None:
        most = int(mask.reshape(-1, group).sum(1).max()) if mask.numel() else 0
        if most > parsed.kept:
            raise PatternError(
                f"a group of the mask keeps {most} of {group} weights; pattern {parsed} keeps {parsed.kept}"
            )
    dtype = work_dtype(weight)
    gram = hessian.to(weight.device, dtype)
    new = mask.clone()
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        target, kept = weight[part].to(dtype), mask[part]
        found = _Rows(target, kept, gram, group).exchanged(max_swaps)
        worse = row_errors(target.masked_fill(~found, 0) - target, gram) > _errors(target, kept, gram)
        new[part] = torch.where(worse[:, None], kept, found)
    return new


def _errors(target: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    return row_errors(target.masked_fill(~kept, 0) - target, gram)


class _Rows:
    """Some rows of a weight while their mask changes.

    Attributes:
        alone: (rows, n), s of every weight.
        linear: (rows, n), what c is multiplied by in s: −2 w where kept, 2 w where pruned.
        never: bool (rows, n), pruned weights that are zero.
    """

    def __init__(self, weight: Tensor, kept: Tensor, gram: Tensor, group: int | None) -> None:
        self.weight, self.kept, self.gram, self.group = weight, kept.clone(), gram, group
        self.c = (weight.masked_fill(~kept, 0) - weight) @ gram
        self.square = weight.square() * gram.diagonal()
        self.linear = torch.where(kept, -2 * weight, 2 * weight)
        self.never = ~kept & (weight == 0)
        if group is not None and group <= _ALL_PAIRS:
            self._pair_up(group)

    def _pair_up(self, group: int) -> None:
        """Prepare the pairs of a group: (low slot, high slot), and for each −2 w_q w_p H_qp, infinite for no pair."""
        rows, n = self.weight.shape
        low, high = torch.triu_indices(group, group, 1, device=self.weight.device)
        self.low, self.high = low, high  # (pairs,)
        slots = torch.arange(n, device=self.weight.device).view(-1, group)  # (groups, M)
        inner = self.gram[slots[:, low], slots[:, high]]  # (groups, pairs)
        grouped = self.weight.view(rows, -1, group)
        self.between = grouped[..., low].mul_(grouped[..., high]).mul_(inner).mul_(-2)  # (rows, groups, pairs)
        kept, never = (t.view(rows, -1, group) for t in (self.kept, self.never))
        self.fixed = torch.where(self._no_pair(kept, never), math.inf, self.between)

    def _no_pair(self, kept: Tensor, never: Tensor) -> Tensor:
        """Return which pairs (…, pairs) of groups (…, M) cannot be exchanged."""
        return (kept[..., self.low] == kept[..., self.high]) | never[..., self.low] | never[..., self.high]

    def exchanged(self, most: int) -> Tensor:
        """Return the mask after as many exchanges a row as help, `most` at most."""
        for _ in range(most):
            alone = torch.addcmul(self.square, self.linear, self.c)
            gain, first, second = self._best(alone)
            rows = (gain < 0).nonzero()[:, 0]
            if not len(rows):
                break
            for column in (first[rows], second[rows]):
                self._flip(rows, column)
            if self.group is not None and self.group <= _ALL_PAIRS:
                groups = first[rows] // self.group
                kept, never = (t.view(len(t), -1, self.group)[rows, groups] for t in (self.kept, self.never))
                off = self._no_pair(kept, never)
                self.fixed[rows, groups] = torch.where(off, math.inf, self.between[rows, groups])
        return self.kept

    def _best(self, alone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's lowest Δ, and the two weights (rows,) that it exchanges."""
        if self.group is None:
            return self._best_of_row(alone)
        if self.group > _ALL_PAIRS:
            return self._best_of_groups(alone, self.group)
        grouped = alone.view(len(alone), -1, self.group)
        change = self.fixed + grouped[..., self.low]
        change += grouped[..., self.high]
        gain, index = change.flatten(1).min(1)
        start = index // len(self.low) * self.group
        pair = index % len(self.low)
        return gain, start + self.low[pair], start + self.high[pair]

    def _best_of_groups(self, alone: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        going, q = alone.masked_fill(~self.kept, math.inf).view(len(alone), -1, group).min(-1)  # (rows, groups)
        coming, p = alone.masked_fill(self.kept | self.never, math.inf).view(len(alone), -1, group).min(-1)
        start = torch.arange(q.shape[1], device=q.device) * group
        q, p = q + start, p + start
        between = self.weight.gather(1, q) * self.weight.gather(1, p) * self.gram[q, p]
        gain, index = (going + coming - 2 * between).min(1)
        return gain, q.gather(1, index[:, None])[:, 0], p.gather(1, index[:, None])[:, 0]

    def _best_of_row(self, alone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = min(_CANDIDATES, alone.shape[1])
        going, q = alone.masked_fill(~self.kept, math.inf).topk(count, 1, largest=False)  # (rows, count)
        coming, p = alone.masked_fill(self.kept | self.never, math.inf).topk(count, 1, largest=False)
        between = self.gram[q[:, :, None], p[:, None, :]]  # (rows, count, count)
        between = between * self.weight.gather(1, q)[:, :, None] * self.weight.gather(1, p)[:, None, :]
        change = going[:, :, None] + coming[:, None, :] - 2 * between
        gain, index = change.flatten(1).min(1)
        first, second = index // count, index % count
        return gain, q.gather(1, first[:, None])[:, 0], p.gather(1, second[:, None])[:, 0]

    def _flip(self, rows: Tensor, columns: Tensor) -> None:
        value, kept = self.weight[rows, columns], self.kept[rows, columns]
        self.kept[rows, columns] = ~kept
        change = torch.where(kept, -value, value)
        self.linear[rows, columns] = torch.where(kept, 2 * value, -2 * value)
        self.c[rows] += change[:, None] * self.gram[columns]
