"""The dense weights that a pruned model was made of: where regrown weights get their values."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spp.errors import ConfigError
from spp.files import CheckpointReader
from spp.files.hub import local_directory
from spp.merging.places import Place, locate
from spp.models.projection import find_projections

DenseSource = str | os.PathLike[str] | nn.Module


class DenseWeights:
    """The weights of some layers of a dense model, on the disk, mapped, or in memory.

    Args:
        source: directory or hub id of a checkpoint (safetensors), or the dense model itself, which must stay as it is.
        paths: of the layers.

    Attributes:
        name: of the source, for messages.

    Raises:
        ConfigError: it lacks a layer; all of them in one message.
        CheckpointError: the files are bad.
    """

    def __init__(self, source: DenseSource, paths: Sequence[str]) -> None:
        self._reader: CheckpointReader | None = None
        self._places: dict[str, Place] = {}
        self._matrices: dict[str, Tensor] = {}
        if isinstance(source, nn.Module):
            self.name = f"the dense {type(source).__name__}"
            found = {p.path: p for p in find_projections(source) if not p.fused}
            self._matrices = {path: found[path].matrices()[0] for path in paths if path in found}
        else:
            self.name = os.fspath(source)
            self._reader = CheckpointReader(local_directory(source, "dense model"))
            places = locate(self._reader, paths)
            self._places = {path: p for path, p in places.items() if p.group is None and not p.fused}
        missing = sorted(set(paths) - {*self._places, *self._matrices})
        if missing:
            raise ConfigError(
                f"{self.name} has no weight for {len(missing)} layers, such as {missing[0]}; mask updates need the "
                "dense model that the pruned one was made of"
            )

    def matrix(self, path: str, dtype: torch.dtype) -> Tensor:
        """Return the dense weight (m, n) of a layer in `dtype`, on the CPU where it is on the disk."""
        if self._reader is None:
            return self._matrices[path].to(dtype)
        place = self._places[path]
        return place.matrices(place.weight(self._reader))[0].to(dtype)
