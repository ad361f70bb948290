"""The configs of the verbs on checkpoints: merge, verify, certify, inspect, eval, reconstruct, export, report, push …

Each field has its Option, whose text is the help of the command line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from spp.configs.checks import (
    AUTO_DTYPES,
    BOS,
    DEVICES,
    DTYPES,
    PROTOCOLS,
    check_chart,
    check_choice,
    check_int,
    check_path,
    check_seed,
)
from spp.configs.options import DATA, EVALUATION, METHOD, MODEL, RUN, Option
from spp.configs.pruning import check_source
from spp.configs.reconstruction import Reconstruction
from spp.errors import ConfigError, arg

ROUNDINGS = ("nearest", "stochastic")
DATASETS = ("wikitext2", "c4")  # texts whose perplexity papers report (spp.evaluation.texts)
PAPER_WINDOW = "model"  # the window that papers measure a model's family at
_REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def parse_weighted(values: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Return the adapter and the weight that each `ADAPTER` or `ADAPTER:WEIGHT` names.

    A directory of that name is itself.

    Raises:
        ConfigError: what follows the last colon is no finite number.
    """
    return tuple(map(_weighted, values))


def _weighted(text: str) -> tuple[str, float]:
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise ConfigError(f"{text}: {weight!r} is no weight; write ADAPTER:WEIGHT with a finite number, or ADAPTER")
    return name, value


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The options of `spp merge`.

    Raises:
        ConfigError: an option makes no sense; the message names it.
    """

    base: Annotated[str, Option("Directory or hub id of the pruned model; for PST, of the dense one.", argument=True)]
    adapters: Annotated[
        tuple[tuple[str, float], ...],
        Option(
            "Directory or hub id of an adapter, or of PST's output. Of several adapters the sum is merged, each times "
            "its weight (default: 1).",
            metavar="ADAPTER[:WEIGHT]",
            type=str,
            argument=True,
            many=True,
            parse=parse_weighted,
        ),
    ]
    output: Annotated[Path, Option("Directory to write the merged checkpoint to.", argument=True)]
    dtype: Annotated[
        str | None,
        Option(
            "Store the merged weights as float32, bfloat16 or float16.", METHOD, choices=DTYPES, default="the base's"
        ),
    ] = None
    rounding: Annotated[str, Option("nearest or stochastic.", METHOD, choices=ROUNDINGS)] = "nearest"
    seed: Annotated[int | None, Option("Of stochastic rounding.", METHOD)] = None
    dense: Annotated[
        str | None,
        Option(
            "Dense model of a run with mask updates, to merge one of its checkpoints.",
            MODEL,
            default="the one that the checkpoint names",
        ),
    ] = None
    every: Annotated[bool, Option("List every layer in the table.", RUN, name="--all")] = False
    dry_run: Annotated[bool, Option("Check everything and print the table, but write nothing.", RUN)] = False
    strict_values: Annotated[
        bool, Option("Refuse a base with other values than an adapter was trained on.", RUN, name="--strict")
    ] = False
    overwrite: Annotated[bool, Option("Replace an existing output.", RUN)] = False

    def __post_init__(self) -> None:
        check_path("base", self.base)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """The options of `spp verify`.

    Raises:
        ConfigError: `after` and `against` are both given.
    """

    before: Annotated[str, Option("The pruned checkpoint; alone: a checkpoint with a certificate.", argument=True)]
    after: Annotated[str | None, Option("The checkpoint that must have the same zeros.", argument=True)] = None
    against: Annotated[
        str | None, Option("The pruned checkpoint whose zeros the first one must have: BEFORE, named last.", MODEL)
    ] = None
    more_zeros_allowed: Annotated[
        bool, Option("AFTER may have been pruned further: it must have the zeros of BEFORE, and may have more.", METHOD)
    ] = False
    deep: Annotated[bool, Option("Compare sha256 of contents too, where the certificate has them.", RUN)] = False
    every: Annotated[bool, Option("List every tensor in the table.", RUN, name="--all")] = False

    def __post_init__(self) -> None:
        check_path("before", self.before)
        if self.against is not None and self.after is not None:
            raise ConfigError(
                f"{arg('against')} names the pruned checkpoint; leave out {arg('after')}, or pass {arg('before')} and "
                f"{arg('after')} without it"
            )

    @property
    def pair(self) -> tuple[str, str | None]:
        """The pruned checkpoint, and the one that must have its zeros; one checkpoint and None."""
        return (self.before, self.after) if self.against is None else (self.against, self.before)


@dataclass(frozen=True, kw_only=True)
class CertifyConfig:
    """The options of `spp certify`."""

    directory: Annotated[Path, Option("Directory of the checkpoint (safetensors).", argument=True)]
    base: Annotated[
        str | None, Option("The pruned checkpoint that it was tuned from; its zeros must be the same.", MODEL)
    ] = None
    deep: Annotated[bool, Option("Add the sha256 of every tensor's contents.", RUN)] = False
    every: Annotated[bool, Option("List every tensor in the table.", RUN, name="--all")] = False
    overwrite: Annotated[bool, Option("Replace an existing certificate.", RUN)] = False


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """The options of `spp inspect`.

    Raises:
        ConfigError: `plot` has no ending of a chart.
    """

    path: Annotated[str, Option("Directory or hub id of a model or an adapter.", argument=True)]
    every: Annotated[bool, Option("List every tensor in the table.", RUN, name="--all")] = False
    plot: Annotated[Path | None, Option("Draw layers × projections as a heat map: a .png, .svg or .pdf file.", RUN)] = (
        None
    )
    overwrite: Annotated[bool, Option("Replace the file of --plot.", RUN)] = False

    def __post_init__(self) -> None:
        check_path("path", self.path)
        if self.plot is not None:
            check_chart("plot", self.plot)


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


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(Reconstruction):
    """The options of `spp reconstruct`: those of Reconstruction, and what to read and write.

    Raises:
        ConfigError, DataError: an option makes no sense; the message names it.
    """

    pruned: Annotated[str, Option("Directory or hub id of the pruned model.", argument=True)]
    output: Annotated[Path, Option("Directory to write the repaired checkpoint to.", argument=True)]
    dense: Annotated[str, Option("Directory or hub id of the model that it was pruned from.", MODEL)]
    calibration: Annotated[
        Any,
        Option(
            "Data to repair on, as of spp prune: a text file, rows with a field text, token ids, or a data set.",
            DATA,
            type=str,
        ),
    ]
    nsamples: Annotated[int, Option("Calibration windows at most.", DATA)] = 128
    seqlen: Annotated[int, Option("Tokens of a window that is cut from text.", DATA)] = 2048
    dtype: Annotated[
        str, Option("auto (the checkpoint's own), float32, bfloat16 or float16.", MODEL, choices=AUTO_DTYPES)
    ] = "auto"
    device: Annotated[str, Option("auto, cpu or cuda.", MODEL, choices=DEVICES)] = "auto"
    report: Annotated[Path | None, Option("JSON file to write the errors of each block to.", RUN)] = None
    overwrite: Annotated[bool, Option("Replace an existing output.", RUN)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("pruned", self.pruned)
        check_path("dense", self.dense)
        check_source(check_path("calibration", self.calibration))
        check_int("nsamples", self.nsamples, least=1)
        check_int("seqlen", self.seqlen, least=1)
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, AUTO_DTYPES)

    @property
    def options(self) -> Reconstruction:
        """How a block is repaired."""
        return Reconstruction(**{field.name: getattr(self, field.name) for field in fields(Reconstruction)})


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The options of `spp export`.

    Raises:
        ConfigError: not one of `packed` and `dense` is asked for, or `strict_bits` with `dense`.
    """

    directory: Annotated[str, Option("Directory or hub id of the checkpoint.", argument=True)]
    output: Annotated[Path, Option("Directory to write to.", argument=True)]
    packed: Annotated[bool, Option("Store kept weights and masks instead of zeros.", METHOD)] = False
    dense: Annotated[bool, Option("Make a packed checkpoint a plain one again.", METHOD)] = False
    strict_bits: Annotated[bool, Option("With --packed: refuse −0.0, which would come back as 0.0.", METHOD)] = False
    every: Annotated[bool, Option("List every tensor in the table.", RUN, name="--all")] = False
    overwrite: Annotated[bool, Option("Replace an existing output.", RUN)] = False

    def __post_init__(self) -> None:
        check_path("directory", self.directory)
        if self.packed == self.dense:
            raise ConfigError(f"pass one of {arg('packed', True)} and {arg('dense', True)}")
        if self.dense and self.strict_bits:
            raise ConfigError(
                f"{arg('strict_bits')} goes with {arg('packed', True)}: a packed checkpoint holds no −0.0"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The options of `spp report`; those that are no output are arguments of spp.report.html_report.

    Raises:
        ConfigError: there is nothing to report, or an option makes no sense.
    """

    runs: Annotated[
        tuple[str, ...],
        Option(
            "Run directories of spp tune, checkpoints, folders that hold these, and JSON files of spp eval --json and "
            "spp prune --report.",
            metavar="RUN",
            type=str,
            argument=True,
            many=True,
            parse=tuple,
        ),
    ]
    out: Annotated[Path | None, Option("HTML file to write.", RUN, default="report.html, and with --json none")] = None
    dense: Annotated[str | None, Option("The dense model, as results name it: directory or hub id.", MODEL)] = None
    prompts: Annotated[
        Path | None,
        Option("Let the models answer these prompts, one a line, or in the field prompt of JSON Lines.", EVALUATION),
    ] = None
    max_new_tokens: Annotated[int, Option("Tokens of an answer.", EVALUATION)] = 48
    verify: Annotated[
        bool,
        Option("Verify zeros, and measure what adapters change: reads all weights.", METHOD, negatable=True),
    ] = True
    device: Annotated[str, Option("Where models answer: auto, cpu or cuda.", MODEL, choices=DEVICES)] = "auto"
    overwrite: Annotated[bool, Option("Replace an earlier report.", RUN)] = False

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError(f"there is nothing to report: {arg('runs')} is empty")
        for name in self.runs:
            check_path("runs", name)
        if self.dense is not None:
            check_path("dense", self.dense)
        check_int("max_new_tokens", self.max_new_tokens, least=1)
        check_choice("device", self.device, DEVICES)


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """The options of `spp push`; the fields are the arguments of spp.integrations.hub.push.

    Raises:
        ConfigError: `repo_id` is not of the form owner/name.
    """

    directory: Annotated[Path, Option("Directory of an adapter, or of a model with its certificate.", argument=True)]
    repo_id: Annotated[str, Option("owner/name; made if it is not there.", metavar="REPO", argument=True)]
    private: Annotated[
        bool | None, Option("Make a new repository private.", METHOD, default="the owner's", negatable=True)
    ] = None
    revision: Annotated[str | None, Option("Branch to push to.", METHOD, default="the main one")] = None
    message: Annotated[str | None, Option("Message of the commit.", METHOD)] = None
    run: Annotated[
        Path | None, Option("Run directory of spp tune: its recipe and results go into the card.", MODEL)
    ] = None
    base: Annotated[str | None, Option("Hub id of the base, where the files name a directory.", MODEL)] = None
    license: Annotated[str | None, Option("Licence for the card, such as apache-2.0.", MODEL)] = None
    new_card: Annotated[bool, Option("Make a card even if there is a README.md.", MODEL)] = False
    overwrite: Annotated[bool, Option("Replace what is in an existing repository.", RUN)] = False
    dry_run: Annotated[bool, Option("Check files, print the card, send nothing.", RUN)] = False

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of `spp run`."""

    recipe: Annotated[str, Option("A YAML file, or a recipe by name: demo, fast or paper-7b.", argument=True)]
    model: Annotated[
        str | None,
        Option("Directory or hub id of the model: dense, or pruned if the recipe prunes nothing.", argument=True),
    ] = None
    out: Annotated[Path | None, Option("Directory of the run.", RUN, default="the recipe's name and -run")] = None
    data: Annotated[
        tuple[str, ...],
        Option(
            "Training data, and for calibration where the recipe names none; may be repeated.",
            DATA,
            type=str,
            many=True,
            parse=tuple,
            default="the recipe's",
        ),
    ] = ()
    text: Annotated[Path | None, Option("Text for perplexities.", EVALUATION, default="the recipe's")] = None
    settings: Annotated[
        tuple[str, ...],
        Option(
            "Set an option of a stage, such as tune.steps=100, over what the recipe says; may be repeated.",
            METHOD,
            name="--set",
            metavar="KEY=VALUE",
            type=str,
            many=True,
            parse=tuple,
            default="the recipe's",
        ),
    ] = ()
    dry_run: Annotated[
        bool, Option("Say which stages would run, with the commands that do the same; write nothing.", RUN)
    ] = False
    overwrite: Annotated[bool, Option("Make every stage of the run again, in place of what is there.", RUN)] = False


def check_repo_id(repo_id: str) -> None:
    """Raise unless a repository's name is owner/name."""
    if not _REPO_ID.fullmatch(repo_id):
        raise ConfigError(f"{arg('repo_id')} is {repo_id!r}; it must be owner/name")


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
