"""The report of a pruning: one entry a layer, and the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from spp.files.tables import Table, count_text, grouped, spread, time_text
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
class RegionReport:
    """The result of reconstructing one region of a block.

    Args:
        name: its path in the block; "" is the block itself.
        before: its error relative to the dense output, √(mean over tokens of ‖y − t‖² / ‖t‖²), on held-out windows.
        after: the same with the weights that it has now; never above `before`.
        trained: how many values were trained.
        steps: of the optimizer.
        seconds: the whole took.
        note: anything out of the ordinary, such as that it was rolled back; else "".
    """

    name: str
    before: float
    after: float
    trained: int
    steps: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class BlockReport:
    """The result of reconstructing one block.

    Args:
        regions: what was done to each of its regions, in the order of the forward; none of a block without targets.
    """

    regions: tuple[RegionReport, ...] = ()

    @property
    def before(self) -> float | None:
        """The mean of its regions' errors before; None without regions."""
        return sum(r.before for r in self.regions) / len(self.regions) if self.regions else None

    @property
    def after(self) -> float | None:
        """The mean of its regions' errors after; None without regions."""
        return sum(r.after for r in self.regions) / len(self.regions) if self.regions else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {"before": self.before, "after": self.after, "regions": [asdict(region) for region in self.regions]}


@dataclass(frozen=True)
class ReconstructionReport:
    """The result of `reconstruct`.

    Args:
        blocks: what was done to each decoder block, in order.
        windows: calibration windows used.
        held_out: how many of them the errors were measured on, and not trained on; 0: on all, which were trained on.
        seqlen: their length in tokens.
        options: the options by name.
        seconds: the whole took.
        bos: whether the windows were cut from text and begin with a BOS token.
    """

    blocks: tuple[BlockReport, ...]
    windows: int
    held_out: int
    seqlen: int
    options: Mapping[str, Any]
    seconds: float
    bos: bool = False

    @property
    def before(self) -> float:
        """The mean of the blocks' errors before."""
        return _mean([block.before for block in self.blocks])

    @property
    def after(self) -> float:
        """The mean of the blocks' errors after."""
        return _mean([block.after for block in self.blocks])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "blocks": [block.to_dict() for block in self.blocks],
            **{name: getattr(self, name) for name in ("windows", "held_out", "seqlen", "options", "seconds", "bos")},
        }


def _mean(errors: Sequence[float | None]) -> float:
    known = [error for error in errors if error is not None]
    return sum(known) / max(1, len(known))


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
        reconstruction: what the blocks were repaired by after they were pruned; None where they were not.
        bos: whether the windows were cut from text and begin with a BOS token.
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
    reconstruction: ReconstructionReport | None = None
    bos: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        values = asdict(self)
        values["reconstruction"] = None if self.reconstruction is None else self.reconstruction.to_dict()
        for layer in values["layers"].values():
            layer["shape"] = list(layer["shape"])
        return values

    def _repr_html_(self) -> str:
        """Return the table of the pruning, for notebooks."""
        return prune_table(self).html()


def prune_table(report: PruneReport, *, every: bool = False) -> Table:
    """Return the results of pruning as a table.

    Its columns are error: ‖(W − W_pruned) X‖ / ‖W X‖ on the calibration data, where there is any; seconds: without the
    forward passes; notes: where something was out of the ordinary.

    Args:
        report: of `spp.prune` or `spp.prune_checkpoint`.
        every: one row a layer instead of one a kind of layer.

    Example:
        >>> print(prune_table(spp.prune(model, "magnitude", "2:4")).text())  # doctest: +SKIP
    """
    columns: tuple[str, ...] = ("layer", "layers", "sparsity", "pattern", "error", "seconds", "notes")
    groups = {name: [layer] for name, layer in report.layers.items()} if every else grouped(report.layers)
    everything = list(report.layers.values())
    rows: list[tuple[str, ...]] = []
    for name, layers in [*groups.items(), ("all", everything)]:
        errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
        rows.append(
            (
                name,
                str(len(layers)),
                spread([layer.sparsity for layer in layers], "{:.4f}".format),
                _patterns([layer.pattern for layer in layers]),
                spread(errors, "{:.4f}".format),
                f"{sum(layer.seconds for layer in layers):.1f}",
                _notes([layer.note for layer in layers]),
            )
        )
    rows[-1] = (*rows[-1][:2], f"{report.sparsity:.4f}", *rows[-1][3:])
    if not any(layer.note for layer in everything):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(f"pruned by {report.method} to {pattern_text(report.pattern)}", columns, tuple(rows))


def reconstruction_table(report: ReconstructionReport) -> Table:
    """Return the errors of each region of each block before and after reconstruction as a table.

    Args:
        report: of `spp.reconstruct`, or the `reconstruction` of `spp.prune`'s.

    Example:
        >>> print(reconstruction_table(spp.reconstruct(model, dense, ids)).text())  # doctest: +SKIP
    """
    held = count_text(report.held_out, "held-out window") if report.held_out else "the windows that are trained on"
    rows = [
        (
            *(str(index), region.name or "block", f"{region.before:.4f}", f"{region.after:.4f}"),
            *(str(region.steps), f"{region.seconds:.1f}", region.note),
        )
        for index, block in enumerate(report.blocks)
        for region in block.regions
    ]
    columns = ("block", "region", "before", "after", "steps", "seconds", "notes")
    return Table(f"reconstructed: relative errors on {held}", columns, tuple(rows))


def prune_lines(report: PruneReport) -> list[str]:
    """Return the lines below a table of pruning: the data, the fate of zeros that were there before, the whole time.

    Args:
        report: of `spp.prune` or `spp.prune_checkpoint`.

    Example:
        >>> print(*prune_lines(report), sep="\\n")  # doctest: +SKIP
    """
    windows = count_text(report.windows, "window")
    drawn = f"{windows} of {report.seqlen} tokens from {report.calibration}, seed {report.seed}"
    before = "none"
    if report.sparsity_before:
        count = sum(layer.zeros_before for layer in report.layers.values())
        fate = "all kept" if report.keeps_zeros else "weights like any other to this method"
        before = f"{report.sparsity_before:.4f} of the weights ({count}), {fate}"
    if report.already_sparser:
        before += f"; {report.already_sparser} of {count_text(len(report.layers), 'layer')} had more than asked for"
    lines = []
    if report.owl is not None:
        options = ", ".join(f"{name} {value:g}" for name, value in report.owl.items())
        lines = [f"OWL: blocks with more outliers keep more weights ({options})"]
    if (done := report.reconstruction) is not None:
        where = count_text(done.held_out, "held-out window") if done.held_out else "all windows"
        lines.append(f"reconstruction: relative error {done.before:.4f} before, {done.after:.4f} after, on {where}")
    return [
        *lines,
        f"calibration: {drawn if report.windows else 'none'}",
        f"zeros before: {before}",
        f"time: {time_text(report.seconds)}{', with the forward passes' if report.windows else ''}",
    ]


def pattern_text(pattern: str | Mapping[str, str]) -> str:
    """Return a pattern, or patterns by name, as they are typed on the command line.

    Args:
        pattern: one for all layers, or {name: pattern}.

    Example:
        >>> pattern_text({"q_proj": "2:4", ".*": "0.5"})
        'q_proj=2:4, .*=0.5'
    """
    return pattern if isinstance(pattern, str) else ", ".join(f"{name}={value}" for name, value in pattern.items())


def _patterns(patterns: Sequence[str]) -> str:
    """The different patterns; of more than three fractions the lowest and the highest."""
    found = dict.fromkeys(patterns)
    if len(found) > 3 and not any(":" in pattern for pattern in found):
        return spread([float(pattern) for pattern in found], "{:.4f}".format)
    return ", ".join(found)


def _notes(notes: Sequence[str]) -> str:
    """Each note once, with how many layers have it where not all do."""
    counts = {note: notes.count(note) for note in notes if note}
    return "; ".join(note if count == len(notes) else f"{note} ({count})" for note, count in counts.items())
