"""The adapters that are merged on disk, and where the weights are stored that they change.

W_eff = W · (1 + Σ_t w_t·(s_t·β_t) · A_t)      for SPP; the sum of spp.rules.terms, rounded once

A weight lies mostly under the path of the layer. Where disk and memory name weights differently, or keep experts apart
and together, transformers' own conversion tables say which tensors they are (spp.models.disk_keys).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spp.certifying.sources import input_axes, require_projections
from spp.errors import AdapterError, ConfigError, StreamingError, call
from spp.files import CheckpointReader, dtype_name
from spp.models.disk_keys import DiskKeys, Group
from spp.models.projection import find_projections
from spp.rules import Adapter, Rule, get_rule
from spp.rules.terms import TermsRule
from spp.weights import FLOATS
from spp.weights.base import as_matrices
from spp.weights.packed.disk import is_packed
from spp.wrapping.adapter_files import AdapterFiles, read_adapter

logger = logging.getLogger(__name__)
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
    if isinstance(adapters, Mapping):  # whose weights would be passed over
        raise ConfigError("adapters are given as a dict; pass pairs instead: [(path, weight), …]")
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
    """Return {module path: what is merged into it}; a weight w_t multiplies the scaling s_t of its adapter."""
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
    ranks = tuple(_rank(rule, term.params) for term in terms)
    scalings = tuple(term.scaling for term in terms)
    return Adapter(TermsRule(rule, ranks, scalings), tuple(p for term in terms for p in term.params), 1.0)


def _rank(rule: Rule, params: Sequence[Tensor]) -> int:
    """Return the rank of an adapter's parameters, of fused experts those of each."""
    return rule.rank([p[0] if p.ndim == 3 else p for p in params])


# ---- Where the weights are stored.


@dataclass(frozen=True)
class Place:
    """Where the weight of one layer is stored.

    Args:
        path: of the layer, as the adapter names it.
        keys: of the tensors on disk.
        shape: of the weight: two dimensions, or three with experts in front.
        transposed: whether inputs run along the last axis but one.
        group: how they become one tensor of the model; None for a single one that is the weight.
        disk: the table of keys that the group is of.
    """

    path: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    group: Group | None = None
    disk: DiskKeys | None = None

    @property
    def fused(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return len(self.shape) == 3

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Return the weight as matrices (m, n), one or one an expert: views."""
        return as_matrices(weight, transposed=self.transposed)

    def weight(self, reader: CheckpointReader) -> Tensor:
        """Return the weight as it is in memory."""
        if self.group is None:
            return reader.tensor(self.keys[0])
        joined = self.joined(reader)
        return joined[self.name_among(joined)]

    def joined(self, reader: CheckpointReader) -> dict[str, Tensor]:
        """Return the tensors in memory that the group becomes."""
        assert self.disk is not None and self.group is not None
        return self.disk.join(self.group, reader.tensor)

    def split(self, joined: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors on disk that those of the group are stored as."""
        assert self.disk is not None
        return self.disk.split(joined)

    def name_among(self, joined: Iterable[str]) -> str:
        """Return the name of the weight among those of its group."""
        return next(name for name in joined if name in (self.path, f"{self.path}.weight"))

    def check(self, rule: Rule, params: Sequence[Tensor]) -> None:
        """Raise an AdapterError unless an adapter's parameters fit the weight."""
        m, n = self.shape[-1:-3:-1] if self.transposed else self.shape[-2:]
        if self.fused:
            if all(p.ndim == 2 for p in params):
                raise AdapterError(f"{self.path}: {self.keys[0]} is {self.shape}; expected a matrix, as the adapter's")
            if any(p.ndim != 3 or p.shape[0] != self.shape[0] for p in params):
                found = ", ".join(str(tuple(p.shape)) for p in params)
                raise AdapterError(f"{self.path}: the base has {self.shape[0]} experts there; the adapter has {found}")
            params = [p[0] for p in params]
        rule.check_shapes(params, m, n, where=self.path)


def find_places(reader: CheckpointReader, parts: Sequence[Part]) -> list[Place]:
    """Return the places of all layers of some adapters in a checkpoint.

    Raises:
        ConfigError: the checkpoint is packed.
        AdapterError: layers that the checkpoint does not have, or that do not fit, all of an adapter in one message.
    """
    if is_packed(reader):
        raise ConfigError(
            f"{reader.directory} is packed; {call('export_dense', 'dir, out')} gives the dense checkpoint"
        )
    found = locate(reader, list(dict.fromkeys(path for part in parts for path in part.layers)))
    for part in parts:
        _check(reader, part, found)
    return list(found.values())


def _check(reader: CheckpointReader, part: Part, found: dict[str, Place]) -> None:
    files, layers, masks = part.files, part.layers, part.files.base_masks or {}
    files.warn_unchecked()
    problems = [f"{path}: the adapter lacks it" for path in masks.keys() - layers.keys()]
    rule = get_rule(files.config.rule)
    for path, params in layers.items():
        place = found.get(path)
        if place is None:
            problems.append(f"{path}: the base has no {path}.weight")
            continue
        wrong = [key for key in place.keys if reader.dtype(key) not in FLOATS.values()]
        if wrong or len(place.shape) not in (2, 3):
            key = (wrong or place.keys)[0]
            stored = f"{dtype_name(reader.dtype(key))} {reader.shape(key)}"
            problems.append(f"{path}: {key} is {stored}; expected a floating-point matrix")
            continue
        try:
            place.check(rule, params)
            r, said = _rank(rule, params), files.config.rank_for(path)
            if r != said:
                problems.append(f"{path}: the adapter is of rank {r}; its config says {said}")
        except (AdapterError, ConfigError) as error:
            problems.append(str(error))
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise AdapterError(f"the adapter in {files.source} does not fit the base {reader.directory}:\n  {listing}")


def locate(reader: CheckpointReader, paths: Sequence[str]) -> dict[str, Place]:
    """Return {path: place} of the layers that a checkpoint has.

    Raises:
        CheckpointError: the zeros of some projections cannot be read: of what is made of it no certificate could speak.
    """
    require_projections(reader, whole=True)
    found = _by_name(reader, paths)
    return found | _by_table(reader, [path for path in paths if path not in found])


def _by_name(reader: CheckpointReader, paths: Sequence[str]) -> dict[str, Place]:
    axes = input_axes(reader)
    found = {}
    for path in paths:
        key = next((key for key in (f"{path}.weight", path) if key in reader), None)
        if key is not None:
            shape = reader.shape(key)
            found[path] = Place(path, (key,), shape, axes.get(key, 1) == len(shape) - 2)
    return found


def find_also(reader: CheckpointReader, parts: Sequence[Part]) -> dict[str, str]:
    """Return {key on disk: parameter name} of what some adapters trained as a whole.

    Raises:
        AdapterError: the checkpoint lacks some, or has them in another shape; all of an adapter in one message.
    """
    names = dict.fromkeys(name for part in parts for name in part.files.also)
    found = {name: name for name in names if name in reader}
    table = _table(reader) if len(found) < len(names) else None
    if table is not None:
        disk = table[1]
        single = {name: key for key, name in disk.memory.items() if disk.group_of(key) is None}
        found |= {name: single[name] for name in names if name not in found and name in single}
    for part in parts:
        problems = []
        for name, tensor in part.files.also.items():
            there = reader.shape(found[name]) if name in found else None
            if there is None:
                problems.append(f"{name}: the base has no such tensor")
            elif there != tuple(tensor.shape) or reader.dtype(found[name]) not in FLOATS.values():
                stored = f"{dtype_name(reader.dtype(found[name]))} {there}"
                problems.append(f"{name}: the base's is {stored}; the adapter's is {tuple(tensor.shape)}")
        if problems:
            raise AdapterError(
                f"the adapter in {part.files.source} does not fit the base {reader.directory}:\n  "
                + "\n  ".join(sorted(problems))
            )
    return {key: name for name, key in found.items()}


def _table(reader: CheckpointReader) -> tuple[Any, DiskKeys] | None:
    """Return a checkpoint's model without values, and its table of keys; None where there is none."""
    from spp.models.streamed import skeleton

    try:
        model = skeleton(reader, None)
        return model, DiskKeys(model, {key: reader.shape(key) for key in reader})
    except (StreamingError, ConfigError) as error:
        logger.warning("cannot tell how %s names its weights: %s", reader.directory, error)
        return None


def _by_table(reader: CheckpointReader, paths: Sequence[str]) -> dict[str, Place]:
    """Find the weights of layers that the disk names otherwise, by a model without values."""
    table = _table(reader) if paths else None
    if table is None:
        return {}
    model, disk = table
    single = {name: key for key, name in disk.memory.items() if disk.group_of(key) is None}
    groups = {name: group for group in disk.groups.values() for name in group.memory}
    found = {}
    for projection in find_projections(model):
        name, path = projection.parameter_path, projection.path
        group = groups.get(name)
        keys = group.disk if group is not None else (single[name],) if name in single else ()
        if path in paths and keys:
            found[path] = Place(path, keys, projection.shape, projection.input_axis == -2, group, disk)
    return found
