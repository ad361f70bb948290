"""One page of runs, checkpoints and results: what was done, what came out, and whether it holds.

Everything that comes from files is text on it: `escaped`, or in a Table. It has no scripts and needs no network.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from spp._version import __version__
from spp.certifying.certificate import make_report, sparsity_table
from spp.certifying.verify import PRUNED_FROM
from spp.configs.checkpoints import ReportConfig
from spp.errors import DataError, SPPError
from spp.files import atomic_file, check_target
from spp.files.provenance import Provenance
from spp.files.recognised import PAGE, PAGE_MARK
from spp.files.tables import Table, byte_text, count_text, escaped, fields_table, time_text
from spp.merging.report import LayerMerge, MergeReport, merge_table
from spp.pruning.report import LayerReport, PruneReport, prune_lines, prune_table
from spp.report.contents import NOT_MEASURED, RunReport, commands, recipe_of
from spp.report.measured import Key, columns_of, is_number
from spp.report.plot import Cell, panels_of, report_cells
from spp.report.runs import Changes, Sources, Zeros, is_directory, read_sources
from spp.report.svg import STYLE, Line, chart_style, heat_map, line_chart

Made = TypeVar("Made")
_LONG = ("scores", "tasks", "stderr", "versions", "layers")  # parts of a result that have a table of their own


def html_report(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dense: str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 48,
    verify: bool = True,
    device: str = "cpu",
    overwrite: bool = False,
) -> RunReport:
    """Make one page of runs, checkpoints and results, and write it as a self-contained HTML file.

    Args:
        runs: run directories of spp tune, checkpoints, directories of spp compare, folders that hold these, and JSON
            files that commands wrote; or a single one.
        out: the file; None writes none.
        dense: the dense model, as the results name it, or its directory; a model that is measured and has no zeros is
            one too. Needed for answers of it.
        prompts: file of prompts, one a line, or JSON Lines with a field prompt: the models answer them now, greedily,
            which loads one after the other. None generates nothing.
        max_new_tokens: of an answer.
        verify: read weights: verify certificates, and measure what adapters change. False says that it was not done.
        device: where models answer, "cpu" or "cuda".
        overwrite: replace an earlier report.

    Returns:
        The contents: `results()`, `to_dict()`.

    Raises:
        CheckpointError: a directory is missing, is none of spp or was written by another version; or a model that is to
            answer cannot be loaded.
        DataError: a file is no result of spp, or there is no prompt.
        OutputError: `out` exists, or cannot be written.
        ConfigError: an option makes no sense.

    Example:
        >>> html_report(["run", "merged", "dense.json"], "report.html", dense="MODEL").notes  # doctest: +SKIP
        []
    """
    from spp.report.weights import read_prompts, zeros_of  # which loads what trains and merges

    named = (runs,) if isinstance(runs, (str, os.PathLike)) else tuple(runs)
    told = ReportConfig(
        runs=tuple(os.fspath(name) for name in named),
        dense=None if dense is None else os.fspath(dense),
        prompts=None if prompts is None else Path(prompts),
        max_new_tokens=max_new_tokens,
        device=device,
    )
    asked = read_prompts(told.prompts) if told.prompts is not None else []
    if out is not None:
        check_target(out, overwrite=overwrite, kind=PAGE)
    sources = read_sources(told.runs, told.dense)
    _check(sources)
    zeros = {path: zeros_of(one, verify=verify) for path, one in sources.checkpoints.items()}
    notes = [f"{run.name}: {problem}" for run in sources.runs for problem in run.problems]
    notes += [f"{one.name}: {one.verdict}" for one in zeros.values() if one.holds is False]
    changes = _measured_changes(sources, notes, verify=verify)
    report = RunReport(sources, columns_of(sources.measured), zeros, changes, asked, {}, notes)
    if asked:
        report.answers.update(_given_answers(report, max_new_tokens, device))
        if not report.answers:
            notes.append("no model answered: a directory of none is here")
    if not any(report.recovered(column, key) is not None for column in report.columns for key in sources.models):
        notes.append(
            "what was recovered is not known: it needs the dense, the pruned and the tuned model, measured on one text "
            "in one window; spp eval MODEL --json measures one"
        )
    if out is not None:
        with atomic_file(out, overwrite=overwrite, kind=PAGE) as temporary:
            temporary.write_text(html_page(report), encoding="utf-8")
    return report


def _check(sources: Sources) -> None:
    """Raise a DataError for the report of a command that has not what its table needs."""
    makers: list[tuple[list[tuple[str, dict[str, Any]]], Callable[[str, dict[str, Any]], Any]]] = [
        (sources.prunings, lambda name, values: (_pruned(name, values), commands(Sources(prunings=[(name, values)])))),
        (sources.merges, lambda name, values: merge_table(_merge(values))),
        (sources.comparisons, _comparison),
    ]
    for found, make in makers:
        for name, values in found:
            try:
                make(name, values)
            except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
                told = f"{type(error).__name__}: {error}"
                raise DataError(f"{name} is damaged, or was written by another version of spp: {told}") from error


def _measured_changes(sources: Sources, notes: list[str], *, verify: bool) -> list[Changes]:
    """Return what the adapters of runs change; a note says why one is left out."""
    from spp.report.weights import changes_of

    found = []
    for run in sources.runs:
        base = Path(sources.models[run.after].path)
        if run.adapter is None:
            continue
        if not verify or not is_directory(base):
            why = "no weights were read" if not verify else f"its base {base} is not there"
            notes.append(f"{run.name}: what the adapter changes is not measured: {why}")
            continue
        try:
            found.append(changes_of(run.name, base, run.adapter))
        except SPPError as error:
            notes.append(f"{run.name}: what the adapter changes is not measured: {error}")
    return found


def _given_answers(report: RunReport, most: int, device: str) -> dict[Key, list[str]]:
    """Let the models answer that are there: of one that was tuned and merged, the tuned one."""
    from spp.report.weights import answers_of

    tuned = {run.before for run in report.sources.runs if run.adapter is not None}
    found = {}
    for stage, key, _ in report.models():
        path, adapter = key
        named = key == (report.sources.dense, None) or is_directory(path)
        merged_too = stage == "merged" and report.sources.base_of(key) in tuned
        if named and not merged_too and (adapter is None or Path(adapter).is_dir()):
            found[key] = answers_of(report.sources.models[key], report.prompts, most=most, device=device)
    return found


def html_page(report: RunReport) -> str:
    """Return the page."""
    sections = [
        ("Notes", _notes(report)),
        ("Results", _results(report)),
        ("What was done", _done(report)),
        ("Loss", _losses(report)),
        ("Zeros", _zeros(report)),
        ("Changes by the adapter", _changes(report)),
        ("Answers", _answers(report)),
        ("Time and memory", _costs(report)),
        ("Provenance", _provenance(report)),
        ("Commands", _commands(report)),
    ]
    there = [(title, body) for title, body in sections if body]
    links = "".join(f'<li><a href="#{_anchor(title)}">{title}</a></li>' for title, _ in there)
    body = "\n".join(f'<section id="{_anchor(t)}">\n<h2>{t}</h2>\n{b}\n</section>' for t, b in there)
    names = ", ".join(dict.fromkeys([*(run.name for run in report.sources.runs), *_names(report)])) or "results"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{PAGE_MARK}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(names)} – spp report</title>
<style>
{STYLE}
{chart_style(dark=False)}
@media (prefers-color-scheme: dark) {{
{chart_style(dark=True)}
}}
</style>
</head>
<body>
<header>
<h1>{escaped(names)}</h1>
<p>{_summary(report)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>Made by spp {escaped(__version__)} of the files that it names, and of nothing else.</p></footer>
</body>
</html>
"""


def _names(report: RunReport) -> list[str]:
    return [one.name for one in report.zeros.values()] if not report.sources.runs else []


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _summary(report: RunReport) -> str:
    holds = [one.holds for one in report.zeros.values()]
    unfinished = sum(bool(run.problems) for run in report.sources.runs)
    parts = [
        (count_text(len(report.sources.runs), "run"), ""),
        (f"{unfinished} of them unfinished", "bad") if unfinished else ("", ""),
        (f"zeros verified in {count_text(holds.count(True), 'checkpoint')}", "good") if True in holds else ("", ""),
        (f"zeros wrong in {count_text(holds.count(False), 'checkpoint')}", "bad") if False in holds else ("", ""),
        (f"{count_text(holds.count(None), 'checkpoint')} not verified", "") if None in holds else ("", ""),
    ]
    return " ".join(f'<span class="chip {kind}">{escaped(text)}</span>' for text, kind in parts if text)


# ---- Sections: each returns HTML, "" where there is nothing to say.


def _notes(report: RunReport) -> str:
    items = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _results(report: RunReport) -> str:
    tables = report.results()
    if not tables:
        return "<p>No perplexity and no score was found.</p>"
    told = ""
    if any("recovered" in head for table in tables for head in table.columns):
        told = (
            "<p>Recovered is the share of the gap between the dense and the pruned model that is closed again, in "
            "logarithms of the perplexity.</p>"
        )
    columns = "<p>Numbers compare within a column only: what was measured on another text, with another tokenizer, "
    columns += "window, BOS or protocol, or where that was not recorded, has a column of its own.</p>"
    return "\n".join([*map(_scrolled, tables), told, columns])


def _done(report: RunReport) -> str:
    parts = []
    parts += [_pruned(name, values) for name, values in report.sources.prunings]
    runs = report.sources.runs
    chosen = {run.name: recipe_of(run.options) for run in runs}
    for run in runs:
        chosen[run.name] |= {f"data: {name}": str(value) for name, value in run.data.items()}
    names = list(dict.fromkeys(name for options in chosen.values() for name in options))
    rows = [(name, *(options.get(name, "–") for options in chosen.values())) for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    heads = ("option", *chosen)
    if differing:
        parts.append(_scrolled(Table("tuning: options that differ", heads, tuple(differing))))
        rows = [row for row in rows if row not in differing]
    if rows:
        title = "tuning: options of all runs" if len(runs) > 1 else "tuning"
        parts.append(_scrolled(Table(title, ("option", "value"), tuple(row[:2] for row in rows))))
    parts += [_scrolled(_comparison(name, contents)) for name, contents in report.sources.comparisons]
    return "\n".join(parts)


def _pruning(values: Mapping[str, Any]) -> PruneReport:
    layers = {path: _made(LayerReport, {**of, "shape": tuple(of["shape"])}) for path, of in values["layers"].items()}
    return _made(PruneReport, {**values, "layers": layers})


def _pruned(name: str, values: Mapping[str, Any]) -> str:
    found = _pruning(values)
    lines = "".join(f"<li>{escaped(line)}</li>" for line in prune_lines(found))
    return f"<h3>{escaped(name)}</h3>\n{_scrolled(prune_table(found))}\n<ul>{lines}</ul>"


def _made(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """Return a dataclass of those values that it has a field for."""
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})  # type: ignore[arg-type]


def _comparison(name: str, contents: Mapping[str, Any]) -> Table:
    def perplexity(row: Mapping[str, Any], part: str) -> str:
        of_part = row.get(part)
        value = of_part.get("perplexity") if isinstance(of_part, Mapping) else None
        return f"{value:.4f}" if is_number(value) else NOT_MEASURED

    rows = [
        (str(row.get("contender", key)), *(str(row.get(part, "–")) for part in ("lr", "seed", "steps")),
         "diverged" if row.get("diverged") else perplexity(row, "validation"), perplexity(row, "test"))
        for key, row in [*contents.get("baselines", {}).items(), *contents["rows"].items()]
        if isinstance(row, Mapping)
    ]  # fmt: skip
    return Table(f"comparison {name}", ("contender", "lr", "seed", "steps", "validation", "test"), tuple(rows))


def _losses(report: RunReport) -> str:
    lines = []
    for run in report.sources.runs:
        marks = [(entry["step"], entry["eval_loss"]) for entry in run.log if "eval_loss" in entry]
        for part, step in (("before", 0), ("after", run.steps)):
            values = run.evaluation.get(part)
            if isinstance(values, Mapping) and is_number(values.get("loss")):
                marks.append((step, float(values["loss"])))
        points = [(entry["step"], float(entry["loss"])) for entry in run.log if "loss" in entry]
        lines.append(Line(run.name, points, sorted(marks)))
    title = "; ".join(
        f"{line.name}: training loss from {line.points[0][1]:.3f} at step {line.points[0][0]:g} to "
        f"{line.points[-1][1]:.3f} at step {line.points[-1][0]:g}"
        for line in lines
        if line.points
    )
    chart = line_chart(lines, title or "loss", "step", "loss, nats a token")
    dots = " Dots are the loss on the text of the perplexity, before and after." if any(x.marks for x in lines) else ""
    return f"<figure>{chart}<figcaption>The lines are the training loss.{dots}</figcaption></figure>" if chart else ""


def _zeros(report: RunReport) -> str:
    paths = [path for _, (path, adapter), _ in report.models() if adapter is None and path in report.zeros]
    return _side_by_side(_zeros_of(report.zeros[path]) for path in paths)


def _zeros_of(one: Zeros) -> str:
    kind, word = {True: ("good", "verified"), False: ("bad", "wrong"), None: ("", "not verified")}[one.holds]
    parts = [f'<h3>{escaped(one.name)} <span class="chip {kind}">{word}</span></h3>', f"<p>{escaped(one.verdict)}</p>"]
    if one.report is not None:
        drawn = _heat(report_cells(one.report), f"sparsity of {one.name}", 1.0)
        parts.append(drawn if one.report.sparsity >= PRUNED_FROM else _folded("by layer", drawn))
        parts.append(_folded("by projection", _scrolled(sparsity_table(one.report))))
    return "\n".join(parts)


def _heat(cells: Mapping[str, Cell], title: str, most: float | None = None) -> str:
    """Return the heat maps of means over weights; without `most`, the largest mean has the last colour."""
    figures = []
    for panel in panels_of(cells):
        there = [value for row in panel.values for value in row if value is not None]
        low, high = f"{min(there):.4g}", f"{max(there):.4g}"
        ends = low if low == high else f"{low} … {high}"
        told = f"{title}: {panel.title}, {ends}"
        scale, unit = max(there) if most is None else most, 0
        if most is None and scale > 0:
            unit = math.floor(math.log10(scale))
        drawn = heat_map(panel, told, scale, partial(_cell, unit))
        units = f"; cells in 1e{unit}" if unit else ""
        figures.append(
            f"<figure>{_region(drawn, told)}<figcaption>{escaped(panel.title)}, {ends}{units}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(figures)}</div>'


def _cell(unit: int, value: float) -> str:
    return f"{value / 10.0**unit:.1f}" if unit else f"{value:.2f}"


def _side_by_side(parts: Iterable[str]) -> str:
    found = "\n".join(f"<article>{part}</article>" for part in parts)
    return f'<div class="side">{found}</div>' if found else ""


def _changes(report: RunReport) -> str:
    merges = [f"<h3>{escaped(name)}</h3>\n{_scrolled(merge_table(_merge(v)))}" for name, v in report.sources.merges]
    told = "<p>The mean of |W_eff / W − 1| over the weights that pruning kept.</p>" if report.changes else ""
    return told + _side_by_side([*map(_changes_of, report.changes), *merges])


def _changes_of(one: Changes) -> str:
    survived = one.merge.survived
    told = "there is no update" if survived is None else f"{survived:.2%} of the update survived rounding"
    parts = [f"<h3>{escaped(one.name)}</h3>", _heat(one.sums, f"changes by {one.name}")]
    parts += [f"<p>Of a merge into the base's dtype: {told}.</p>"]
    return "\n".join([*parts, _folded("by projection", _scrolled(merge_table(one.merge)))])


def _merge(values: Mapping[str, Any]) -> MergeReport:
    layers = {path: _made(LayerMerge, of) for path, of in values["layers"].items()}
    return MergeReport(layers, values["survived"], make_report({}))


def _answers(report: RunReport) -> str:
    parts = []
    for i, prompt in enumerate(report.prompts if report.answers else ()):
        answers = [
            f"<h4>{escaped(name if stage in ('', name) else f'{stage}: {name}')}</h4>"
            f"<pre>{escaped(report.answers[key][i])}</pre>"
            for stage, key, name in report.models()
            if key in report.answers
        ]
        parts.append(f"<h3>Prompt {i + 1}</h3>\n<pre>{escaped(prompt)}</pre>\n{_side_by_side(answers)}")
    return "\n".join(parts)


def _costs(report: RunReport) -> str:
    rows: list[tuple[str, ...]] = []

    def add(name: str, seconds: Any, size: Any) -> None:
        timed = time_text(seconds) if is_number(seconds) else NOT_MEASURED
        rows.append((name, timed, byte_text(size) if is_number(size) else NOT_MEASURED))

    for name, values in report.sources.prunings:
        add(f"pruning, {name}", values.get("seconds"), values.get("peak_bytes"))
    for run in report.sources.runs:
        add(f"tuning, {run.name} ({run.steps} steps)", run.seconds, run.config.get("peak_bytes"))
    for name, values in report.sources.results:
        add(f"measuring, {name}", values.get("seconds"), values.get("peak_bytes"))
    sizes = [(one.name, byte_text(_size(one.path))) for one in report.sources.checkpoints.values()]
    sizes += [(f"{run.name}, adapter", byte_text(_size(run.adapter))) for run in report.sources.runs if run.adapter]
    known = any(row[2] != NOT_MEASURED for row in rows)
    heads: tuple[str, ...] = ("what", "time", "peak memory")
    title = "time and peak memory"
    if not known:
        heads, title, rows = heads[:2], "time; peak memory: not measured", [row[:2] for row in rows]
    tables = [Table(title, heads, tuple(rows))] if rows else []
    tables += [Table("size of the weights on disk", ("what", "size"), tuple(sizes))] if sizes else []
    return "\n".join(map(_scrolled, tables))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _provenance(report: RunReport) -> str:
    sources = [(run.name, run.config) for run in report.sources.runs] + report.sources.results
    parts = []
    for name, values in sources:
        told = {key: value for key, value in values.items() if key not in _LONG and not isinstance(value, (dict, list))}
        kinds = {"python": str, "versions": dict}
        packages = {key: values[key] for key, kind in kinds.items() if isinstance(values.get(key), kind)}
        table = fields_table("", {**told, "versions": Provenance.from_dict(packages).packages or None})
        parts.append(_folded(name, _scrolled(table, name)))
    for one in report.sources.checkpoints.values():
        if (made := one.certificate) is not None:
            base = (
                {} if made.base is None else {"base": made.base.name_or_path, "its fingerprint": made.base.fingerprint}
            )
            told = {"fingerprint": made.fingerprint(), "spp": made.spp_version, **base}
            parts.append(_folded(one.name, _scrolled(fields_table("", told), one.name)))
    return "\n".join(parts)


def _commands(report: RunReport) -> str:
    lines = commands(report.sources)
    return _region(f"<pre>{escaped(chr(10).join(lines))}</pre>", "commands") if lines else ""


# ---- Parts of sections.


def _scrolled(table: Table, name: str = "") -> str:
    return _region(table.html(), table.title or name)


def _region(body: str, name: str) -> str:
    """Return something wide in a box that scrolls, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(name)}">{body}</div>'


def _folded(name: str, body: str) -> str:
    return f"<details><summary>{escaped(name)}</summary>{body}</details>"
