"""Where projection weights come from: a model in memory or a checkpoint directory, seen alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spp.adapter_files import CONFIG_NAME
from spp.errors import CheckpointError, ConfigError
from spp.files import CheckpointReader, read_json, recover
from spp.files.hub import local_directory
from spp.files.reader import INDEX, SINGLE
from spp.packed.disk import DenseReader
from spp.targets import (
    dense_projections,
    has_values,
    is_other_matrix,
    is_projection_key,
    packed_modules,
    packed_ndim,
    weight_of,
)
from spp.targets_layout import disk_input_axes

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
    """

    name: str
    axes: dict[str, int]
    matrices: dict[str, int]
    get: Callable[[str], Tensor]
    reader: CheckpointReader | None = None
    model: nn.Module | None = None

    def axis(self, key: str) -> int | None:
        """Return the input axis of a weight of either kind; None for a name that is not here."""
        return self.axes.get(key, self.matrices.get(key))


def checkpoint_directory(name_or_path: str | os.PathLike[str], what: str = "model") -> Path:
    """Return a local directory for a path or a hub id, after finishing what a killed writer had begun there.

    Raises:
        CheckpointError: it is none, cannot be fetched, or holds an adapter and no model.
        ConfigError: this is no path.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ConfigError(f"expected the path of a {what}, found a {type(name_or_path).__name__}")
    recover(name_or_path)
    directory = local_directory(name_or_path, what)
    if not any((directory / name).exists() for name in (SINGLE, INDEX)):
        for adapter in (directory, directory / "adapter"):
            if (adapter / CONFIG_NAME).is_file():
                raise CheckpointError(
                    f"{directory} holds an adapter, no model: pass the model that it was trained on, or what "
                    f"spp merge BASE {adapter} OUTPUT writes"
                )
    return directory


def projection_keys(reader: CheckpointReader) -> list[str]:
    """Return the sorted keys of a checkpoint that name projection weights."""
    return [key for key in reader if is_projection_key(key, len(reader.shape(key)))]


def input_axes(reader: CheckpointReader) -> dict[str, int]:
    """Return the input axis of every 2-D and 3-D tensor of a checkpoint, counted from the front."""
    config = reader.directory / "config.json"
    model_type = read_json(config, "the model's config").get("model_type") if config.exists() else None
    return disk_input_axes({key: reader.shape(key) for key in reader}, model_type)


@contextlib.contextmanager
def open_source(what: ModelOrPath) -> Iterator[Source]:
    """Give the weights of a model (of a wrapped one, its frozen base weights) or of a directory or hub id.

    Raises:
        CheckpointError: the directory is none, or its files are bad.
        ConfigError: `what` is neither a model nor a path; or a model on the meta device, which has no values.
    """
    if isinstance(what, nn.Module):
        packed: dict[str, Any] = packed_modules(what)
        parameters, dense = dict(what.named_parameters()), dense_projections(what)
        empty = sorted(name for name in dense if not has_values(what, name))
        empty += sorted(name for name, module in packed.items() if module.stored_weight.is_meta)
        if empty:
            raise ConfigError(f"the model is on the meta device and has no values, such as {empty[0]}; load it first")
        name = f"the {type(what).__name__}"
        axes = {key: axis % max(parameters[key].ndim, 2) for key, axis in dense.items()}
        for key, module in packed.items():
            if is_projection_key(key, packed_ndim(module)):
                axes[key] = module.input_axis % packed_ndim(module)
        others = [n for n, p in parameters.items() if is_other_matrix(n, p.ndim, p.dtype) and has_values(what, n)]
        others += [n for n in packed if n not in axes and is_other_matrix(n, 2, torch.float32)]

        def get(key: str) -> Tensor:
            return packed[key].weight if key in packed else weight_of(what, key)

        yield Source(name, axes, dict.fromkeys(others, 1), get, model=what)
        return
    if not isinstance(what, (str, os.PathLike)):
        raise ConfigError(f"expected a model or the path of a checkpoint, found a {type(what).__name__}")
    directory = checkpoint_directory(what)
    with DenseReader(directory) as reader:
        all_axes = input_axes(reader)
        axes = {key: all_axes[key] for key in projection_keys(reader)}
        if not axes:
            raise CheckpointError(f"{directory} holds no projection weight; is it a language model's checkpoint?")
        keys = [k for k in reader if is_other_matrix(k, len(reader.shape(k)), reader.dtype(k))]
        yield Source(str(directory), axes, {key: all_axes[key] for key in keys}, reader.tensor, reader)
