"""The configs of the verbs on checkpoints: merge, verify, certify, inspect, reconstruct, convert, export …

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
    check_chart,
    check_choice,
    check_int,
    check_path,
    check_seed,
)
from spp.configs.options import DATA, EVALUATION, METHOD, MODEL, RUN, Option
from spp.configs.pruning import BOS_OPTION, check_source
from spp.configs.reconstruction import Reconstruction
from spp.errors import ConfigError, arg

ROUNDINGS = ("nearest", "stochastic")
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


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(Reconstruction):
    """The options of `spp reconstruct`: those of Reconstruction, and what to read and write.

    Raises:
        ConfigError, DataError: an option makes no sense; the message names it.
    """

    pruned: Annotated[str, Option("Directory or hub id of the pruned model.", argument=True)]
    output: Annotated[Path, Option("Directory to write the repaired checkpoint, or the adapter, to.", argument=True)]
    dense: Annotated[str, Option("Directory or hub id of the model that it was pruned from.", MODEL)]
    calibration: Annotated[
        Any,
        Option(
            "Data to repair on, as of spp prune: a text file, rows with a field text, token ids, a data set, or self: "
            "text that the dense model writes itself.",
            DATA,
            type=str,
        ),
    ]
    nsamples: Annotated[int, Option("Calibration windows at most.", DATA)] = 128
    seqlen: Annotated[int, Option("Tokens of a window that is cut from text.", DATA)] = 2048
    bos: Annotated[str, BOS_OPTION] = "auto"
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
        check_choice("bos", self.bos, BOS)
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
class ConvertConfig:
    """The options of `spp convert`."""

    source: Annotated[
        str, Option("Directory or hub id of a compressed checkpoint or of masks, or a file of masks.", argument=True)
    ]
    output: Annotated[Path, Option("Directory to write the plain checkpoint to.", argument=True)]
    dense: Annotated[
        str | None, Option("With masks: directory or hub id of the dense model that they prune.", MODEL)
    ] = None
    every: Annotated[bool, Option("List every layer in the table.", RUN, name="--all")] = False
    overwrite: Annotated[bool, Option("Replace an existing output.", RUN)] = False

    def __post_init__(self) -> None:
        check_path("source", self.source)
        if self.dense is not None:
            check_path("dense", self.dense)


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
