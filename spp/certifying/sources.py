"""Where projection weights come from: a model in memory or a checkpoint directory, seen alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import CheckpointError, ConfigError, StreamingError, TargetError, call, some_of
from spp.files import CheckpointReader, recover
from spp.files.hub import local_directory
from spp.files.reader import INDEX, SINGLE
from spp.models.disk_keys import DiskKeys, Group
from spp.models.projection import disk_input_axes
from spp.models.targets import (
    has_values,
    is_other_matrix,
    is_projection_key,
    packed_modules,
    packed_ndim,
    projection_axes,
    weight_of,
)
from spp.models.unreadable import READ_IN_MEMORY, describe_unreadable, is_scaled, refusal, unreadable_projections
from spp.weights import QuantizedLayout, quantized_kind
from spp.weights.packed.disk import DenseReader
from spp.weights.quantized.disk import DequantizedReader
from spp.wrapping.adapter_files import CONFIG_NAME
from spp.wrapping.state import parts_uncompiled, uncompiled

_FORMS = {"4bit": "bitsandbytes' 4 bits", "8bit": "bitsandbytes' 8 bits"}  # of a linear in memory
ModelOrPath = nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """The projection weights of a model or a checkpoint, and its other matrices.

    Attributes:
        name: for messages.
        axes: {name of a projection weight: its input axis}, in the order of the model, or sorted.
        matrices: the same of the other 2-D floating weights but embeddings: an output head, routers.
        get: returns the weight of a name; from a directory, mapped from its file.
        reader: of the directory, if it is one.
        model: in memory, if it is one.
        unreadable: {module path: how it is stored} of the projections whose weights cannot be read.
        quantized: {name of a weight: form} of those that are decoded to be looked at, and have lost digits.
    """

    name: str
    axes: dict[str, int]
    matrices: dict[str, int]
    get: Callable[[str], Tensor]
    reader: CheckpointReader | None = None
    model: nn.Module | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)
    quantized: Mapping[str, str] = field(default_factory=dict)

    def axis(self, key: str) -> int | None:
        """Return the input axis of a weight of either kind; None for a name that is not here."""
        return self.axes.get(key, self.matrices.get(key))


def checkpoint_directory(name_or_path: str | os.PathLike[str], what: str = "model", *, copied: bool = True) -> Path:
    """Return a local directory for a path or a hub id, after finishing what a killed writer had begun there.

    Args:
        name_or_path: what is asked for.
        what: what it is, for the message.
        copied: whether more is read there than weights and their config: its tokenizer goes into an output.

    Raises:
        CheckpointError: it is none, cannot be fetched, or holds an adapter and no model.
        ConfigError: this is no path.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ConfigError(f"expected the path of a {what}, found a {type(name_or_path).__name__}")
    recover(name_or_path)
    directory = local_directory(name_or_path, what, weights_only=not copied)
    if not any((directory / name).exists() for name in (SINGLE, INDEX)):
        for adapter in (directory, directory / "adapter"):
            if (adapter / CONFIG_NAME).is_file():
                raise CheckpointError(
                    f"{directory} holds an adapter, no model: pass the model that it was trained on, or what "
                    f"{call('merge_checkpoint', 'base, adapter, output')} writes for {adapter}"
                )
    return directory


def projection_keys(reader: CheckpointReader) -> list[str]:
    """Return the sorted keys of a checkpoint that name projection weights of a floating dtype with any values."""

    def is_one(key: str) -> bool:
        shape, dtype = reader.shape(key), reader.dtype(key)
        readable = dtype.is_floating_point and not is_scaled(key, dtype, reader)
        return is_projection_key(key, len(shape)) and readable and 0 not in shape

    return list(filter(is_one, reader))


def unreadable_in(reader: CheckpointReader) -> dict[str, str]:
    """Return {module path: how it is stored} of the projections of a checkpoint whose weights cannot be read."""
    return unreadable_projections({key: (len(reader.shape(key)), reader.dtype(key)) for key in reader})


def require_projections(reader: CheckpointReader, *, whole: bool) -> dict[str, str]:
    """Return `unreadable_in`, if there is a projection weight that can be read.

    Args:
        whole: whether all of them must be.

    Raises:
        CheckpointError: there is none, or some cannot be read; how they are stored instead.
    """
    unreadable, count = unreadable_in(reader), len(projection_keys(reader))
    if count and not (whole and unreadable):
        return unreadable
    what = f"{reader.directory} holds no projection weight that can be read"
    if count:
        some = f"{len(unreadable)} of its {len(unreadable) + count} projections"
        what = f"{reader.directory}: the zeros of {some} cannot be read"
    if not unreadable:
        raise CheckpointError(
            f"{what}; it holds {some_of(reader, 4) or 'no tensor'}: is it a language model's checkpoint?"
        )
    raise CheckpointError(f"{what}: {describe_unreadable(unreadable)}. {refusal(reader.directory)}")


def input_axes(reader: CheckpointReader) -> dict[str, int]:
    """Return the input axis of every 2-D and 3-D tensor of a checkpoint, counted from the front."""
    return disk_input_axes({key: reader.shape(key) for key in reader}, reader.config().get("model_type"))


@contextlib.contextmanager
def open_source(what: ModelOrPath, *, dequantize: bool = False) -> Iterator[Source]:
    """Give the weights of a model (of a wrapped one, its frozen base weights) or of a directory or hub id.

    Args:
        what: the model, or where it is.
        dequantize: decode what a directory holds quantized in a form that is known (spp.weights.quantized.disk), each
            weight when it is looked at.

    Raises:
        CheckpointError: the directory is none, its files are bad, or none of its projection weights can be read.
        TargetError: none of the projection weights of the model can be read.
        ConfigError: `what` is neither a model nor a path; or a model on the meta device, which has no values.
    """
    if isinstance(what, nn.Module):
        with parts_uncompiled(what):
            yield _of_model(uncompiled(what))
        return
    if not isinstance(what, (str, os.PathLike)):
        raise ConfigError(f"expected a model or the path of a checkpoint, found a {type(what).__name__}")
    directory = checkpoint_directory(what, copied=False)
    with (DequantizedReader if dequantize else DenseReader)(directory) as reader:
        all_axes = input_axes(reader)
        unreadable = require_projections(reader, whole=False)
        axes = {key: all_axes[key] for key in projection_keys(reader)}
        keys = [k for k in reader if is_other_matrix(k, len(reader.shape(k)), reader.dtype(k))]
        matrices = {key: all_axes[key] for key in keys}
        forms = {key: one.form for key, one in getattr(reader, "quantized", {}).items() if not one.lossless}
        yield Source(str(directory), axes, matrices, reader.tensor, reader, unreadable=unreadable, quantized=forms)


def _of_model(what: nn.Module) -> Source:
    packed: dict[str, Any] = packed_modules(what)
    parameters, projections = dict(what.named_parameters()), projection_axes(what)
    empty = sorted(name for name in projections if name not in packed and not has_values(what, name))
    empty += sorted(name for name, module in packed.items() if module.stored_weight.is_meta)
    if empty:
        raise ConfigError(f"the model is on the meta device and has no values, such as {empty[0]}; load it first")
    name = f"the {type(what).__name__}"
    axes = {
        key: axis % (packed_ndim(packed[key]) if key in packed else max(parameters[key].ndim, 2))
        for key, axis in projections.items()
        if key in packed or parameters[key].numel()
    }
    others = [n for n, p in parameters.items() if is_other_matrix(n, p.ndim, p.dtype) and has_values(what, n)]
    others += [n for n in packed if n not in axes and is_other_matrix(n, 2, torch.float32)]
    unreadable = _unreadable_of(what, axes)
    if not axes:
        how = f"its parameters are {some_of(parameters, 4) or 'none'}"
        if unreadable:
            how = f"{describe_unreadable(unreadable)}. {READ_IN_MEMORY}"
        raise TargetError(f"{name} has no projection weight that can be read: {how}")
    kinds = {path: kind for path, module in what.named_modules() if (kind := quantized_kind(module))}
    forms = {f"{path}.weight": _FORMS.get(kind, kind) for path, kind in kinds.items()}
    layouts = {key: module.packed_layout for key, module in packed.items()}
    forms |= {key: str(layout) for key, layout in layouts.items() if isinstance(layout, QuantizedLayout)}
    return Source(
        name,
        axes,
        dict.fromkeys(others, 1),
        partial(weight_of, what),
        model=what,
        unreadable=unreadable,
        quantized={key: form for key, form in forms.items() if key in axes},
    )


def _unreadable_of(model: nn.Module, axes: Mapping[str, int]) -> dict[str, str]:
    """Return {module path: how it is held} of a model's projections but those whose weights are read."""
    named = (*model.named_parameters(), *model.named_buffers())
    modules = dict(model.named_modules())
    found = unreadable_projections({name: (tensor.ndim, tensor.dtype) for name, tensor in named})
    return {
        path: f"{how}, in a {type(modules[path]).__name__}" if path in modules else how
        for path, how in found.items()
        if path not in axes and f"{path}.weight" not in axes
    }


# ---- A model in memory under the names of a checkpoint, which may store weights otherwise than they are held.


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
