"""PruneOptions: the options of pruning, in memory and on disk; PruneConfig adds where to read and write.

Beside them the methods by name, OWL (the formula: spp.masks.wanda), the names of calibration data, and the options of
mask updates, which prune while an adapter trains (spp.training.mask_updates). A name of calibration data is

    text.txt, .text, .md, .raw, …     plain text, one document
    rows.json, .jsonl, .ndjson        rows: documents or conversations, as `spp tune` reads them
    rows.csv, .tsv, .parquet, .arrow  the same
    ids.pt, ids.safetensors           token ids (k, L)
    self                              text that the dense model writes itself (a file of that name is ./self)
    NAME[:CONFIG[:SPLIT[:FIELD]]]     a data set: an id of the Hugging Face hub (owner/name), or a folder that
                                      `datasets` can load; by default its only config, split train, field text

Empty parts are the default: "Salesforce/wikitext:wikitext-2-raw-v1", "allenai/c4:en:validation", "folder::test".
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from spp.configs.checks import (
    AUTO_DTYPES,
    BOS,
    DEVICES,
    check_choice,
    check_int,
    check_names,
    check_number,
    check_path,
    is_number,
    parse_names,
)
from spp.configs.options import DATA, METHOD, MODEL, OPTIMISATION, RUN, Option
from spp.configs.pattern import Pattern
from spp.configs.reconstruction import Reconstruction
from spp.errors import ConfigError, DataError, PatternError, arg, call

Patterns = str | float | Pattern | Mapping[str, str | float | Pattern]
BOS_OPTION = Option(
    "Begin rows and windows of text with BOS: auto (as the tokenizer does with a text), always or never.",
    DATA,
    choices=BOS,
)
Names = str | list[str] | tuple[str, ...] | None
SELF = "self"  # in place of a name of data
OWN_TOKENS = 100_000  # that the dense model writes to tune on, where nobody says how many


@dataclass(frozen=True)
class OWL:
    """The options of OWL.

    Args:
        threshold: M, how many times the mean a score must be above to be an outlier; the paper's 5.
        spread: λ, half the distance between the sparsest and the densest block; the paper's 0.08.

    Raises:
        ConfigError: an option makes no sense.

    Example:
        >>> OWL(spread=0.05)
        OWL(threshold=5.0, spread=0.05)
    """

    threshold: Annotated[float, Option("OWL: a score above so many times the mean is an outlier.", METHOD)] = 5.0
    spread: Annotated[float, Option("OWL: how far a block's fraction may be from the given one.", METHOD)] = 0.08

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or not math.isfinite(self.threshold) or self.threshold <= 0:
            raise ConfigError(f"OWL's threshold is {self.threshold!r}; it must be a finite number above 0")
        if not is_number(self.spread) or not 0 <= self.spread < 0.5:
            raise ConfigError(f"OWL's spread is {self.spread!r}; it must be in [0, 0.5)")


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Args:
        name: what the user calls it.
        mask: where the mask comes from: "magnitude", "wanda" or "sparsegpt".
        refined: whether DSnoT refines it.
        swapped: whether optimal exchanges of its entries follow.
        fitted: whether the kept values are then fitted by least squares.
    """

    name: str
    mask: str
    refined: bool = False
    swapped: bool = False
    fitted: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration inputs."""
        return self.refined or self.swapped or self.fitted or self.mask != "magnitude"

    @property
    def updates(self) -> bool:
        """Whether it changes the weights that stay."""
        return self.fitted or (self.mask == "sparsegpt" and not self.refined and not self.swapped)

    @property
    def hessian(self) -> bool:
        """Whether it needs XᵀX of the inputs."""
        return self.swapped or self.fitted or self.mask == "sparsegpt"


_MASKS = {
    "magnitude": ("magnitude", False),
    "wanda": ("wanda", False),
    "sparsegpt": ("sparsegpt", False),
    "dsnot": ("wanda", True),
    "magnitude+dsnot": ("magnitude", True),
    "wanda+dsnot": ("wanda", True),
    "sparsegpt+dsnot": ("sparsegpt", True),
}  # where a mask comes from, and whether DSnoT refines it
_STEPS = {"": (False, False), "+swap": (True, False), "+lsq": (False, True), "+swap+lsq": (True, True)}

METHODS = {
    name + after: Method(name + after, mask, refined, swapped, fitted)
    for after, (swapped, fitted) in _STEPS.items()
    for name, (mask, refined) in _MASKS.items()
}


def get_method(name: str) -> Method:
    """Return the method of that name, or raise a ConfigError that says how they are named."""
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"{arg('method')} is {name!r}; known: {', '.join(_MASKS)}, each alone or followed by "
            f"{', '.join(filter(None, _STEPS))}"
        )
    return METHODS[name]


def parse_patterns(values: Sequence[str]) -> str | dict[str, str]:
    """Return what `--pattern` means: one pattern, or {name: pattern} with the one without a name last, for all others.

    Raises:
        PatternError: two patterns without a name, or a name given twice.
    """
    named: dict[str, str] = {}
    plain = []
    for value in values:
        name, equals, pattern = value.rpartition("=")
        if not equals:
            plain.append(value)
        elif not name or name in named:
            what = "has no name before =" if not name else f"is the second for {name}"
            raise PatternError(f"{arg('pattern')} {value} {what}; write NAME=PATTERN, each name once")
        else:
            named[name] = pattern
    if len(plain) > 1:
        raise PatternError(
            f"{arg('pattern')} is given {len(plain)} times without a name ({', '.join(plain)}); one is enough, or "
            f"write NAME=PATTERN for layers of that name"
        )
    if not named:
        return plain[0]
    return named | ({".*": plain[0]} if plain else {})


@dataclass(frozen=True)
class PruneOptions:
    """The options of `spp.prune`, whose fields they are.

    Raises:
        ConfigError, PatternError, DataError: what is wrong with them whatever the model.

    Example:
        >>> PruneOptions("magnitude", "2:4").method
        'magnitude'
    """

    method: Annotated[
        str,
        Option(
            "magnitude, wanda, sparsegpt, dsnot, or one+dsnot, such as sparsegpt+dsnot. +swap after it exchanges mask "
            "entries while the layer's error falls; +lsq fits the kept values to the dense outputs: sparsegpt+lsq.",
            METHOD,
            choices=tuple(METHODS),
        ),
    ] = "wanda"
    pattern: Annotated[
        Patterns,
        Option(
            "N:M (N kept of every M) or the fraction pruned, such as 0.5. May be repeated: NAME=PATTERN for layers by "
            "name suffix or regular expression, the first that matches counts; one without NAME is for all others.",
            METHOD,
            many=True,
            parse=parse_patterns,
        ),
    ] = "2:4"
    calibration: Annotated[
        Any,  # token ids, texts, or what names them: spp.pruning.windows
        Option(
            "Data for the methods that look at activations: a text file (.txt, .md, .raw), rows of text or "
            "conversations (.json, .jsonl, .csv, .parquet), token ids (.pt, .safetensors), or a data set, "
            "NAME[:CONFIG[:SPLIT[:FIELD]]] with a folder or hub id as NAME, such as allenai/c4:en; or self: text that "
            "the model writes itself.",
            DATA,
            type=str,
        ),
    ] = None
    target_modules: Annotated[
        Names,
        Option("Names, a regular expression or all-linear; may be repeated.", MODEL, many=True, parse=parse_names),
    ] = None
    exclude_modules: Annotated[
        Names, Option("Names or a regular expression to leave dense.", MODEL, many=True, parse=parse_names)
    ] = None
    nsamples: Annotated[int, Option("Calibration windows at most.", DATA)] = 128
    seqlen: Annotated[int, Option("Tokens of a window that is cut from text.", DATA)] = 2048
    seed: Annotated[int, Option("Of the random choice of windows.", DATA)] = 0
    owl: Annotated[
        OWL | None,
        Option("Prune blocks with many outliers less (OWL); the pattern must be a fraction.", METHOD),
    ] = None
    keep_zeros: Annotated[
        bool,
        Option(
            "Keep zeros that the model has and count them as pruned, so that N:M keeps at most N; otherwise they are "
            "weights like any other, and sparsegpt fills them.",
            METHOD,
            negatable=True,
        ),
    ] = True
    reconstruct: Annotated[
        Reconstruction | None,
        Option(
            "Train each pruned block's kept weights until it gives the dense block's outputs again.",
            OPTIMISATION,
            prefix="Reconstruction",
        ),
    ] = None
    bos: Annotated[str, BOS_OPTION] = "auto"

    def __post_init__(self) -> None:
        method, owl = get_method(self.method), self.owl
        if self.reconstruct is not None and not isinstance(self.reconstruct, Reconstruction):
            raise ConfigError(
                f"{arg('reconstruct')} is {self.reconstruct!r}; pass spp.Reconstruction() with its options, or None"
            )
        if self.reconstruct is not None and self.reconstruct.adapter is not None:
            raise ConfigError(
                f"{arg('reconstruct', ...)} is to train an adapter beside a pruned model, which is yet to be made: "
                f"prune without it, and give {call('reconstruct')} the pruned model afterwards"
            )
        check_patterns(self.pattern)
        if owl is not None and not isinstance(owl, OWL):
            raise ConfigError(f"{arg('owl')} is {owl!r}; pass spp.pruning.OWL() with its options, or None")
        if owl is not None and (isinstance(self.pattern, Mapping) or Pattern.parse(self.pattern).is_nm):
            raise ConfigError(
                f"{arg('owl', ...)} gives blocks different fractions, so {arg('pattern')} must be one fraction; it is "
                f"{self.pattern!r}"
            )
        check_int("nsamples", self.nsamples, least=1)
        check_choice("bos", self.bos, BOS)
        check_int("seqlen", self.seqlen, least=1)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"{arg('seed')} is {self.seed!r}; it must be an int of at least 0 and below 2**64")
        check_names("target_modules", self.target_modules)
        check_names("exclude_modules", self.exclude_modules)
        if isinstance(self.calibration, (str, os.PathLike)):
            check_source(os.fspath(self.calibration))
        elif self.calibration is None and (method.calibrated or owl is not None or self.reconstruct is not None):
            who = arg("owl", ...) if owl is not None else arg("reconstruct", ...)
            who = f"method {self.method!r}" if method.calibrated else who
            raise ConfigError(
                f"{who} needs calibration data: pass {arg('calibration', ...)} (a text, JSON or JSONL file, token ids "
                f"(k, L) or a file of them, a data set; in Python a list of texts too, with {arg('tokenizer', ...)} "
                f"for all text); {arg('method', 'magnitude')} alone needs none"
            )

    @property
    def described(self) -> str | dict[str, str]:
        """The pattern that was asked for, as a report says it."""
        if isinstance(self.pattern, Mapping):
            return {name: str(Pattern.parse(value)) for name, value in self.pattern.items()}
        return str(Pattern.parse(self.pattern))


@dataclass(frozen=True, kw_only=True)
class PruneConfig(PruneOptions):
    """The options of `spp prune`: those of `spp.prune`, and what to read and write.

    Raises:
        ConfigError, PatternError, DataError: an option makes no sense; the message names it.
    """

    model: Annotated[str, Option("Directory or hub id of the dense model.", argument=True)]
    output: Annotated[Path, Option("Directory to write the pruned checkpoint to.", argument=True)]
    dtype: Annotated[
        str, Option("auto (the checkpoint's own), float32, bfloat16 or float16.", MODEL, choices=AUTO_DTYPES)
    ] = "auto"
    device: Annotated[str, Option("auto, cpu or cuda.", MODEL, choices=DEVICES)] = "auto"
    in_memory: Annotated[bool, Option("Load the whole model instead of one block at a time.", MODEL)] = False
    report: Annotated[Path | None, Option("JSON file to write what was done to each layer to.", RUN)] = None
    every: Annotated[bool, Option("List every layer in the table.", RUN, name="--all")] = False
    overwrite: Annotated[bool, Option("Replace an existing output.", RUN)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("model", self.model)
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, AUTO_DTYPES)


def check_patterns(pattern: Patterns) -> None:
    """Raise a PatternError where a pattern, or a name in a mapping of them, makes no sense."""
    for name, value in pattern.items() if isinstance(pattern, Mapping) else [(".*", pattern)]:
        Pattern.parse(value)
        try:
            re.compile(name)
        except (re.error, TypeError) as error:
            raise PatternError(f"{arg('pattern')}: the name {name!r} is not a regular expression: {error}") from None


# ---- Calibration data by name. Only the name is looked at, nothing is read.

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw", ".tokens")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
ROW_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
TENSOR_SUFFIXES = (".pt", ".safetensors")
_OTHER_SUFFIXES = (".gz", ".zip", ".zst", ".npy", ".bin", ".html", ".pdf", ".docx")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
KNOWN = (
    f"{', '.join(TEXT_SUFFIXES)} (plain text), {', '.join(ROW_SUFFIXES)} (rows of text or conversations), "
    f"{', '.join(TENSOR_SUFFIXES)} (token ids (k, L)), or a data set: a folder or hub id owner/name, as "
    f"NAME[:CONFIG[:SPLIT[:FIELD]]]; or {SELF}: text that the dense model writes itself"
)


@dataclass(frozen=True)
class DataSet:
    """A data set by name, and what of it is meant.

    Example:
        >>> DataSet.parse("allenai/c4:en::url")
        DataSet(name='allenai/c4', config='en', split='train', field='url')
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"

    @classmethod
    def parse(cls, text: str) -> DataSet | None:
        """Read NAME[:CONFIG[:SPLIT[:FIELD]]]; None where NAME is neither a folder nor like an id of the hub."""
        if Path(text).is_dir():
            return cls(text)
        name, *parts = text.split(":")
        if len(parts) > 3 or not (Path(name).is_dir() or _is_hub_id(name)):
            return None
        config, split, field = [part.strip() for part in parts] + [""] * (3 - len(parts))
        return cls(name, config or None, split or "train", field or "text")


def check_source(source: str) -> None:
    """Raise a DataError where a path or id names nothing that can be read; nothing is.

    Args:
        source: as in the head of this file.
    """
    path = Path(source)
    if is_self(source):
        return
    if path.is_file():
        if path.suffix.lower() not in ("", *TEXT_SUFFIXES, *ROW_SUFFIXES, *TENSOR_SUFFIXES):
            raise DataError(f"calibration file {source} ends in {path.suffix}, which is not understood; known: {KNOWN}")
    elif DataSet.parse(source) is None:
        raise DataError(f"{arg('calibration')} is {source[:200]!r}, which is no file; known: {KNOWN}")


def is_self(source: object) -> bool:
    """Whether this asks for text that the dense model writes itself."""
    return isinstance(source, str) and source == SELF


def own_tokens(source: str) -> int | None:
    """Return how many tokens `self` or `self:N` asks the dense model to write; None for any other name of data.

    Raises:
        ConfigError: N is no number of tokens.
    """
    name, colon, number = source.partition(":")
    if name != SELF:
        return None
    if colon and not (number.isascii() and number.isdigit() and int(number) > 0):
        raise ConfigError(f"{arg('data')} is {source!r}: behind {SELF}: stands how many tokens the dense model writes")
    return int(number) if colon else OWN_TOKENS


def is_ids(source: str) -> bool:
    """Whether a path names a file of token ids."""
    return Path(source).is_file() and Path(source).suffix.lower() in TENSOR_SUFFIXES


def is_data_set(source: str) -> bool:
    """Whether this names a data set rather than a file."""
    return not Path(source).is_file()


def _is_hub_id(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    is_file = suffix in (*TEXT_SUFFIXES, *ROW_SUFFIXES, *TENSOR_SUFFIXES, *_OTHER_SUFFIXES)
    return _HUB_ID.fullmatch(name) is not None and not name.startswith((".", "/", "~")) and not is_file


# ---- Mask updates.

# How the share that is exchanged shrinks, by the part of the updates that is done.
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "cubic": lambda done: (1 - done) ** 3,
}
DROPS = ("activation", "magnitude")
GROWS = ("gradient", "saliency")


@dataclass(frozen=True, kw_only=True)
class MaskUpdateOptions:
    """The options of mask updates; TuneConfig has each with the prefix `mask_update_`.

    Args:
        every: k, optimizer steps between two updates.
        fraction: share of a layer's kept weights that the first update exchanges at most, in [0, 1].
        until: part of the steps, in (0, 1], after which masks stay.
        decay: how the fraction shrinks to 0 until then, "cosine" or "cubic".
        drop: what goes, by "activation" or "magnitude".
        grow: what comes, by "gradient" or "saliency".

    Raises:
        ConfigError: an option makes no sense; the message names it as TuneConfig does.
    """

    every: int
    fraction: float = 0.1
    until: float = 0.75
    decay: str = "cosine"
    drop: str = "activation"
    grow: str = "gradient"

    def __post_init__(self) -> None:
        check_int("mask_update_every", self.every, least=1)
        check_number("mask_update_fraction", self.fraction, least=0.0, most=1.0)
        check_number("mask_update_until", self.until, above=0.0, most=1.0)
        check_choice("mask_update_decay", self.decay, tuple(DECAYS))
        check_choice("mask_update_drop", self.drop, DROPS)
        check_choice("mask_update_grow", self.grow, GROWS)
