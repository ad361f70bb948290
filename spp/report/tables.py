"""Tables of results: sparsity, merges, pruning, exports and verdicts, as plain text or markdown.

A model has hundreds of projections, so a table groups them by the last parts of their names (`self_attn.q_proj`, …)
unless every one is asked for. Sparsity is a fraction, never a percentage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from spp.certifying.certificate import SparsityReport, TensorSparsity
    from spp.certifying.verify import Survival, Verification
    from spp.evaluation import TaskResults
    from spp.merging.report import LayerMerge, MergeReport
    from spp.packing.export import ExportReport
    from spp.pruning import PruneReport

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text.

    Args:
        title: the line above; may be empty.
        columns: the heads.
        rows: the cells of each row, one a column.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.

    Example:
        >>> print(Table("sizes", ("name", "size"), (("a", "1"), ("bb", "20"))).text())
        sizes
        name  size
        ----  ----
        a        1
        bb      20
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {self.title!r} has {len(row)} cells, not {len(self.columns)}: {row}")

    def numeric(self, column: int) -> bool:
        """Return whether every cell of a column begins like a number; such a column is set flush right."""
        return all(re.match(r"[-+−]?[\d.]|[–-]?$", row[column]) for row in self.rows)

    def text(self) -> str:
        """Return the table in aligned columns; no line ends in blanks."""
        widths = [max(len(line[i]) for line in (self.columns, *self.rows)) for i in range(len(self.columns))]
        aligned = [str.rjust if self.numeric(i) else str.ljust for i in range(len(self.columns))]
        lines = [self.columns, tuple("-" * width for width in widths), *self.rows]
        body = ["  ".join(f(c, w) for f, c, w in zip(aligned, line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *body] if self.title else body)

    def markdown(self) -> str:
        """Return the table in markdown, without its title."""
        rule = ["--:" if self.numeric(i) else "---" for i in range(len(self.columns))]
        return "\n".join("| " + " | ".join(line) + " |" for line in (self.columns, tuple(rule), *self.rows))


def kind_of(name: str) -> str:
    """Return the kind of a projection: its path behind the last number, without `.weight`.

    Args:
        name: a module path, or a key of a checkpoint.

    Example:
        >>> kind_of("model.layers.3.self_attn.q_proj.weight")
        'self_attn.q_proj'
    """
    return re.split(r"(?:^|\.)\d+\.", name.removesuffix(".weight"))[-1]


def sparsity_table(report: SparsityReport, *, every: bool = False) -> Table:
    """Return the zeros of a model's projections as a table.

    Args:
        report: of `spp.sparsity`, `spp.verify` or `spp.certify`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(sparsity_table(spp.sparsity("pruned")).text())  # doctest: +SKIP
    """
    if every:
        columns = ("tensor", "shape", "dtype", "zeros", "sparsity", "pattern")
        return Table("sparsity", columns, tuple(_tensor_row(name, t) for name, t in report.tensors.items()))
    rows = []
    for kind, group in _grouped(report.tensors).items():
        rows.append(
            (
                kind,
                str(len(group)),
                _joined("×".join(map(str, t.shape)) for t in group),
                _joined(t.dtype for t in group),
                _spread([t.sparsity for t in group], "{:.4f}".format),
                _joined(t.pattern for t in group),
            )
        )
    total = ("all", str(len(report.tensors)), "", "", f"{report.sparsity:.4f}", report.pattern)
    columns = ("projection", "tensors", "shape", "dtype", "sparsity", "pattern")
    return Table("sparsity", columns, (*rows, total))


def verdict_table(verification: Verification, *, every: bool = False) -> Table:
    """Return the findings of a verification as a table.

    The column verdict has "ok", or what is wrong; zeros, patterns and dtypes are those that were found. Tensors of
    which only the bytes were compared have a verdict alone.

    Args:
        verification: of `spp.certifying.verify.examine`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(verdict_table(examine("pruned", "merged")).text())  # doctest: +SKIP
    """
    name, against = verification.name, verification.against or "its certificate"
    general = [("", "", "", "", problem.what) for problem in verification.of("")]
    if every:
        rows = [
            (key, *(_found(facts) if facts else ("", "", "")), _verdict(verification, [key], every=True))
            for key, facts in verification.tensors.items()
        ]
        columns: tuple[str, ...] = ("tensor", "dtype", "sparsity", "pattern", "verdict")
        return Table(f"{name} against {against}", columns, (*rows, *general))
    groups: dict[str, list[str]] = {}
    for key, facts in verification.tensors.items():
        groups.setdefault(kind_of(key) if facts else "other", []).append(key)
    rows = []
    for kind, keys in groups.items():
        found = [facts for key in keys if (facts := verification.tensors[key]) is not None]
        sparsity = _spread([facts.sparsity for facts in found], "{:.4f}".format)
        pattern = _joined(facts.pattern for facts in found)
        rows.append((kind, str(len(keys)), sparsity, pattern, _verdict(verification, keys)))
    columns = ("projection", "tensors", "sparsity", "pattern", "verdict")
    return Table(f"{name} against {against}", columns, (*rows, *general))


def survival_table(verification: Verification, *, every: bool = False) -> Table:
    """Return what became of the zeros of the weights that are quantized as a table.

    Its columns are zeros: before; survived: of these; came back: the others, which the quantization has filled; more:
    weights that it rounded to zero. The last row is of all.

    Args:
        verification: of `spp.certifying.verify.examine`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(survival_table(examine("pruned", "quantized")).text())  # doctest: +SKIP
    """
    groups: dict[str, list[Survival]] = {}
    for key, one in verification.survival.items():
        groups.setdefault(key if every else kind_of(key), []).append(one)
    groups["all"] = list(verification.survival.values())
    rows = []
    for name, members in groups.items():
        zeros, survived = sum(one.zeros for one in members), sum(one.survived for one in members)
        counts = map(str, (len(members), zeros, survived, zeros - survived, sum(one.more for one in members)))
        rows.append((name, _joined(one.form for one in members), *counts))
    columns = ("quantized", "form", "tensors", "zeros", "survived", "came back", "more")
    return Table(f"zeros of {verification.against} in {verification.name}", columns, tuple(rows))


def _found(facts: TensorSparsity) -> tuple[str, str, str]:
    return facts.dtype, f"{facts.sparsity:.4f}", facts.pattern


def _verdict(verification: Verification, keys: Sequence[str], *, every: bool = False) -> str:
    bad = [key for key in keys if verification.of(key)]
    if not bad:
        return "ok"
    if every or len(keys) == 1:
        return "; ".join(problem.what for problem in verification.of(bad[0]))
    return f"{len(bad)} of {len(keys)} not as they should be"


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
    groups = {name: [layer] for name, layer in report.layers.items()} if every else _grouped(report.layers)
    rows = [_merge_row(name, layers) for name, layers in groups.items()]
    total = _merge_row("all", list(report.layers.values()))
    rows.append((*total[:4], _share(report.survived), total[5], total[6], _share(report.requantize_error, "–")))
    if any(layer.requantize_error is not None for layer in report.layers.values()):
        columns = (*columns, "lost", "error")
    return Table("merge", columns, tuple(row[: len(columns)] for row in rows))


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
    groups = {name: [layer] for name, layer in report.layers.items()} if every else _grouped(report.layers)
    everything = list(report.layers.values())
    rows: list[tuple[str, ...]] = []
    for name, layers in [*groups.items(), ("all", everything)]:
        errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
        rows.append(
            (
                name,
                str(len(layers)),
                _spread([layer.sparsity for layer in layers], "{:.4f}".format),
                _patterns([layer.pattern for layer in layers]),
                _spread(errors, "{:.4f}".format),
                f"{sum(layer.seconds for layer in layers):.1f}",
                _notes([layer.note for layer in layers]),
            )
        )
    rows[-1] = (*rows[-1][:2], f"{report.sparsity:.4f}", *rows[-1][3:])
    if not any(layer.note for layer in everything):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(f"pruned by {report.method} to {pattern_text(report.pattern)}", columns, tuple(rows))


def export_table(report: ExportReport, *, every: bool = False) -> Table:
    """Return the sizes of packed tensors, dense and packed, as a table.

    Args:
        report: of `spp.export_packed` or `spp.export_dense`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(export_table(spp.export_packed("pruned", "packed")).text())  # doctest: +SKIP
    """
    groups = {name: [t] for name, t in report.tensors.items()} if every else _grouped(report.tensors)
    rows = []
    for name, tensors in [*groups.items(), ("all", list(report.tensors.values()))]:
        dense, packed = sum(t.dense_bytes for t in tensors), sum(t.packed_bytes for t in tensors)
        sizes = (byte_text(dense), byte_text(packed), f"{packed / dense:.4f}")
        rows.append((name, str(len(tensors)), _joined(t.pattern for t in tensors), *sizes))
    return Table(
        "pruned weights, dense and packed",
        ("tensor", "tensors", "pattern", "dense", "packed", "packed / dense"),
        tuple(rows),
    )


def tasks_table(results: TaskResults, model: str = "") -> Table:
    """Return scores on tasks as a table, each with its standard error; the last row has the mean of `acc`.

    Args:
        results: of `spp.evaluation.tasks`.
        model: its name, for the title.

    Example:
        >>> print(tasks_table(tasks(model, tokenizer, "paper")).text())  # doctest: +SKIP
    """
    metrics = tuple(dict.fromkeys(metric for scores in results.scores.values() for metric in scores))
    rows = []
    for name, scores in results.scores.items():
        facts, errors = results.tasks[name], results.stderr.get(name, {})
        cells = [
            f"{scores[m]:.4f}" + (f" ± {errors[m]:.4f}" if m in errors else "") if m in scores else "–" for m in metrics
        ]
        shots = "–" if facts.num_fewshot is None else str(facts.num_fewshot)
        rows.append((name, shots, str(facts.items), facts.split or "", *cells))
    if results.mean is not None and len(results.scores) > 1:
        rows.append(("mean", "", "", "", *(f"{results.mean:.4f}" if m == "acc" else "" for m in metrics)))
    limit = f", the first {results.limit} documents of each task" if results.limit else ""
    source = f" from {results.data_dir}" if results.data_dir else ""
    columns = ("task", "examples", "documents", "split", *metrics)
    return Table(f"tasks{f' of {model}' if model else ''}{source}{limit}", columns, tuple(rows))


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


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural except for one.

    Args:
        count: how many.
        noun: in the singular.

    Example:
        >>> count_text(1, "window"), count_text(2, "window")
        ('1 window', '2 windows')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def byte_text(count: float) -> str:
    """Return a size in MiB or GiB.

    Args:
        count: bytes.

    Example:
        >>> byte_text(3 * 2**20)
        '3.0 MiB'
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def time_text(seconds: float) -> str:
    """Return a duration as a person would say it.

    Args:
        seconds: of the duration.

    Example:
        >>> time_text(12.34), time_text(245)
        ('12.3 s', '4 min 05 s')
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _tensor_row(name: str, tensor: TensorSparsity) -> tuple[str, ...]:
    shape = "×".join(map(str, tensor.shape))
    return name, shape, tensor.dtype, str(tensor.zeros), f"{tensor.sparsity:.4f}", tensor.pattern


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
    return _spread([value for value in values if value is not None], "{:.4f}".format) or none


def _patterns(patterns: Sequence[str]) -> str:
    """The different patterns; of more than three fractions the lowest and the highest."""
    found = dict.fromkeys(patterns)
    if len(found) > 3 and not any(":" in pattern for pattern in found):
        return _spread([float(pattern) for pattern in found], "{:.4f}".format)
    return ", ".join(found)


def _notes(notes: Sequence[str]) -> str:
    """Each note once, with how many layers have it where not all do."""
    counts = {note: notes.count(note) for note in notes if note}
    return "; ".join(note if count == len(notes) else f"{note} ({count})" for note, count in counts.items())


def _grouped(entries: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for name, entry in entries.items():
        groups.setdefault(kind_of(name), []).append(entry)
    return groups


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """One number, or `lowest … highest`; empty for no number."""
    if not values:
        return ""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} … {high}"
