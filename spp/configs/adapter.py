"""SPPConfig: how a model is adapted, in one frozen, validated, serialisable value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from spp.configs.checks import (
    check_choice,
    check_flag,
    check_int,
    check_names,
    check_number,
    check_regex,
    check_seed,
    is_suffix,
    name_matches,
)
from spp.errors import ConfigError, arg

FORMAT_VERSION = 1
DROPOUT_MODES = ("input", "alpha")
INITS = ("paper",)  # what files may say of the start: W_α Kaiming-uniform with a = √5, W_β zero
ALSO = ("norms", "biases", "head")  # what may train beside the adapter
ALSO_LR = 1e-3  # of that: norms and biases are not small beside their steps, as W_α and W_β are
RULES = ("spp", "hira", "masked_lora", "full")  # the names of spp.rules.RULES
ACTIVATIONS = ("full", "bfloat16")  # what layers keep of their inputs for backward


def parse_ranks(values: Sequence[str]) -> dict[str, int]:
    """Return what `--rank-pattern` means: the rank of each NAME=R.

    Raises:
        ConfigError: one is not of this form, or a name comes twice.
    """
    ranks: dict[str, int] = {}
    for value in values:
        name, _, r = value.rpartition("=")
        if not name or name in ranks or not r.strip().isdecimal():
            raise ConfigError(f"{arg('rank_pattern')} {value} is not understood; write NAME=R, each name once")
        ranks[name] = int(r)
    return ranks


def check_also_train(value: object) -> tuple[str, ...]:
    """Return what `also_train` names, in the order of ALSO; a string has a + between the names.

    Raises:
        ConfigError: a name is none of ALSO.
    """
    names = (value.split("+") if value else ()) if isinstance(value, str) else value
    if not isinstance(names, (Sequence, set, frozenset)) or not all(name in ALSO for name in names):
        raise ConfigError(f"{arg('also_train')} is {value!r}; it must be names out of {', '.join(ALSO)}")
    return tuple(name for name in ALSO if name in names)


@dataclass(frozen=True)
class SPPConfig:
    """The options of an SPP adapter (SPP, Lu et al. 2024, §3; defaults of its §4).

    Args:
        r: rows of W_α (r, n): each row scales one contiguous block of about m / r output rows.
        scaling: s, the factor of the residual branch; the authors' lora_alpha / r.
        dropout: probability p in [0, 1), used in training only.
        dropout_mode: "input" drops entries of X in the residual branch (the paper's formula; five products);
            "alpha" drops entries of W_α (three products; a different regulariser).
        target_modules: None (the projections of the decoder blocks, see spp.models.targets), "all-linear",
            a list of name suffixes, or a regular expression that must match the whole module path.
        exclude_modules: a list of name suffixes or a regular expression of modules to leave alone.
        rank_pattern: {name suffix or regular expression: r} for modules whose rank differs from `r`.
        rule: "spp"; or another that keeps the mask, in place of W_α and W_β: "hira" (W scaled by 1 + s·B A) or
            "masked_lora" (W plus s·B A on the mask), of rank r. r and scaling default to SPP's; PEFT's HiRA has no
            factor, scaling=1.0, and about as many parameters as SPP's r=16 at r=8. "full" trains every kept weight
            (W plus D on the mask): it has neither r nor scaling, and writes 1 for both.
        packed: keep the frozen weights packed (kept values and a mask) instead of dense.
        seed: draw each layer from a generator keyed by (seed, module path); None uses torch's global generator.
        also_train: what else trains, out of "norms", "biases" (of linears) and "head" (the output head, refused where
            it is tied): spp.wrapping.also. A string has a + between the names.
        format_version: version of this format; a newer one than this library knows is refused.

    Raises:
        ConfigError: an option makes no sense; the message names it.

    Example:
        >>> SPPConfig(r=8, dropout=0.05).to_dict()["r"]
        8
    """

    r: int = 16
    scaling: float = 2.0
    dropout: float = 0.0
    dropout_mode: str = "input"
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] | None = None
    rule: str = "spp"
    packed: bool = False
    seed: int | None = None
    also_train: str | tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_int("r", self.r, least=1)
        self._check_rank_pattern()
        if self.rule == "full":
            self._check_full()
        check_number("scaling", self.scaling, above=0.0)
        check_number("dropout", self.dropout, least=0.0, below=1.0)
        check_choice("dropout_mode", self.dropout_mode, DROPOUT_MODES)
        if not isinstance(self.rule, str):
            raise ConfigError(f"{arg('rule')} is {self.rule!r}; it must be the name of a rule, such as 'spp'")
        check_flag("packed", self.packed)
        check_seed(self.seed)
        object.__setattr__(self, "also_train", check_also_train(self.also_train))
        if not isinstance(self.format_version, int) or not 1 <= self.format_version <= FORMAT_VERSION:
            raise ConfigError(
                f"this adapter config has format_version {self.format_version!r}; this version of spp reads "
                f"1 to {FORMAT_VERSION}: install a newer spp"
            )
        object.__setattr__(self, "scaling", float(self.scaling))
        object.__setattr__(self, "dropout", float(self.dropout))
        for field in ("target_modules", "exclude_modules"):
            object.__setattr__(self, field, check_names(field, getattr(self, field)))
        if self.rank_pattern is not None:
            object.__setattr__(self, "rank_pattern", dict(sorted(self.rank_pattern.items())))

    def _check_rank_pattern(self) -> None:
        ranks = self.rank_pattern
        if ranks is None:
            return
        if not isinstance(ranks, Mapping) or not all(isinstance(name, str) for name in ranks):
            raise ConfigError(f"{arg('rank_pattern')} is {ranks!r}; it must map names or regular expressions to r")
        for name, r in ranks.items():
            check_int(f"rank_pattern[{name!r}]", r, least=1)
            check_regex("rank_pattern", name)

    def _check_full(self) -> None:
        """Raise for a rank or a scaling that is asked of a rule without them; write 1 for both."""
        for name in ("r", "scaling"):
            value = getattr(self, name)
            if value not in (1, getattr(type(self), name)):
                raise ConfigError(
                    f"{arg(name)} is {value!r}, which means nothing to {arg('rule', 'full')}: leave it out"
                )
            object.__setattr__(self, name, 1)
        if self.rank_pattern:
            raise ConfigError(f"{arg('rank_pattern', ...)} is given, but {arg('rule', 'full')} has no ranks")

    def rank_for(self, path: str) -> int:
        """Return the rank for a module path: its `rank_pattern` entry, or `r` where it has none.

        A name comes before a regular expression, a longer entry before a shorter one.
        """
        ranks = self.rank_pattern or {}
        matching = [name for name in ranks if name_matches(path, name)]
        matching = [name for name in matching if is_suffix(path, name)] or matching
        return ranks[max(matching, key=lambda name: (len(name), name))] if matching else self.r

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        values = {**asdict(self), "init": INITS[0]}
        for field in ("target_modules", "exclude_modules", "also_train"):
            if isinstance(values[field], tuple):
                values[field] = list(values[field])
        if not self.also_train:  # so that other adapters' files are what they were before there was one
            del values["also_train"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SPPConfig:
        """Build a config from `to_dict`'s values; an unknown field is a ConfigError that names it."""
        known = {*(f.name for f in fields(cls)), "init"}
        version = values.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            return cls(format_version=version)  # raises with the message about versions
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown config fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        check_choice("init", values.get("init", INITS[0]), INITS)
        return cls(**{name: value for name, value in values.items() if name != "init"})
