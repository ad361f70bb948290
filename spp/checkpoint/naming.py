"""A model in memory under the names of a checkpoint, which may store weights otherwise than they are held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
    model = source.model
    if model is None or not hasattr(model, "base_model_prefix") or all(key in reader for key in source.axes):
        return source
    held = {**source.axes, **source.matrices}
    packed = {name: source.get(name).to("meta") for name in sorted(held.keys() - model.state_dict().keys())}
    try:
        keys = DiskKeys(model, {key: reader.shape(key) for key in reader}, packed)
    except StreamingError:
        return source
    on_disk = input_axes(reader)
    parts: dict[str, Group] = {}
    axes: dict[str, int] = {}
    matrices: dict[str, int] = {}
    for key in sorted(reader, key=lambda key: (getattr(keys.group_of(key), "disk", ()), key)):  # a group in one piece
        group, name = keys.group_of(key), keys.memory[key]
        if group is not None and all(name in source.axes for name in group.memory):
            axes[key], parts[key] = on_disk[key], group
        elif group is None and name in held:
            (axes if name in source.axes else matrices)[key] = held[name]
    known = {keys.memory[key] for key in (*axes, *matrices)} | {n for g in parts.values() for n in g.memory}
    axes |= {name: axis for name, axis in source.axes.items() if name not in known}
    matrices |= {name: axis for name, axis in source.matrices.items() if name not in known}
    last: list[tuple[Group, Mapping[str, Tensor]]] = []  # the group that was split last: its parts come in turn
    splitting = Lock()

    def get(key: str) -> Tensor:
        group = parts.get(key)
        if group is None:
            return source.get(keys.memory.get(key, key))
        with splitting:
            if not last or last[0][0] is not group:
                last[:] = [(group, keys.split({name: source.get(name).detach() for name in group.memory}))]
            return last[0][1][key]

    return replace(source, axes=axes, matrices=matrices, get=get)
