"""The report of a pruning: one entry a layer, and the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from spp.masks.patterns import Pattern


@dataclass(frozen=True)
class LayerReport:
    """The result of pruning one weight.

    Args:
        shape: (m, n), or (E, m, n) of a fused expert weight, whatever its storage.
        pattern: what was asked for: "2:4", or the fraction pruned.
        sparsity: share of zeros that the weight has now.
        sparsity_before: share of zeros that it had.
        relative_error: ‖X (W − Ŵ)ᵀ‖ / ‖X Wᵀ‖ on calibration inputs (SparseGPT: all, other methods: an even sample), or
            None without calibration.
        tokens: calibration tokens that reached the layer (a fused weight: its experts together).
        seconds: spent on choosing and writing its weights, without the forward passes.
        note: anything out of the ordinary, such as a fall-back; else "".
    """

    shape: tuple[int, ...]
    pattern: str
    sparsity: float
    sparsity_before: float
    relative_error: float | None
    tokens: int
    seconds: float
    note: str = ""

    @property
    def zeros_before(self) -> int:
        """The number of zeros that the weight had."""
        return round(self.sparsity_before * math.prod(self.shape))

    @property
    def was_sparser(self) -> bool:
        """Whether it had more zeros than were asked for; of N:M, and no group had more weights than N."""
        pattern = Pattern.parse(self.pattern)
        if pattern.kept is not None and pattern.group is not None:
            share, had = 1 - Fraction(pattern.kept, pattern.group), self.sparsity == self.sparsity_before
        else:
            share, had = Fraction(str(pattern)), True
        return had and self.zeros_before > share * math.prod(self.shape)


@dataclass(frozen=True)
class PruneReport:
    """The result of `prune`.

    Args:
        method: the method's name.
        pattern: the pattern, or {name: pattern}.
        layers: {module path: what was done}, in module order.
        sparsity: share of zeros in all pruned weights together.
        windows: calibration windows used; 0 without calibration.
        seqlen: their length in tokens.
        seed: with which they were drawn.
        calibration: where they are from: the path or id, "texts" or "token ids"; "" without calibration.
        owl: OWL's {"threshold", "spread"}; None where every block was pruned alike.
        sparsity_before: share of zeros that the weights together had before.
        keeps_zeros: whether these stayed zeros; else (SparseGPT, keep_zeros=False) they were weights like any other.
        seconds: the whole took.
        already_sparser: how many layers had more zeros than were asked for (N:M: in the right places).
    """

    method: str
    pattern: str | Mapping[str, str]
    layers: Mapping[str, LayerReport]
    sparsity: float
    windows: int
    seqlen: int
    seed: int
    calibration: str
    owl: Mapping[str, float] | None
    sparsity_before: float
    keeps_zeros: bool
    seconds: float
    already_sparser: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        values = asdict(self)
        for layer in values["layers"].values():
            layer["shape"] = list(layer["shape"])
        return values
