"""Magnitude pruning: the weights of smallest |W| go (Han et al., NeurIPS 2015, arXiv 1506.02626, §3).

    S_ij = |W_ij|

N:M keeps the N largest of each M consecutive inputs; unstructured prunes the ⌊p·k⌋ smallest of the k weights of a
matrix, as the published baselines of Wanda and SparseGPT do it layer by layer. Scores are the bits of |W| read as an
integer, which orders finite numbers as their values do, without arithmetic that flushing denormals could change.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError
from spp.masks.patterns import Pattern, all_finite, as_array, magnitude_bits, nonzero_mask
from spp.masks.select import keep_groups, pruned_count

_LONGEST_COMPARED_GROUP = 32  # up to here comparing all pairs of a group is faster than sorting it
_SCORES = 1 << 18  # scores of a block: its slices and ranks stay in a core's cache
_DIGIT = 16  # bits of a score that one histogram counts


@torch.no_grad()
def magnitude_mask(weight: Tensor, pattern: str | float | Pattern, *, keep_zeros: bool = False) -> Tensor:
    """Return the mask that keeps the weights of largest magnitude.

    Args:
        weight: (m, n), or (E, m, n) for E experts, each pruned as a matrix of its own; floating point.
        pattern: "N:M" (kept of every M inputs), or the fraction pruned of each matrix.
        keep_zeros: of the zeros, which go first anyway, none is among those kept, so that a group keeps at most N. By
            default the published algorithm, which keeps as many entries of every group, zeros if need be.

    Returns:
        Bool of weight's shape, True where the weight is kept; of equal magnitudes the lower index stays.

    Raises:
        PatternError: the pattern makes no sense or its groups do not divide n.
        ConfigError: the weight is no floating-point matrix.
        NonFiniteError: the weight holds NaN or infinity.

    Example:
        >>> magnitude_mask(torch.tensor([[3.0, -2.0, 1.0, -4.0]]), "2:4")
        tensor([[ True, False, False,  True]])
    """
    parsed = Pattern.parse(pattern)
    shape = tuple(weight.shape)
    if weight.dim() not in (2, 3) or not weight.dtype.is_floating_point:
        raise ConfigError(f"the weight is {shape} {weight.dtype}; expected floating point, (m, n) or (E, m, n)")
    parsed.require_fit(shape[-1])
    if not all_finite(weight):
        raise NonFiniteError(f"the weight {shape} holds NaN or infinity; its magnitudes cannot be compared")
    if weight.numel() == 0:
        return torch.ones(shape, dtype=torch.bool, device=weight.device)
    if parsed.kept is not None and parsed.group is not None:
        mask = _keep_groups(weight, parsed.kept, parsed.group)
    else:
        matrices = weight if weight.dim() == 3 else weight[None]
        pruned = pruned_count(parsed.sparsity, matrices[0].numel())
        mask = torch.stack([_keep_of_all(matrix, pruned) for matrix in matrices]).view(shape)
    return mask.logical_and_(nonzero_mask(weight)) if keep_zeros else mask


def _keep_groups(weight: Tensor, kept: int, group: int) -> Tensor:
    """Keep the `kept` largest of every `group`; on a CPU by ranks that each pair of slices adds to."""
    if weight.device.type != "cpu" or group > _LONGEST_COMPARED_GROUP:
        return keep_groups(magnitude_bits(weight), kept, group)
    mask = torch.empty(weight.shape, dtype=torch.bool, device="cpu")
    out = as_array(mask.view(-1, group))
    groups = weight.detach().reshape(-1, group)  # (groups, M)
    step = max(1, _SCORES // group)
    for start in range(0, len(groups), step):
        slots = np.ascontiguousarray(as_array(magnitude_bits(groups[start : start + step])).T)  # (M, step)
        beaten = np.zeros(slots.shape, dtype=np.uint8)  # how many of its group beat a slot
        for high in range(1, group):
            for low in range(high):
                low_wins = slots[low] >= slots[high]  # an equal one wins from the lower index
                beaten[high] += low_wins
                beaten[low] += ~low_wins
        out[start : start + step] = (beaten < kept).T
    return mask


def _keep_of_all(matrix: Tensor, pruned: int) -> Tensor:
    """Prune exactly `pruned` of a matrix: all below a threshold, and of those equal to it the last ones."""
    if pruned == 0:
        return torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device)
    flat = matrix.detach().reshape(-1)
    threshold, last = _select(flat, pruned)
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    equal = []
    for start in range(0, flat.numel(), _SCORES):
        bits = magnitude_bits(flat[start : start + _SCORES])
        torch.ge(bits, threshold, out=mask[start : start + _SCORES])
        equal.append((bits == threshold).nonzero().view(-1) + start)
    ties = torch.cat(equal)
    mask[ties[ties.numel() - last :]] = False
    return mask.view(matrix.shape)


def _select(flat: Tensor, rank: int) -> tuple[int, int]:
    """Return the rank-th smallest score (from 1), and the rank that it has among those that equal it.

    By histograms of 16 bits at a time, highest first: a pass over 16-bit weights, two over 32-bit ones, and no sort.
    """
    threshold = 0
    width = 8 * flat.element_size()
    parts = [flat[start : start + _SCORES] for start in range(0, flat.numel(), _SCORES)]
    for shift in range(max(width - _DIGIT, 0), -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=flat.device)
        for part in parts:
            counts += torch.bincount(_digits(part, shift), minlength=1 << _DIGIT)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, rank))
        rank -= int(below[digit] - counts[digit])
        threshold |= digit << shift
        if shift:
            parts = [part[_digits(part, shift) == digit] for part in parts]
    return threshold, rank


def _digits(part: Tensor, shift: int) -> Tensor:
    bits = magnitude_bits(part)
    return (bits >> shift) & 0xFFFF if bits.element_size() > 2 else bits
