"""Scores of a model on tasks: the values, their standard errors, and what is known of each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spp.errors import NonFiniteError
from spp.evaluation.documents import Documents
from spp.files.provenance import Provenance
from spp.files.tables import Table

MEAN_OF = "acc"


@dataclass(frozen=True)
class TaskFacts:
    """The measurement of one task, or of a group of tasks.

    Args:
        version: of the task's definition in lm-eval.
        num_fewshot: number of examples in a prompt; None for a group whose tasks differ.
        items: number of documents that were measured.
        split: the split they are from; None for a group, and for a task that chooses it in code.
        documents_sha256: of the whole split, whatever the format of its files; None where `split` is.
    """

    version: Any
    num_fewshot: int | None
    items: int
    split: str | None
    documents_sha256: str | None


@dataclass(frozen=True)
class TaskResults:
    """The scores of a model on tasks.

    Args:
        scores: {task: {metric: value}}, groups and their tasks alike; a metric of one of several filters of a task is
            named with it, such as "exact_match,strict-match".
        mean: of `acc` over the tasks and groups that were asked for; None where one has no `acc`.
        stderr: {task: {metric: standard error}}, where lm-eval gives one.
        tasks: {task: its version, examples, number of documents, split and their hash}.
        limit: number of documents of a task that were measured at most; None for all.
        apply_chat_template: whether prompts were put into the tokenizer's chat template.
        data_dir: folder of local files that the documents are from; None for the hub.
        provenance: versions, device, dtype, seconds, hashes of the tokenizer and of the model's values.
    """

    scores: Mapping[str, Mapping[str, float]]
    mean: float | None
    stderr: Mapping[str, Mapping[str, float]]
    tasks: Mapping[str, TaskFacts]
    limit: int | None
    apply_chat_template: bool
    data_dir: str | None
    provenance: Provenance

    @property
    def tokenizer_sha256(self) -> str | None:
        """The hash of the tokenizer (spp.data.tokens.tokenizer_sha256)."""
        return self.provenance.hashes.get("tokenizer_sha256")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values, the provenance under its own keys."""
        values = {name: value for name, value in asdict(self).items() if name != "provenance"}
        return values | self.provenance.to_dict()

    def _repr_html_(self) -> str:
        """Return the table of the scores, for notebooks."""
        return tasks_table(self).html()


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


def metrics_of(task: str, found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return {metric: value} and {metric: standard error} of lm-eval's entries `metric,filter`.

    Raises:
        NonFiniteError: a value is not finite.
    """
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if not comma or isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
            continue
        filtered = "" if kind == "none" else f",{kind}"
        if metric.endswith("_stderr"):
            if math.isfinite(value):
                errors[metric.removesuffix("_stderr") + filtered] = float(value)
        elif math.isfinite(value):
            values[metric + filtered] = float(value)
        else:
            raise NonFiniteError(f"{metric} of the task {task} is {float(value)}: the model's answers have no score")
    return values, errors


def facts_of(found: Mapping[str, Any], shots: int | None, documents: Mapping[str, Documents]) -> dict[str, TaskFacts]:
    """Return what is known of each task and group of lm-eval's results."""
    counts = {name: int(count["effective"]) for name, count in found["n-samples"].items()}
    groups = {name: children for name, children in found.get("group_subtasks", {}).items() if children}

    def items(name: str) -> int:
        return counts[name] if name in counts else sum(items(child) for child in groups.get(name, ()))

    facts = {}
    for name in found["results"]:
        known = documents.get(name)
        facts[name] = TaskFacts(
            version=found["versions"].get(name),
            num_fewshot=found["n-shot"].get(name, shots),
            items=items(name),
            split=known.split if known else None,
            documents_sha256=known.sha256 if known else None,
        )
    return facts


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is missing."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there and len(there) == len(values) else None
