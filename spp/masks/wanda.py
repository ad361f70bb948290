"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, arXiv 2306.11695, §3).

    S_ij = |W_ij| · ‖X_j‖₂

W (m, n) is the weight, X (T, n) its calibration inputs, ‖X_j‖₂ the norm of feature j over all tokens. Scores are
compared within one output row: the ⌊p·n⌋ lowest of each row go, or all but the N highest of each M consecutive inputs.
Weights that stay are not changed. A dead feature (norm 0) scores 0 everywhere and goes first.

OWL: outlier-weighed layer-wise sparsity (Yin et al., ICML 2024, arXiv 2310.05175, §3). For block l with Wanda's scores
S_ij over all its pruned weights together and their mean S̄,

    D_l = share of (S_ij > M · S̄)                                   the layer-wise outlier distribution
    p_l = p − λ (2 (D_l − min D) / (max D − min D) − c)             c makes the mean of p_l be p

so a block with more outliers keeps more weights, and the fractions span 2 λ around the p that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError, PatternError
from spp.masks.patterns import Pattern
from spp.masks.select import checked_pattern, keep_by_rows, work_dtype, zeros_to_keep


@torch.no_grad()
def wanda_mask(
    weight: Tensor, input_norm: Tensor, pattern: str | float | Pattern, *, keep_zeros: bool = False
) -> Tensor:
    """Return the mask that Wanda gives a weight.

    Args:
        weight: (m, n).
        input_norm: (n,), ‖X_j‖₂ of the layer's inputs, on any common scale.
        pattern: "N:M" (kept of every M inputs), or the fraction pruned of each row.
        keep_zeros: zeros of the weight go first and are none of those kept, so that a group keeps at most N and a row
            that has more of them than it is to lose loses nothing else. By default the published algorithm, to which a
            zero is a weight like any other.

    Returns:
        Bool (m, n), True where the weight is kept; of equal scores the lower index stays.

    Raises:
        PatternError: the pattern makes no sense or does not divide n.
        ConfigError: shapes do not fit, or a norm is negative.
        NonFiniteError: the weight or the norm holds NaN or infinity.

    Example:
        >>> wanda_mask(torch.tensor([[3.0, 2.0, 1.0, 4.0]]), torch.tensor([1.0, 2.0, 9.0, 0.0]), "2:4")
        tensor([[False,  True,  True, False]])
    """
    parsed = checked_pattern(weight, pattern)
    return keep_by_rows(wanda_score(weight, input_norm), parsed, zeros_to_keep(weight, keep_zeros))


def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Return |W| · ‖X_j‖₂ (m, n) in float32 (float64 for a float64 weight).

    Raises:
        ConfigError: shapes do not fit, or a norm is negative.
        NonFiniteError: the norm holds NaN or infinity.
    """
    if input_norm.shape != weight.shape[1:]:
        raise ConfigError(f"input_norm is {tuple(input_norm.shape)}; the weight needs ({weight.shape[1]},)")
    if not torch.isfinite(input_norm).all():
        raise NonFiniteError("input_norm holds NaN or infinity")
    if (input_norm < 0).any():
        raise ConfigError("input_norm holds negative values; it must be a norm")
    dtype = work_dtype(weight)
    return weight.detach().to(dtype).abs() * input_norm.to(weight.device, dtype)


def outlier_share(scores: Iterable[Tensor], threshold: float) -> float:
    """Return D_l of a block from the scores S of its weights.

    Args:
        scores: (m, n) each, none negative.
        threshold: M.
    """
    scores = list(scores)
    count = sum(a.numel() for a in scores)
    mean = sum(float(a.double().sum()) for a in scores) / max(1, count)
    return sum(int((a > threshold * mean).sum()) for a in scores) / max(1, count)


def owl_fractions(outliers: Sequence[float], fraction: float, spread: float) -> list[float]:
    """Return p_l of each block, of mean `fraction`.

    Args:
        outliers: D_l of each block.
        fraction: p, the share to prune.
        spread: λ; 0, or blocks that do not differ, give every block p.

    Raises:
        PatternError: a block would be pruned of nothing, or of all; the message offers the largest spread that works.

    Example:
        >>> [round(s, 3) for s in owl_fractions([0.01, 0.02, 0.03], 0.7, 0.1)]
        [0.8, 0.7, 0.6]
    """
    low, high = min(outliers), max(outliers)
    relative = [(d - low) / (high - low) if high > low else 0.0 for d in outliers]
    mean = sum(relative) / len(relative)
    fractions = [fraction - 2 * spread * (r - mean) for r in relative]
    if not all(0 < f < 1 for f in fractions):
        room = min(fraction / (1 - mean) if mean < 1 else math.inf, (1 - fraction) / mean if mean > 0 else math.inf) / 2
        raise PatternError(
            f"OWL with spread {spread:g} around {fraction:g} gives block sparsities from {min(fractions):.3f} to "
            f"{max(fractions):.3f}; they must lie between 0 and 1: take a spread below {room:.3f}"
        )
    return fractions
