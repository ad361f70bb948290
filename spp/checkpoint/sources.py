"""Where projection weights come from: a model in memory or a checkpoint directory, seen alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from spp.certificate import input_axis_of
from spp.errors import CheckpointError, ConfigError
from spp.files import CheckpointReader, recover
from spp.files.hub import local_directory
from spp.targets import is_projection_key, projection_weights

ModelOrPath = nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """The projection weights of a model or a checkpoint.

    Attributes:
        name: for messages.
        axes: {name of a weight: its input axis}, in the order of the model, or sorted.
        get: returns the weight of a name; from a directory, mapped from its file.
    """

    name: str
    axes: dict[str, int]
    get: Callable[[str], Tensor]


def checkpoint_directory(name_or_path: str | os.PathLike[str], what: str = "model") -> Path:
    """Return a local directory for a path or a hub id, after finishing what a killed writer had begun there."""
    recover(name_or_path)
    return local_directory(name_or_path, what)


def projection_keys(reader: CheckpointReader) -> list[str]:
    """Return the sorted keys of a checkpoint that name projection weights."""
    return [key for key in reader if is_projection_key(key, len(reader.shape(key)))]


@contextlib.contextmanager
def open_source(what: ModelOrPath) -> Iterator[Source]:
    """Give the projection weights of a model (of a wrapped one, its frozen base weights) or of a directory or hub id.

    Raises:
        CheckpointError: the directory is none, or its files are bad.
        ConfigError: `what` is neither a model nor a path; or a model on the meta device, which has no values.
    """
    if isinstance(what, nn.Module):
        weights = {name: (weight, axis % weight.ndim) for name, weight, axis in projection_weights(what)}
        empty = sorted(name for name, (weight, _) in weights.items() if weight.is_meta)
        if empty:
            raise ConfigError(f"the model is on the meta device and has no values, such as {empty[0]}; load it first")
        name = f"the {type(what).__name__}"
        yield Source(name, {k: axis for k, (_, axis) in weights.items()}, lambda key: weights[key][0])
        return
    if not isinstance(what, (str, os.PathLike)):
        raise ConfigError(f"expected a model or the path of a checkpoint, found a {type(what).__name__}")
    directory = checkpoint_directory(what)
    with CheckpointReader(directory) as reader:
        axes = {key: input_axis_of(len(reader.shape(key))) for key in projection_keys(reader)}
        if not axes:
            raise CheckpointError(f"{directory} holds no projection weight; is it a language model's checkpoint?")
        yield Source(str(directory), axes, reader.tensor)
