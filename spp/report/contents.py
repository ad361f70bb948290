"""Contents of a report: models side by side, what was recovered, and the commands that do it again.

recovered = (ln P_pruned − ln P) / (ln P_pruned − ln P_dense)       P a perplexity, all three of one column
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.certifying.verify import PRUNED_FROM
from spp.configs.options import Field, options_of
from spp.configs.tuning import TuneConfig
from spp.files.tables import Table
from spp.report.measured import Column, Key
from spp.report.runs import STAGES, Changes, Sources, TuningRun, Zeros

FORMAT = "spp-report-1"
NOT_MEASURED = "not measured"
_TAUGHT = ("ce_weight", "kl_weight", "hidden_weight", "temperature")
RECIPE = (  # options of a run that decide what comes out
    *("method", "data", "steps", "epochs", "batch_size", "gradient_accumulation", "block_length", "completions_only"),
    *("lr", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "rule", "r", "scaling", "dropout"),
    *("dropout_mode", "target_modules", "exclude_modules", "mask_update_every", "mask_update_fraction", "pattern"),
    *("also_train", "also_lr", "teacher", "teacher_bits", "teacher_cache", *_TAUGHT, "dtype", "bf16", "seed"),
)
_NOT_REPEATED = ("overwrite", "resume", "progress")


@dataclass(frozen=True)
class RunReport:
    """The contents of a report.

    Args:
        sources: what was read.
        columns: numbers that compare with each other.
        zeros: of each checkpoint, by its path.
        changes: of each run whose base and adapter are there.
        prompts: that models answered; answers: {key of a model: its answers}.
        notes: what is unfinished, missing or wrong.
    """

    sources: Sources
    columns: list[Column]
    zeros: dict[str, Zeros]
    changes: list[Changes]
    prompts: list[str]
    answers: dict[Key, list[str]]
    notes: list[str]

    def stage(self, key: Key) -> str:
        """Return the stage of a model, "" where nothing tells it."""
        path, adapter = key
        if adapter is not None:
            return "tuned"
        if path == self.sources.dense:
            return "dense"
        certificate, found = self.sources.certificate(path), self.zeros.get(path)
        if certificate is not None and Path(path).name == "reconstructed":
            return "reconstructed"
        if certificate is not None and certificate.base is not None:
            return "merged"
        if found is not None and found.report is not None:
            return "pruned" if found.report.sparsity >= PRUNED_FROM else "dense"
        of_runs = {str(run.options.get("method", "spp")) for run in self.sources.runs if run.before == key}
        return ("dense" if "pst" in of_runs else "pruned") if of_runs else ""

    def models(self) -> list[tuple[str, Key, str]]:
        """Return (stage, key, name) of the models, in the order of the road."""
        found = [(self.stage(key), key, model.name) for key, model in self.sources.models.items()]
        return sorted(found, key=lambda one: STAGES.index(one[0]) if one[0] else len(STAGES))

    def recovered(self, column: Column, key: Key) -> float | None:
        """Return the share of the gap that pruning opened which a model closes again; None where it is not known."""
        dense = [k for k in column.values if self.stage(k) == "dense"]
        own = [k for k in dense if k[0] == self.sources.dense]
        dense = own or dense
        base = self._pruned(key)
        if len(dense) != 1 or base not in column.values or key not in column.values or key in dense:
            return None
        best, start, now = (column.values[k] for k in (dense[0], base, key))
        if not all(map(math.isfinite, (best, start, now))) or not 0 < best < start or now <= 0:
            return None
        return (math.log(start) - math.log(now)) / (math.log(start) - math.log(best))

    def _pruned(self, key: Key) -> Key | None:
        """Return the pruned model that a model was made of, itself if it is one; None where that is not known."""
        of: Key | None = key
        for _ in STAGES:
            if of is None or self.stage(of) == "pruned":
                return of
            of = self.sources.base_of(of)
        return None

    def results(self) -> list[Table]:
        """Return the models side by side: their perplexities, their scores, and further metrics of tasks."""
        scores = [column for column in self.columns if column.quantity in ("acc", "mean acc")]
        texts = [column for column in self.columns if column.quantity == "perplexity"]
        others = [column for column in self.columns if column not in scores and column not in texts]
        parts = [("perplexity", texts), ("scores on tasks", scores), ("further metrics of tasks", others)]
        return [self._table(title, columns) for title, columns in parts if columns]

    def _table(self, title: str, columns: Sequence[Column]) -> Table:
        heads, rows = ["model", "stage"], [[name, stage or "not known"] for stage, _, name in self.models()]
        for column in columns:
            heads.append(column.label)
            shares = [self.recovered(column, key) for _, key, _ in self.models()]
            for (_, key, _), row in zip(self.models(), rows, strict=True):
                row.append(f"{column.values[key]:.4f}" if key in column.values else NOT_MEASURED)
            if any(share is not None for share in shares):
                heads.append("recovered")
                for share, row in zip(shares, rows, strict=True):
                    row.append("–" if share is None else f"{100 * share:.1f} %")
        return Table(title, tuple(heads), tuple(map(tuple, rows)))

    def _repr_html_(self) -> str:
        """Return the tables of results, for notebooks."""
        return "\n".join(table.html() for table in self.results())

    def to_dict(self) -> dict[str, Any]:
        """Return the contents as JSON-ready values; a number that is not finite is None."""
        sources = self.sources
        models = [
            {"name": name, "stage": stage or None, "model": key[0], "adapter": key[1], "answers": self.answers.get(key)}
            for stage, key, name in self.models()
        ]
        keys = [key for _, key, _ in self.models()]
        columns = [
            {
                "quantity": column.quantity,
                "of": column.of,
                "label": column.label,
                "values": [column.values.get(key) for key in keys],
                "recovered": [self.recovered(column, key) for key in keys],
            }
            for column in self.columns
        ]
        zeros = [
            {
                "name": one.name,
                "verdict": one.verdict,
                "verified": one.holds,
                "report": one.report and one.report.to_dict(),
            }
            for one in self.zeros.values()
        ]
        found = {
            "format": FORMAT,
            "models": models,
            "columns": columns,
            "runs": [_run_dict(run) for run in sources.runs],
            "zeros": zeros,
            "changes": [_changes_dict(one) for one in self.changes],
            "prompts": self.prompts,
            "results": [values for _, values in sources.results],
            "prunings": [values for _, values in sources.prunings],
            "merges": [values for _, values in sources.merges],
            "comparisons": [values for _, values in sources.comparisons],
            "notes": self.notes,
            "commands": commands(sources),
        }
        cleaned: dict[str, Any] = _finite(found)
        return cleaned


def _run_dict(run: TuningRun) -> dict[str, Any]:
    facts = {"steps": run.steps, "planned_steps": run.planned, "seconds": run.seconds, "problems": run.problems}
    return {"name": run.name, "config": run.config, "evaluation": run.evaluation, "log": run.log, **facts}


def _changes_dict(changes: Changes) -> dict[str, Any]:
    means = {path: total / count if count else None for path, (total, count, _) in changes.sums.items()}
    merge = {name: value for name, value in changes.merge.to_dict().items() if name != "sparsity_report"}
    return {"name": changes.name, "mean_relative_change": means, "merge": merge}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Commands that do it again.


def commands(sources: Sources) -> list[str]:
    """Return the commands that repeat what the files tell of; in capitals what they do not tell."""
    found = []
    dense = sources.dense or "DENSE"
    for name, values in sources.prunings:
        beside = [one for one in sources.checkpoints.values() if Path(name).parent == Path(one.name)]
        output = beside[0].name if beside else "PRUNED"
        method, pattern = shown(values.get("method")), values.get("pattern")
        said = (
            [pattern] if isinstance(pattern, str) else [f"{key}={value}" for key, value in dict(pattern or {}).items()]
        )
        parts = ["prune", dense, output, "--method", method, *(part for one in said for part in ("--pattern", one))]
        if values.get("windows"):
            parts += ["--calibration", shown(values.get("calibration")), "--nsamples", shown(values["windows"])]
            parts += ["--seqlen", shown(values.get("seqlen")), "--seed", shown(values.get("seed"))]
        for option, value in dict(values.get("owl") or {}).items():
            parts += [*(["--owl"] if "--owl" not in parts else []), f"--owl-{option}", shown(value)]
        found.append(parts)
    found += [
        ["tune", *_typed(options_of(TuneConfig), {**run.options, "output_dir": run.name})] for run in sources.runs
    ]
    for path, one in sources.checkpoints.items():
        base = sources.base_of((path, None))
        if base is None:
            continue
        named = sources.models[base].name if base in sources.models else base[0] or "PRUNED"
        runs = [run for run in sources.runs if sources.base_of(run.after) == base]
        found.append(["merge", named, str(Path(runs[0].name, "adapter")) if len(runs) == 1 else "ADAPTER", one.name])
        found.append(["verify", one.name, "--against", named])
    for _, values in sources.results:
        parts = ["eval", shown(values["model"])]
        for option, key in _EVALUATED:
            if values.get(key) is not None and (key != "windows" or values.get("window") is not None):
                parts += [option, shown(values[key])]
        if isinstance(values.get("scores"), Mapping):
            parts += ["--tasks", ",".join(map(str, values["scores"]))]
        found.append([*parts, "--json"])
    return [" ".join(["spp", *map(shlex.quote, parts)]) for parts in found]


_EVALUATED = (
    *(("--adapter", "adapter"), ("--text", "text"), ("--dataset", "dataset"), ("--window", "window")),
    *(("--max-windows", "windows"), ("--limit", "limit"), ("--data-dir", "data_dir")),
)


def _typed(options: Iterable[Field], values: Mapping[str, Any]) -> list[str]:
    """Return what is typed for those values that are not the defaults."""
    arguments, others = [], []
    for option in options:
        value = values.get(option.name)
        if option.option.argument:
            arguments.append(shown(value) if value is not None else option.spelling)
        elif value is not None and value != option.default and option.name not in _NOT_REPEATED:
            if isinstance(value, bool):
                others += [option.spelling if value else option.off or ""]
            else:
                each = value if isinstance(value, (list, tuple)) else [value]
                others += [part for one in each for part in (option.spelling, str(one))]
    return arguments + others


def shown(value: Any) -> str:
    """Return a value, or values with commas between them, as text."""
    return ", ".join(map(shown, value)) if isinstance(value, (list, tuple)) else str(value)


def recipe_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a tuning run that decide what comes out, {name: value as text}."""
    unused: tuple[str, ...] = () if options.get("mask_update_every") else ("mask_update_fraction",)
    unused += () if options.get("also_train") else ("also_train", "also_lr")
    unused += () if options.get("kl_weight") or options.get("hidden_weight") else _TAUGHT  # no teacher
    return {name: shown(options[name]) for name in RECIPE if options.get(name) is not None and name not in unused}
