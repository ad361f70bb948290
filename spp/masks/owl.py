"""OWL: outlier-weighed layer-wise sparsity (Yin et al., ICML 2024, arXiv 2310.05175, §3).

For block l with scores A_ij = |W_ij| · ‖X_j‖₂ over all its pruned weights together and their mean Ā,

    D_l = share of (A_ij > M · Ā)                                   the layer-wise outlier distribution
    S_l = S − λ (2 (D_l − min D) / (max D − min D) − c)             c makes the mean of S_l be S

so a block with more outliers keeps more weights, and the sparsities span 2 λ around the S that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from spp.errors import PatternError


def outlier_share(scores: Iterable[Tensor], threshold: float) -> float:
    """Return D_l of a block from the scores A of its weights.

    Args:
        scores: (m, n) each, none negative.
        threshold: M.
    """
    scores = list(scores)
    count = sum(a.numel() for a in scores)
    mean = sum(float(a.double().sum()) for a in scores) / max(1, count)
    return sum(int((a > threshold * mean).sum()) for a in scores) / max(1, count)


def owl_fractions(outliers: Sequence[float], fraction: float, spread: float) -> list[float]:
    """Return S_l of each block, of mean `fraction`.

    Args:
        outliers: D_l of each block.
        fraction: S, the share to prune.
        spread: λ; 0, or blocks that do not differ, give every block S.

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
