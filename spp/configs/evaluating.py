"""The config of the verb eval: perplexity of a text or a data set, and tasks.

Each field has its Option, whose text is the help of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from spp.configs.checks import (
    AUTO_DTYPES,
    BOS,
    DEVICES,
    PROTOCOLS,
    check_choice,
    check_int,
    check_path,
)
from spp.configs.options import EVALUATION, MODEL, Option
from spp.errors import ConfigError, arg

DATASETS = ("wikitext2", "c4")  # texts whose perplexity papers report (spp.evaluation.texts)


PAPER_WINDOW = "model"  # the window that papers measure a model's family at


_OF_TASKS = ("limit", "num_fewshot", "apply_chat_template", "data_dir", "split")


_OF_PERPLEXITY = {"bos": "auto", "protocol": None}


def parse_window(text: str) -> int | str:
    """Return the window that `--window` means: a number, or "model".

    Raises:
        ConfigError: it is neither.
    """
    try:
        return text if text == PAPER_WINDOW else int(text)
    except ValueError:
        raise ConfigError(f"{arg('window')} is {text!r}; it must be a number of tokens, or {PAPER_WINDOW}") from None


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The options of `spp eval`.

    Raises:
        ConfigError: an option makes no sense; the message names it.
    """

    model: Annotated[str, Option("Directory or hub id of the model.", argument=True)]
    text: Annotated[Path | None, Option("Text or rows to measure the perplexity on, the whole file.", EVALUATION)] = (
        None
    )
    dataset: Annotated[
        str | None,
        Option(
            "Data set to measure the perplexity on as papers do: wikitext2 (the raw test split) or c4 (256 windows of "
            "its validation split).",
            EVALUATION,
            choices=DATASETS,
            default="none",
        ),
    ] = None
    window: Annotated[
        int | str | None,
        Option(
            "Tokens of a window; perplexities compare at equal windows only. model: the papers' for the model's "
            "family, 4096 for Llama 2, else 2048.",
            EVALUATION,
            type=str,
            metavar="INT|model",
            parse=parse_window,
            default="1024; 2048 of a data set",
        ),
    ] = None
    bos: Annotated[
        str,
        Option(
            "Begin windows with BOS: auto (as the tokenizer does with a text), always or never.",
            EVALUATION,
            choices=BOS,
        ),
    ] = "auto"
    protocol: Annotated[
        str | None,
        Option(
            "per-window (BOS in every window) or paper (at the start of the text alone).",
            EVALUATION,
            choices=PROTOCOLS,
            default="per-window; paper of a data set, with per-window beside it",
        ),
    ] = None
    batch_size: Annotated[int, Option("Windows, or requests of tasks, of one forward pass.", EVALUATION)] = 1
    max_windows: Annotated[int | None, Option("Measure the first windows only.", EVALUATION, default="all")] = None
    tasks: Annotated[
        tuple[str, ...],
        Option(
            "Tasks of lm-eval to measure on: paper (the seven of the pruning papers, 0-shot), mmlu (5-shot), or names "
            "of tasks, groups and tags, with commas between them.",
            EVALUATION,
            metavar="NAMES",
            many=True,
            parse=parse_tasks,
            default="none",
        ),
    ] = ()
    limit: Annotated[
        int | None, Option("Measure the first documents of each task only.", EVALUATION, default="all")
    ] = None
    num_fewshot: Annotated[
        int | None, Option("Examples in a prompt of a task.", EVALUATION, default="as the task is defined")
    ] = None
    apply_chat_template: Annotated[
        bool, Option("Put the prompts of tasks into the tokenizer's chat template.", EVALUATION)
    ] = False
    data_dir: Annotated[
        Path | None,
        Option(
            "Folder with the documents of tasks and data sets, such as DIR/winogrande/winogrande_xl/validation.jsonl; "
            "the hub is not asked.",
            EVALUATION,
            default="the hub",
        ),
    ] = None
    split: Annotated[
        str | None,
        Option("Measure tasks on this split, such as validation.", EVALUATION, default="as the task is defined"),
    ] = None
    adapter: Annotated[Path | None, Option("Adapter, or PST's output, to load onto the model.", MODEL)] = None
    strict: Annotated[
        bool | None,
        Option(
            "--strict refuses an adapter that was trained on other values than the model's, --no-strict accepts one "
            "that was trained on other zeros.",
            MODEL,
            negatable=True,
            default="refuse other zeros, report other values",
        ),
    ] = None
    dtype: Annotated[
        str, Option("auto (the checkpoint's own), float32, bfloat16 or float16.", MODEL, choices=AUTO_DTYPES)
    ] = "auto"
    device: Annotated[str, Option("auto, cpu or cuda.", MODEL, choices=DEVICES)] = "auto"

    def __post_init__(self) -> None:
        check_path("model", self.model)
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, AUTO_DTYPES)
        check_windows(2048 if self.window in (None, PAPER_WINDOW) else self.window, self.batch_size, self.max_windows)
        check_limits(self.limit, self.num_fewshot)
        check_choice("bos", self.bos, BOS)
        if self.protocol is not None:
            check_choice("protocol", self.protocol, PROTOCOLS)
        if self.dataset is not None:
            check_choice("dataset", self.dataset, DATASETS)
        if self.text is not None and self.dataset is not None:
            raise ConfigError(
                f"{arg('text')} and {arg('dataset')} are both given: one perplexity is measured; pass one"
            )
        measured = self.text is not None or self.dataset is not None
        if not measured and not self.tasks:
            raise ConfigError(
                f"pass {arg('text', ...)} or {arg('dataset', ...)} to measure the perplexity on, or "
                f"{arg('tasks', ...)}, or both"
            )
        given = [name for name in _OF_TASKS if getattr(self, name) not in (None, False)]
        if self.dataset is not None:
            given = [name for name in given if name != "data_dir"]
        if given and not self.tasks:
            names = " and ".join(map(arg, given))
            raise ConfigError(f"{names} without {arg('tasks', ...)}: there is no task that it is for")
        given = [name for name, usual in _OF_PERPLEXITY.items() if getattr(self, name) != usual]
        if given and not measured:
            names = " and ".join(map(arg, given))
            raise ConfigError(f"{names} without {arg('text', ...)} or {arg('dataset', ...)}: no perplexity is measured")


def parse_tasks(values: Sequence[str]) -> tuple[str, ...]:
    """Return the names in what `--tasks` was given, each once."""
    names = (name.strip() for value in values for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def check_limits(limit: object, num_fewshot: object = None, batch_size: object = 1) -> None:
    """Raise a ConfigError for options of tasks that make no sense."""
    check_int("batch_size", batch_size, least=1)
    if limit is not None:
        check_int("limit", limit, least=1)
    if num_fewshot is not None:
        check_int("num_fewshot", num_fewshot, least=0)


def check_windows(window: object, batch_size: object = 1, max_windows: object = None) -> None:
    """Raise a ConfigError for options of a perplexity that make no sense."""
    check_int("window", window, least=2)  # one token is no prediction
    check_int("batch_size", batch_size, least=1)
    if max_windows is not None:
        check_int("max_windows", max_windows, least=1)
