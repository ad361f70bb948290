"""The adapters that are merged together, and what they do to each layer.

W_eff = W · (1 + Σ_t w_t·(s_t·β_t) · A_t)      for SPP; the sum of spp.rules.terms, rounded once; w_t its weight
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spp.errors import ConfigError
from spp.rules import Adapter, get_rule
from spp.rules.terms import TermsRule
from spp.wrapping.adapter_files import AdapterFiles, read_adapter

PathLike = str | os.PathLike[str]
AdapterLike = PathLike | Sequence[PathLike | tuple[PathLike, float]]


@dataclass(frozen=True)
class Part:
    """One adapter, and how much of it is merged.

    Attributes:
        layers: {module path: the rule's parameters}.
    """

    files: AdapterFiles
    weight: float
    layers: dict[str, tuple[Tensor, ...]]


def read_parts(adapters: AdapterLike) -> list[Part]:
    """Read one adapter, or several with a weight each.

    Raises:
        ConfigError: there is none, one comes twice, or a weight is no finite number.
        AdapterError, CheckpointError, NonFiniteError: as `read_adapter`.
    """
    if isinstance(adapters, (str, os.PathLike)):
        return [_part(adapters, 1.0)]
    parts = [_part(path, weight) for path, weight in map(_pair, adapters)]
    if not parts:
        raise ConfigError("there is no adapter to merge")
    places = [os.path.realpath(part.files.source) for part in parts]
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        raise ConfigError(f"the adapter {twice[0]} comes twice; add its weights up")
    return parts


def _part(path: PathLike, weight: float) -> Part:
    files = read_adapter(Path(path))
    return Part(files, weight, files.layers())


def _pair(entry: Any) -> tuple[PathLike, float]:
    if isinstance(entry, (str, os.PathLike)):
        return entry, 1.0
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        path, weight = entry
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
        if isinstance(path, (str, os.PathLike)) and number:
            return path, float(weight)
    raise ConfigError(f"{entry!r} is no adapter; pass its directory, or (directory, weight) with a finite number")


def sum_of(parts: Sequence[Part]) -> dict[str, Adapter]:
    """Return {module path: what is merged into it}."""
    found: dict[str, list[Adapter]] = {}
    for part in parts:
        rule, scaling = get_rule(part.files.config.rule), part.weight * part.files.config.scaling
        for path, params in part.layers.items():
            found.setdefault(path, []).append(Adapter(rule, params, scaling))
    return {path: _sum(path, terms) for path, terms in sorted(found.items())}


def _sum(path: str, terms: list[Adapter]) -> Adapter:
    if len(terms) == 1:
        return terms[0]
    rule = terms[0].rule
    others = sorted({term.rule.name for term in terms} - {rule.name})
    if others:
        raise ConfigError(f"{path}: adapters of the rules {rule.name} and {others[0]} cannot be summed up")
    ranks = tuple(rule.rank([p[0] if p.ndim == 3 else p for p in term.params]) for term in terms)
    scalings = tuple(term.scaling for term in terms)
    return Adapter(TermsRule(rule, ranks, scalings), tuple(p for term in terms for p in term.params), 1.0)
