"""A model in memory under the names of a checkpoint, which may store weights otherwise than they are held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from threading import Lock

from torch import Tensor

from spp.checkpoint.sources import Source, input_axes
from spp.checkpoint_keys import DiskKeys, Group
from spp.errors import StreamingError
from spp.files import CheckpointReader


def same_names(one: Source, other: Source) -> tuple[Source, Source]:
    """Return both under the names on disk, where one is a model in memory and the other a checkpoint."""
    if other.reader is not None:
        one = _as_on_disk(one, other.reader)
    if one.reader is not None:
        other = _as_on_disk(other, one.reader)
    return one, other


def _as_on_disk(source: Source, reader: CheckpointReader) -> Source:
    """Return a model's weights as the checkpoint stores them; as they are, where that is all the same or not known."""
    if source.model is None or all(key in reader for key in source.axes):
        return source
    keys = _disk_keys(source, reader)
    if keys is None:
        return source
    groups = {key: group for key in reader if (group := keys.group_of(key)) is not None and _holds(source, group)}
    names = {key: keys.memory[key] for key in reader if keys.group_of(key) is None}  # in memory, of the same tensor
    on_disk = input_axes(reader)
    ordered = sorted(reader, key=lambda key: (getattr(keys.group_of(key), "disk", ()), key))  # a group in one piece
    axes = {
        key: on_disk[key] if key in groups else source.axes[names[key]]
        for key in ordered
        if key in groups or names.get(key) in source.axes
    }
    matrices = {key: source.matrices[name] for key, name in names.items() if name in source.matrices}
    found = {name for group in groups.values() for name in group.memory} | set(names.values())
    axes |= {name: axis for name, axis in source.axes.items() if name not in found}
    matrices |= {name: axis for name, axis in source.matrices.items() if name not in found}
    splitting = Lock()  # threads that ask for parts of a group wait for the one that splits it

    @lru_cache(maxsize=1)  # the parts of a group are asked for in turn
    def split(group: Group) -> Mapping[str, Tensor]:
        return keys.split({name: source.get(name).detach() for name in group.memory})

    def get(key: str) -> Tensor:
        if key not in groups:
            return source.get(keys.memory.get(key, key))
        with splitting:
            return split(groups[key])[key]

    return replace(source, axes=axes, matrices=matrices, get=get)


def _disk_keys(source: Source, reader: CheckpointReader) -> DiskKeys | None:
    """Return the checkpoint's keys beside those of the model; None where transformers' tables do not tell."""
    model = source.model
    if model is None or not hasattr(model, "base_model_prefix"):
        return None
    held = {*source.axes, *source.matrices}
    packed = {name: source.get(name).to("meta") for name in sorted(held - model.state_dict().keys())}
    try:
        return DiskKeys(model, {key: reader.shape(key) for key in reader}, packed)
    except StreamingError:
        return None


def _holds(source: Source, group: Group) -> bool:
    """Whether all weights that a group on disk becomes are projections of the model."""
    return all(name in source.axes for name in group.memory)
