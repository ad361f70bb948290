"""The report of a merge, of the weights that are stored: rounded to their dtype, rescued, quantized again.

    survived          ⟨W_stored − W, ΔW⟩ / ⟨ΔW, ΔW⟩            ΔW what the adapter adds to W, exact
    requantize_error  ‖W_stored − W_merged‖ / ‖ΔW‖             W_merged what the forward multiplied by

A dense merge stores W_merged, so survived tells all of its loss. Quantizing again adds an error that may be orthogonal
to ΔW, which survived does not see: at 1, what is stored is as far from W_merged as the base was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from spp.certifying.certificate import SparsityReport
from spp.errors import SPPWarning, arg
from spp.files.tables import Table, grouped, spread
from spp.rules.adapter import no_update_text, rounded_away_text
from spp.weights.base_values import UNSAID, BaseVerdict

ENOUGH_SURVIVED = 0.9
# Near where training stopped an error in the weights costs its square, and the update gained its own square: an error
# whose square is a tenth of the update's takes about a tenth of the gain, as much as a survived share of 0.9 does.
MOST_ERROR = math.sqrt(1 - ENOUGH_SURVIVED)


@dataclass(frozen=True)
class LayerMerge:
    """The merge of one layer, by its weights as they are stored.

    Counts are exact. Sums are of float32 products: of updates below 1e-19, whose squares are no float32, they tell
    nothing, nor does `max_relative_change` of denormal weights in a process that flushes those to zero.

    Attributes:
        kept: weights that are not zero.
        rescued: of these, how many rounded to zero and were stored as the smallest magnitude that stays one.
        survived: ⟨W_stored − W, ΔW⟩ / ⟨ΔW, ΔW⟩, the share of the update that is stored; 0 where no weight is stored
            otherwise than without the adapter, None where the update is zero: there is nothing to survive.
        max_relative_change: the largest |W_stored − W| / |W| over the weights that were kept before.
        update_norm: ‖ΔW‖, Frobenius.
        updated: weights whose update is not zero.
        moved: of these, how many are stored otherwise than without the adapter.
        lost: kept weights that quantizing the result again rounded to zero; `kept` does not count them.
        requantize_error: ‖W_stored − W_merged‖ / ‖ΔW‖; None where nothing was quantized again, or the update is zero.
    """

    kept: int
    rescued: int
    survived: float | None
    max_relative_change: float
    update_norm: float
    updated: int
    moved: int
    lost: int = 0
    requantize_error: float | None = None


def survived_share(inner: float, square: float, updated: int, moved: int) -> float | None:
    """Return the share of an update that survived, of sums and counts over its weights."""
    if not updated:
        return None
    if not moved:
        return 0.0
    # Squares may be too small or too large for the arithmetic, of weights that moved.
    return inner / square if 0 < square < math.inf and math.isfinite(inner) else 1.0


def sum_layers(layers: Sequence[LayerMerge]) -> LayerMerge:
    """Return what was done to several layers, or to a fused weight of each expert's."""
    square = sum(layer.update_norm**2 for layer in layers)
    updated, moved = sum(layer.updated for layer in layers), sum(layer.moved for layer in layers)
    inner = sum(layer.survived * layer.update_norm**2 for layer in layers if layer.survived is not None)
    errors = [layer.requantize_error * layer.update_norm for layer in layers if layer.requantize_error is not None]
    return LayerMerge(
        kept=sum(layer.kept for layer in layers),
        rescued=sum(layer.rescued for layer in layers),
        survived=survived_share(inner, square, updated, moved),
        max_relative_change=max((layer.max_relative_change for layer in layers), default=0.0),
        update_norm=math.sqrt(square),
        updated=updated,
        moved=moved,
        lost=sum(layer.lost for layer in layers),
        requantize_error=math.hypot(*errors) / math.sqrt(square) if errors and square else None,
    )


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The effect of a merge: on each layer, over all layers, and the sparsity of the result.

    Args:
        layers: {module path: the effect on it}.
        survived: the share of the update that is stored; None where no layer has an update, layers without one do not
            count.
        sparsity_report: of the merged weights.
        base: whether the base had the values that the adapter was trained on (spp.weights.base_values).
        also: {parameter name: the largest change of a value, as stored} of what trained beside the adapter.
    """

    layers: dict[str, LayerMerge]
    survived: float | None
    sparsity_report: SparsityReport
    base: BaseVerdict = UNSAID
    also: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_layers(
        cls,
        layers: dict[str, LayerMerge],
        sparsity_report: SparsityReport,
        *,
        idle: str | None = None,
        requantized: bool = False,
        also: Mapping[str, float] | None = None,
    ) -> MergeReport:
        """Sum the layers up, and warn where what is stored is not what the adapter learned.

        Args:
            idle: why the adapter has no update, where that is known.
            requantized: whether weights were quantized again.
            also: what trained beside the adapter, and how far it moved.
        """
        also = also or {}
        total = sum_layers(list(layers.values()))
        moved = total.moved or not any(also.values())  # an adapter may do no more than train norms
        text = _warning(total, idle, requantized) if layers and moved else None
        if text is not None:
            warnings.warn(SPPWarning(text), stacklevel=4)
        return cls(layers, total.survived, sparsity_report, also=also)

    def __repr__(self) -> str:
        survived = "no update" if self.survived is None else f"survived {self.survived:.4f}"
        error = "" if self.requantize_error is None else f", requantize error {self.requantize_error:.4f}"
        found = f"{len(self.layers)} layers, {survived}{error}, rescued {self.rescued}"
        return f"MergeReport({found}, pattern {self.sparsity_report.pattern})"

    @property
    def kept(self) -> int:
        """Weights that are not zero, over all merged layers."""
        return sum(layer.kept for layer in self.layers.values())

    @property
    def rescued(self) -> int:
        """Kept weights that would have rounded to zero, over all merged layers."""
        return sum(layer.rescued for layer in self.layers.values())

    @property
    def lost(self) -> int:
        """Kept weights that quantizing again rounded to zero, over all merged layers."""
        return sum(layer.lost for layer in self.layers.values())

    @property
    def moved(self) -> int:
        """Weights that are stored otherwise than without the adapter; 0 for one that changes nothing."""
        return sum(layer.moved for layer in self.layers.values())

    @property
    def also_line(self) -> str | None:
        """A sentence on what trained beside the adapter; None where nothing did."""
        if not self.also:
            return None
        most = max(self.also, key=lambda name: self.also[name])
        return f"also trained: {len(self.also)} parameters; the largest change is {self.also[most]:.4g}, in {most}"

    @property
    def requantize_error(self) -> float | None:
        """‖W_stored − W_merged‖ / ‖ΔW‖ over all layers; None where none was quantized again, or has an update."""
        return sum_layers(list(self.layers.values())).requantize_error

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "layers": {path: asdict(layer) for path, layer in self.layers.items()},
            "survived": self.survived,
            "kept": self.kept,
            "rescued": self.rescued,
            "lost": self.lost,
            "moved": self.moved,
            "requantize_error": self.requantize_error,
            "also_trained": dict(self.also),
            **self.base.to_dict(),
            "sparsity_report": self.sparsity_report.to_dict(),
        }

    def _repr_html_(self) -> str:
        """Return the table of the merge, for notebooks."""
        return merge_table(self).html()


def merge_table(report: MergeReport, *, every: bool = False) -> Table:
    """Return the changes that a merge made to the weights as a table.

    Its columns are kept: non-zero weights; rescued: those that rounding would have turned to zero; survived: the share
    of the update that is stored, "no update" where there is none; largest change: of a weight, relative to it. Where
    weights were quantized again, lost: those that this turned to zero; error: of the stored values, relative to the
    update.

    Args:
        report: of `spp.merge` or `spp.merge_checkpoint`.
        every: one row a layer instead of one a kind of layer.

    Example:
        >>> print(merge_table(spp.merge(model)).text())  # doctest: +SKIP
    """
    columns: tuple[str, ...] = ("layer", "layers", "kept", "rescued", "survived", "largest change")
    groups = {name: [layer] for name, layer in report.layers.items()} if every else grouped(report.layers)
    rows = [_merge_row(name, layers) for name, layers in groups.items()]
    total = _merge_row("all", list(report.layers.values()))
    rows.append((*total[:4], _share(report.survived), total[5], total[6], _share(report.requantize_error, "–")))
    if any(layer.requantize_error is not None for layer in report.layers.values()):
        columns = (*columns, "lost", "error")
    return Table("merge", columns, tuple(row[: len(columns)] for row in rows))


def _merge_row(name: str, layers: Sequence[LayerMerge]) -> tuple[str, ...]:
    return (
        name,
        str(len(layers)),
        str(sum(layer.kept for layer in layers)),
        str(sum(layer.rescued for layer in layers)),
        _shares([layer.survived for layer in layers], "no update"),
        f"{max((layer.max_relative_change for layer in layers), default=0.0):.3f}",
        str(sum(layer.lost for layer in layers)),
        _shares([layer.requantize_error for layer in layers], "–"),
    )


def _share(value: float | None, none: str = "no update") -> str:
    return none if value is None else f"{value:.4f}"


def _shares(values: Sequence[float | None], none: str) -> str:
    """The lowest and the highest of those that are there."""
    return spread([value for value in values if value is not None], "{:.4f}".format) or none


def _warning(total: LayerMerge, idle: str | None, requantized: bool) -> str | None:
    """Return what is to be said of a merge; None where the update is stored."""
    survived, error = total.survived, total.requantize_error
    if survived is None:
        return no_update_text(idle)
    ways = _ways_out(requantized)
    if not total.moved:
        return f"{rounded_away_text()}. {ways}"
    if requantized and (survived < ENOUGH_SURVIVED or (error is not None and error > MOST_ERROR)):
        return (
            f"quantizing the merged weights again left {survived:.1%} of the update that the adapter learned "
            f"(survived), and what is stored differs from the merged weights by {error or 0.0:.2f} times the update's "
            f"norm (below {MOST_ERROR:.2f} costs little, at 1 the base was as near): the steps of the quantized form "
            f"are too coarse for the update. {ways}"
        )
    if survived < ENOUGH_SURVIVED:
        return (
            f"rounding to the stored dtype left {survived:.1%} of the update that the adapter learned (survived): its "
            f"changes are smaller than the dtype's steps. {ways}"
        )
    return None


def _ways_out(requantized: bool) -> str:
    if requantized:
        return (
            "Merge without requantize, which stores dense weights, or keep the adapter unmerged on the quantized model"
        )
    return (
        f"Merge with {arg('dtype', torch.float32)} or {arg('dtype', torch.float16)}, with "
        f"{arg('rounding', 'stochastic')}, or serve the adapter unmerged"
    )
