"""Which tensors on disk make up which of a model: transformers' own conversion tables, asked both ways.

Disk and memory mostly name weights alike. Where they do not (Mixtral keeps w1, w2, w3 of each expert apart on disk and
fused in memory), a *group* of tensors on disk becomes a group in memory and back:

    join    {disk key: tensor} of a group  →  {memory key: tensor}        what loading does
    split   {memory key: tensor} of it     →  {disk key: tensor}          what saving does
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp.errors import StreamingError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Tensors on disk that are converted together.

    Args:
        disk: their keys, in the order in which experts are stacked.
        memory: the keys of what they become.
    """

    disk: tuple[str, ...]
    memory: tuple[str, ...]


class DiskKeys:
    """The keys of a checkpoint beside those of a model.

    Args:
        model: a transformers model; it may be on the meta device.
        shapes: {disk key: shape}.
        packed: {memory key: what has the shape} of weights that the model holds packed, under other keys.

    Raises:
        StreamingError: a conversion cannot be taken back, or does not give what the model has.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape], packed: Mapping[str, Tensor] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model = model
        self._shapes = dict(shapes)
        self._state: dict[str, Tensor] = {**model.state_dict(), **(packed or {})}
        self._conversions: list[Any] = list(get_model_conversion_mapping(model) or [])  # empty: all names agree
        self._patterns: dict[str, str] = {}  # {disk key: the pattern of its converter}
        self._first: dict[str, str] = {}  # {disk key of a group: the memory key that names it}
        self.memory: dict[str, str] = {}  # {disk key: memory key}, of a group: its first
        self.groups: dict[str, Group] = {}  # {first memory key: group}
        self._read(sorted(shapes, key=_natural))
        for name in self.groups:
            self._check(name)

    def group_of(self, disk_key: str) -> Group | None:
        """Return the group that a disk key belongs to; None where disk and memory hold the same tensor."""
        return self.groups.get(self._first.get(disk_key, ""))

    def join(self, group: Group, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the tensors in memory that a group becomes; `get` returns one from disk."""
        name = self._first[group.disk[0]]
        pattern = self._patterns[group.disk[0]]
        found = next(c for c in self._conversions if hasattr(c, "operations") and pattern in c.source_patterns)
        converter = deepcopy(found)
        for key in group.disk:
            converter.add_tensor(name, key, self._patterns[key], get(key))
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def experts(self, group: Group, name: str) -> list[Group] | None:
        """Return a group in parts, each of which `join` makes the weight of one expert; None where that is not so.

        Args:
            name: of the fused weight in memory, the only one that the group becomes.
        """
        count, *matrix = self._state[name].shape
        size = len(group.disk) // count
        if group.memory != (name,) or size * count != len(group.disk):
            return None
        parts = [Group(group.disk[size * e : size * (e + 1)], group.memory) for e in range(count)]
        try:
            made = [self.join(part, self._without_values) for part in parts]
        except Exception:  # whatever a conversion raises that takes all experts together
            return None
        return parts if all(tuple(one[name].shape) == (1, *matrix) for one in made) else None

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors on disk that those of a group in memory, {memory key: tensor}, are stored as."""
        from transformers.core_model_loading import revert_weight_conversion

        before = self._model.__dict__.get("_weight_conversions")
        self._model._weight_conversions = self._conversions
        try:
            return dict(revert_weight_conversion(self._model, dict(tensors)))
        finally:
            if before is None:
                del self._model._weight_conversions
            else:
                self._model._weight_conversions = before

    def _read(self, keys: list[str]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        prefix, disk = self._model.base_model_prefix, dict[str, list[str]]()
        for key in keys:
            name, pattern = key, None
            if key not in self._state:
                name, pattern = rename_source_key(key, renamings, converters, prefix, self._state)
            if pattern is None or name not in self._state:
                self.memory[key] = name if name in self._state else key
            else:
                self.memory[key] = self._first[key] = name
                self._patterns[key] = pattern
                disk.setdefault(name, []).append(key)
        self.groups = {name: Group(tuple(keys), ()) for name, keys in disk.items()}

    def _without_values(self, key: str) -> Tensor:
        return torch.empty(self._shapes[key], device="meta")

    def _check(self, name: str) -> None:
        """Convert a group without its values and back: it must give what the model has, and itself again."""
        group, shapes = self.groups[name], self._shapes
        try:
            made = self.join(group, self._without_values)
            back = self.split(made)
        except Exception as error:  # whatever the conversion of an architecture raises
            raise StreamingError(
                f"{group.disk[0]} cannot be converted to {name}: {type(error).__name__}: {error}"
            ) from error
        wrong = [key for key, t in made.items() if key not in self._state or t.shape != self._state[key].shape]
        if wrong or {k: tuple(t.shape) for k, t in back.items()} != {key: shapes[key] for key in group.disk}:
            raise StreamingError(
                f"{group.disk[0]} and {len(group.disk) - 1} more tensors on disk do not convert to "
                f"{(wrong or [name])[0]} of the model and back"
            )
        self.groups[name] = Group(group.disk, tuple(made))


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Return a sort key that takes digits as integers: experts are stacked in this order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
