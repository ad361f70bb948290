"""PSTConfig: how a model is wrapped for PST; and the checks of its schedule (the formula: spp.pst.function)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from spp.configs.checks import check_int, check_names, check_number, check_seed
from spp.configs.pattern import Pattern
from spp.errors import ConfigError, PatternError, arg

FORMAT_VERSION = 1
_LARGEST = 3.4028234663852886e38  # of float32
_TOO_LARGE = 2**63  # whole numbers from here on are none that torch takes


@dataclass(frozen=True, kw_only=True)
class PSTConfig:
    """The options of `spp.pst.wrap`.

    Args:
        weight_rank, weight_scale, mask_rank, low_rank_scale, structured_scale: as in PSTLinear.
        pattern: "N:M", or None for a mask over each whole matrix.
        target_modules: None, "all-linear", names, or a regular expression. None is the projections of a causal
            language model, and every linear in the blocks of an encoder.
        exclude_modules: names, or a regular expression, of what to leave out.
        modules_to_save: names of modules that train and are saved as a whole; None is the new head of a classifier,
            () is none.
        seed: of the initial values, keyed by module path; None draws from torch's global generator.
        format_version: version of this format; another one than this library's is refused.

    Raises:
        ConfigError: an option makes no sense; the message names it.

    Example:
        >>> PSTConfig(pattern="2:4").mask_rank
        8
    """

    weight_rank: int = 8
    weight_scale: float = 1.0
    mask_rank: int = 8
    low_rank_scale: float = 1.0
    structured_scale: float = 1.0
    pattern: str | None = None
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    seed: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_options(self.weight_rank, self.weight_scale, self.mask_rank, self.low_rank_scale, self.structured_scale)
        parsed = check_pattern(self.pattern)
        object.__setattr__(self, "pattern", None if parsed is None else str(parsed))
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, check_names(name, getattr(self, name)))
        saved = self.modules_to_save
        if saved is not None:
            if not isinstance(saved, (list, tuple)) or not all(isinstance(n, str) and n for n in saved):
                raise ConfigError(f"{arg('modules_to_save')} is {saved!r}; it must be None or a list of names")
            object.__setattr__(self, "modules_to_save", tuple(saved))
        check_seed(self.seed)
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"this PST config has format_version {self.format_version!r}; this version of spp reads "
                f"{FORMAT_VERSION}: install a newer spp"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PSTConfig:
        """Build a config from `to_dict`'s values; an unknown field is a ConfigError that names it."""
        if values.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            return cls(format_version=values["format_version"])  # raises with the message about versions
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown PST config fields {', '.join(unknown)}")
        options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**options)


def check_options(
    weight_rank: object, weight_scale: object, mask_rank: object, low_rank_scale: object, structured_scale: object
) -> None:
    """Raise a ConfigError, naming it, for an option that makes no sense."""
    check_int("weight_rank", weight_rank, least=1)
    check_int("mask_rank", mask_rank, least=1)
    scales = (
        ("weight_scale", weight_scale),
        ("low_rank_scale", low_rank_scale),
        ("structured_scale", structured_scale),
    )
    for name, scale in scales:
        whole = isinstance(scale, int) and not isinstance(scale, bool) and abs(scale) < _TOO_LARGE
        if not whole and not (isinstance(scale, float) and abs(scale) <= _LARGEST):
            raise ConfigError(f"{arg(name)} is {scale!r:.40}; it must be a finite number")


def check_pattern(pattern: str | Pattern | None) -> Pattern | None:
    """Return the parsed N:M pattern, or None; a PatternError for a fraction."""
    if pattern is None:
        return None
    parsed = Pattern.parse(pattern)
    if not parsed.is_nm:
        raise PatternError(
            f"{arg('pattern')} is {pattern!r}; it must be N:M or None: a fraction is the schedule's final_sparsity"
        )
    return parsed


def check_schedule(initial_warmup: float, final_warmup: float, initial_sparsity: float, final_sparsity: float) -> None:
    """Raise a ConfigError, naming the number that is out of its range, unless a schedule can have these."""
    for name, share in (("initial_warmup", initial_warmup), ("final_warmup", final_warmup)):
        check_number(name, share, least=0.0, most=1.0)
    for name, sparsity in (("initial_sparsity", initial_sparsity), ("final_sparsity", final_sparsity)):
        check_number(name, sparsity, least=0.0, below=1.0)
    if initial_warmup + final_warmup > 1:
        raise ConfigError(
            f"{arg('initial_warmup')} + {arg('final_warmup')} is {initial_warmup + final_warmup}; it must be at most 1"
        )
    if initial_sparsity > final_sparsity:
        raise ConfigError(
            f"{arg('initial_sparsity')} is {initial_sparsity}, above the final sparsity {final_sparsity}: sparsity "
            f"only grows"
        )
