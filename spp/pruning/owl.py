"""OWL: outlier-weighed layer-wise sparsity (Yin et al., ICML 2024, arXiv 2310.05175, §3).

For block l with scores A_ij = |W_ij| · ‖X_j‖₂ over all its pruned weights together and their mean Ā,

    D_l = share of (A_ij > M · Ā)                                   the layer-wise outlier distribution
    S_l = S − λ (2 (D_l − min D) / (max D − min D) − c)             c makes the mean of S_l be S

so a block with more outliers keeps more weights, and the sparsities span 2 λ around the S that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spp.errors import ConfigError, PatternError


@dataclass(frozen=True)
class OWL:
    """The options of OWL.

    Args:
        threshold: M, how many times the mean a score must be above to be an outlier; the paper's 5.
        spread: λ, half the distance between the sparsest and the densest block; the paper's 0.08.

    Raises:
        ConfigError: an option makes no sense.
    """

    threshold: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not math.isfinite(self.threshold) or self.threshold <= 0:
            raise ConfigError(f"OWL's threshold is {self.threshold!r}; it must be a finite number above 0")
        if not _is_number(self.spread) or not 0 <= self.spread < 0.5:
            raise ConfigError(f"OWL's spread is {self.spread!r}; it must be in [0, 0.5)")


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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
