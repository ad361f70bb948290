"""PSTConfig: how a model is wrapped for PST."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from spp.config import check_names
from spp.errors import ConfigError
from spp.pst.layer import check_options, check_pattern

FORMAT_VERSION = 1


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

    Raises:
        ConfigError: an option makes no sense; the message names it.
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
                raise ConfigError(f"modules_to_save is {saved!r}; it must be None or a list of names")
            object.__setattr__(self, "modules_to_save", tuple(saved))
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ConfigError(f"seed is {self.seed!r}; it must be an int or None")
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
