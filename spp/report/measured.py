"""Numbers of a report, with all that they were measured under, and the columns in which they compare.

Another text, tokenizer, window, BOS or protocol, and of a task other documents, examples or a version of it, is another
column. What is not recorded counts as different.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from spp.configs import checks

Key = tuple[str, str | None]  # path of a model, and of the adapter on it
NOT_RECORDED = "not recorded"
OF_ROWS = "of rows"


@dataclass(frozen=True)
class Measured:
    """A number, and what it was measured under.

    Attributes:
        model: key of the model.
        quantity: "perplexity", or a metric of a task.
        value: it.
        of: name of the text, or of the task.
        under: (what, value as text), in one order for a quantity; two numbers compare where these are equal.
    """

    model: Key
    quantity: str
    value: float
    of: str
    under: tuple[tuple[str, str], ...]


def evaluated(key: Key, name: str, values: Mapping[str, Any]) -> Iterator[Measured]:
    """Yield the perplexity and the scores of a result of spp eval."""
    text = str(values.get("text") or values.get("dataset") or "a text")
    yield from perplexity_in(key, values, text, f"as {name} has it")
    scores, facts = values.get("scores"), values.get("tasks")
    if not isinstance(scores, Mapping):
        return
    facts = {} if not isinstance(facts, Mapping) else {k: v for k, v in facts.items() if isinstance(v, Mapping)}
    shared = tuple((what, _told(values.get(name))) for what, name in _OF_ALL_TASKS)
    for task, metrics in scores.items():
        of_task = facts.get(task)
        under = tuple((what, _told((of_task or {}).get(name))) for what, name in _OF_A_TASK) + shared
        for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
            if is_number(value):
                yield Measured(key, metric, float(value), str(task), under)
    if is_number(values.get("mean")):
        each = [(what, [_told((facts.get(task) or {}).get(name)) for task in scores]) for what, name in _OF_A_TASK]
        under = tuple((what, ", ".join(found if len(set(found)) > 1 else found[:1])) for what, found in each)
        yield Measured(key, "mean acc", float(values["mean"]), f"of {', '.join(map(str, scores))}", under + shared)


_OF_A_TASK = (
    *(("version", "version"), ("examples", "num_fewshot"), ("documents", "items"), ("split", "split")),
    ("contents", "documents_sha256"),
)
_OF_ALL_TASKS = (("limit", "limit"), ("chat template", "apply_chat_template"), ("tokenizer", "tokenizer_sha256"))
_OF_A_TEXT = (  # beside the text itself
    *(("tokenizer", "tokenizer_sha256"), ("window", "window"), ("BOS", "bos"), ("protocol", "protocol")),
    *(("windows", "windows"), ("tokens", "tokens")),
)


def perplexity_in(key: Key, values: Mapping[str, Any], text: str, otherwise: str) -> Iterator[Measured]:
    """Yield a perplexity.

    Args:
        text: the name of the text. otherwise: its identity where no hash of it was recorded.
    """
    value = values.get("perplexity")
    if isinstance(value, float) or is_number(value):  # infinity too
        rows = "window" in values and values["window"] is None  # rows of their own lengths have none, and no protocol
        none = OF_ROWS if rows else NOT_RECORDED
        under = tuple((what, none if values.get(name) is None else str(values[name])) for what, name in _OF_A_TEXT)
        yield Measured(
            key, "perplexity", float(value), text, (("text", str(values.get("text_sha256") or otherwise)), *under)
        )


def _told(value: object) -> str:
    return NOT_RECORDED if value is None else str(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value of a file is a finite number that a float can be."""
    return checks.is_number(value) and math.isfinite(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Column:
    """Numbers that were measured alike.

    Attributes:
        quantity, of: as in Measured.
        label: with all that tells it from other columns.
        values: {key of a model: number}; the last one, where a model was measured twice.
    """

    quantity: str
    of: str
    label: str
    values: dict[Key, float]


def columns_of(measured: Sequence[Measured]) -> list[Column]:
    """Return the columns of some numbers: two are in one only where all that they were measured under is equal."""
    found: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[Measured]] = {}
    for one in measured:
        of = "" if one.quantity == "perplexity" else one.of  # a text is known by its hash, whatever its name
        found.setdefault((one.quantity, of, one.under), []).append(one)
    columns = []
    for (quantity, of, under), entries in found.items():
        others = [other[2] for other in found if other[:2] == (quantity, of)]
        first = entries[0].of
        label = f"perplexity on {first}" if quantity == "perplexity" else " ".join((quantity, *([of] if of else [])))
        parts = [
            _short(value if value.startswith(("as ", "of ")) else f"{what} {value}")
            for i, (what, value) in enumerate(under)
            if (what == "window" and value != NOT_RECORDED) or any(other[i] != under[i] for other in others)
        ]
        values = {entry.model: entry.value for entry in entries}
        columns.append(Column(quantity, first, ", ".join([label, *parts]), values))
    return columns


def _short(value: str) -> str:
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1…", value)
