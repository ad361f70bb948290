"""SPPConfig: how a model is adapted, in one frozen, validated, serialisable value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from spp.errors import ConfigError

FORMAT_VERSION = 1
DROPOUT_MODES = ("input", "alpha")
INITS = ("paper",)


@dataclass(frozen=True)
class SPPConfig:
    """The options of an SPP adapter (SPP, Lu et al. 2024, §3; defaults of its §4).

    Args:
        r: rows of W_α (r, n): each row scales one contiguous block of about m / r output rows.
        scaling: s, the factor of the residual branch; the authors' lora_alpha / r.
        dropout: probability p in [0, 1), used in training only.
        dropout_mode: "input" drops entries of X in the residual branch (the paper's formula; five products);
            "alpha" drops entries of W_α (three products; a different regulariser).
        target_modules: None (the projections of the decoder blocks, see spp.targets), "all-linear",
            a list of name suffixes, or a regular expression that must match the whole module path.
        exclude_modules: a list of name suffixes or a regular expression of modules to leave alone.
        rank_pattern: {name suffix or regular expression: r} for modules whose rank differs from `r`.
        init: "paper": W_α Kaiming-uniform with a = √5, W_β zero.
        rule: "spp"; or a peer's, which keeps the mask too, in place of W_α and W_β: "hira" (W scaled by 1 + s·B A) or
            "masked_lora" (W plus s·B A on the mask), of rank r. r and scaling default to SPP's; PEFT's HiRA has no
            factor, scaling=1.0, and about as many parameters as SPP's r=16 at r=8.
        packed: keep the frozen weights packed (kept values and a mask) instead of dense.
        seed: draw each layer from a generator keyed by (seed, module path); None uses torch's global generator.
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
    init: str = "paper"
    rule: str = "spp"
    packed: bool = False
    seed: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        if self.rank_pattern is not None:
            if not isinstance(self.rank_pattern, Mapping) or not all(isinstance(k, str) for k in self.rank_pattern):
                raise ConfigError(
                    f"rank_pattern is {self.rank_pattern!r}; it must map names or regular expressions to r"
                )
            for name, r in self.rank_pattern.items():
                _check_rank(f"rank_pattern[{name!r}]", r)
                _check_regex("rank_pattern", name)
        if not _is_number(self.scaling) or not math.isfinite(self.scaling) or self.scaling <= 0:
            raise ConfigError(f"scaling is {self.scaling!r}; it must be a finite number above 0 (the paper's is 2.0)")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}; it must be in [0, 1)")
        if self.dropout_mode not in DROPOUT_MODES:
            raise ConfigError(f"dropout_mode is {self.dropout_mode!r}; known: {', '.join(DROPOUT_MODES)}")
        if self.init not in INITS:
            raise ConfigError(f"init is {self.init!r}; known: {', '.join(INITS)}")
        if not isinstance(self.rule, str):
            raise ConfigError(f"rule is {self.rule!r}; it must be the name of a rule, such as 'spp'")
        if not isinstance(self.packed, bool):
            raise ConfigError(f"packed is {self.packed!r}; it must be True or False")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ConfigError(f"seed is {self.seed!r}; it must be an int or None")
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
        values = asdict(self)
        for field in ("target_modules", "exclude_modules"):
            if isinstance(values[field], tuple):
                values[field] = list(values[field])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SPPConfig:
        """Build a config from `to_dict`'s values; an unknown field is a ConfigError that names it."""
        known = {f.name for f in fields(cls)}
        version = values.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            return cls(format_version=version)  # raises with the message about versions
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown config fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**dict(values))


def is_suffix(path: str, name: str) -> bool:
    """Whether `name` is the path of a module, or of its parameter `weight`, or the last components of it."""
    return f".{path}".endswith("." + name) or f".{path}".endswith(f".{name}.weight")


def name_matches(path: str, name: str) -> bool:
    """Whether `name` means the module at `path`: as `is_suffix`, or a regular expression for the whole path."""
    return is_suffix(path, name) or any(re.fullmatch(name, p) for p in (path, path.removesuffix(".weight")))


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # beyond, float() is an error of its own
    return isinstance(value, float)


def _check_rank(name: str, r: object) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"{name} is {r!r}; it must be an int of at least 1")


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def check_names(field: str, names: object) -> str | tuple[str, ...] | None:
    """Return what `target_modules` or `exclude_modules` is, names as a tuple; a ConfigError where it makes no sense."""
    if names is None:
        return None
    if isinstance(names, str):
        if not names:
            raise ConfigError(f"{field} is an empty string; pass None for the default, or names")
        _check_regex(field, names)
        return names
    if isinstance(names, (Sequence, set, frozenset)) and all(isinstance(n, str) and n for n in names):
        if not names:
            raise ConfigError(f"{field} is empty; pass None for the default, or names")
        return tuple(sorted(names)) if isinstance(names, (set, frozenset)) else tuple(names)
    raise ConfigError(f"{field} is {names!r}; it must be None, a string, or a list of names")
