"""DSnoT: a sparse mask refined without training (Zhang et al., ICLR 2024, arXiv 2310.08915, §3, algorithm 1).

For an output row W (n,) with mask M, the expected output error is what its pruned weights would have added:

    ε = Σ_{j pruned} W_j μ_j        μ_j = E[X_j],  σ²_j = Var[X_j]

One cycle grows the pruned weight that takes most off ε for its uncertainty, and prunes in exchange the least
important kept weight whose loss takes off ε too:

    grow   argmax sign(ε) W_j μ_j / σ²_j    over pruned j with sign(ε) W_j μ_j > 0
    prune  argmin |W_j| ‖X_j‖₂              over kept j with sign(ε) W_j μ_j < 0

A row is done after `max_cycles`, when |ε| ≤ `threshold`, before a cycle that would turn ε's sign, or when nothing is
left. For N:M both weights of a cycle must be of one group, so every group keeps its count; a grown weight whose group
has nothing to prune is passed over.

Since a grown weight is never pruned again, nor a pruned one grown (their signs exclude it), the t-th cycle takes the
t-th best of each list: two sorted lists and a running sum do all cycles of all rows at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spp.errors import ConfigError, MaskError, NonFiniteError
from spp.masks.patterns import Pattern, is_nm
from spp.masks.select import best_in_rows, checked_pattern, work_dtype
from spp.masks.stats import InputStats
from spp.masks.wanda import wanda_score

_CHUNK = 1 << 21  # weights whose rows are refined together


@torch.no_grad()
def dsnot(
    weight: Tensor,
    mask: Tensor,
    stats: InputStats,
    pattern: str | float | Pattern,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1,
) -> Tensor:
    """Return a mask that keeps as many weights of every row (N:M: of every group), other ones for less output error.

    Args:
        weight: (m, n), dense: what a mask prunes must still be there.
        mask: bool (m, n), True = kept, of any other method. A zero of the weight adds nothing to ε: no cycle grows it
            or prunes it.
        stats: of the layer's inputs, with mean and variance.
        pattern: the pattern that the mask has and keeps.
        max_cycles: exchanges in a row at most.
        threshold: |ε| at which a row is left alone.

    Returns:
        Bool (m, n), True = kept.

    Raises:
        PatternError: the pattern makes no sense or does not divide n.
        MaskError: the mask does not have the pattern.
        ConfigError: an option or a shape makes no sense.
        NonFiniteError: the weight or the statistics hold NaN or infinity.

    Example:
        >>> from spp.pruning import wanda_mask
        >>> x = torch.randn(64, 8) + 1
        >>> w = torch.randn(4, 8)
        >>> refined = dsnot(w, wanda_mask(w, x.norm(dim=0), "2:4"), InputStats.of(x), "2:4")
        >>> refined.sum(dim=1)
        tensor([4, 4, 4, 4])
    """
    parsed = checked_pattern(weight, pattern)
    _check(weight, mask, stats, parsed, max_cycles, threshold)
    dtype = work_dtype(weight)
    mean, certainty = stats.mean.to(weight.device, dtype), _certainty(stats).to(weight.device, dtype)
    refined = mask.clone()
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for w, part in zip(weight.detach().split(step), refined.split(step), strict=True):
        added = w.to(dtype) * mean  # (rows, n) W_j μ_j
        error = added.masked_fill(part, 0).sum(dim=1, keepdim=True)  # (rows, 1) ε
        toward = added * error.sign()
        can_grow, can_prune = (toward > 0) & ~part, (toward < 0) & part
        gain = (toward * certainty).masked_fill_(~can_grow, -torch.inf)
        loss = wanda_score(w, stats.norm).masked_fill_(~can_prune, torch.inf)
        if parsed.group is None:
            exchanges = min(max_cycles, w.shape[1])
            grown = best_in_rows(gain, exchanges)  # (rows, exchanges)
            pruned = loss.shape[1] - 1 - best_in_rows(-loss.flip(1), exchanges)  # lowest first, of equals the higher
        else:
            grown, pruned = _pairs_in_groups(gain, loss, parsed.group, max_cycles)
        possible = can_grow.gather(1, grown) & can_prune.gather(1, pruned)
        taken_off = toward.gather(1, grown) - toward.gather(1, pruned)
        taken = _cycles_taken(error.abs(), taken_off, possible, threshold)
        part.scatter_(1, grown, part.gather(1, grown) | taken)
        part.scatter_(1, pruned, part.gather(1, pruned) & ~taken)
    return refined


def _cycles_taken(error: Tensor, taken_off: Tensor, possible: Tensor, threshold: float) -> Tensor:
    """Return which cycles (rows, t) happen: all before the first that may not.

    Args:
        error: (rows, 1), |ε| at the start.
        taken_off: (rows, t), what each cycle takes off |ε|.
        possible: bool (rows, t), both of a cycle's weights exist.
        threshold: |ε| at which a row is left alone.
    """
    after = error - taken_off.masked_fill(~possible, 0).cumsum(dim=1)
    before = torch.cat([error, after[:, :-1]], dim=1)
    allowed = possible & (before > threshold) & (after > 0)
    return allowed.long().cumprod(dim=1).bool()


def _pairs_in_groups(gain: Tensor, loss: Tensor, group: int, max_cycles: int) -> tuple[Tensor, Tensor]:
    """Return grown and pruned columns (rows, cycles), both of one group: its k-th best with its k-th cheapest."""
    rows, n = gain.shape
    groups = n // group
    start = torch.arange(0, n, group, device=gain.device)[:, None]  # (groups, 1)
    best = gain.view(rows, groups, group).sort(dim=-1, descending=True, stable=True)
    cheapest = loss.view(rows, groups, group).flip(-1).sort(dim=-1, stable=True)
    pair_gain = best.values.masked_fill(torch.isinf(cheapest.values), -torch.inf).view(rows, n)
    chosen = best_in_rows(pair_gain, min(max_cycles, n))  # (rows, cycles)
    grown = (best.indices + start).view(rows, n).gather(1, chosen)
    pruned = (group - 1 - cheapest.indices + start).view(rows, n).gather(1, chosen)
    return grown, pruned


def _certainty(stats: InputStats) -> Tensor:
    """Return 1 / σ², where σ² is at least what float32 can tell from 0; a dead feature's mean is 0 anyway."""
    square = stats.norm.double().square() / stats.count
    floor = torch.where(square > 0, square * torch.finfo(torch.float32).eps, torch.ones_like(square))
    return 1 / torch.maximum(stats.var.double(), floor)


def _check(
    weight: Tensor, mask: Tensor, stats: InputStats, pattern: Pattern, max_cycles: int, threshold: float
) -> None:
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        found = f"{tuple(mask.shape)} {mask.dtype}"
        raise ConfigError(f"the mask is {found}; expected bool {tuple(weight.shape)}")
    if stats.mean.shape != weight.shape[1:]:
        found = f"{stats.mean.shape[0]} features"
        raise ConfigError(f"the statistics are of {found}; the weight has {weight.shape[1]}")
    if isinstance(max_cycles, bool) or not isinstance(max_cycles, int) or max_cycles < 1:
        raise ConfigError(f"max_cycles is {max_cycles!r}; it must be an int of at least 1")
    if not math.isfinite(threshold) or threshold < 0:
        raise ConfigError(f"threshold is {threshold!r}; it must be finite and at least 0 (0.1 is the paper's)")
    for name in ("mean", "var", "norm"):
        if not torch.isfinite(getattr(stats, name)).all():
            raise NonFiniteError(f"the statistics' {name} holds NaN or infinity")
    kept, group = pattern.kept, pattern.group
    if kept is not None and group is not None and not is_nm(mask, kept, group):
        raise MaskError(f"the mask that is to be refined is not {pattern}: a group keeps more than {kept}")
