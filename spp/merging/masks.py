"""Masks that moved in training: a checkpoint of a run with mask updates, and the model that the run began with.

    W = V ⊙ mask,   V = W₀ where W₀ ≠ 0, else D

W₀ is the pruned weight at the start, D the dense one, the mask the checkpoint's (spp.training.mask_state writes it).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.errors import CheckpointError, MaskError, arg
from spp.files import CheckpointReader, content_crc32, mask_sha256, read_json
from spp.files.hub import local_directory
from spp.masks.patterns import as_array, nonzero_mask, unpack_bits
from spp.merging.places import Place, locate
from spp.weights import FLOATS
from spp.weights.base_values import where_it_belongs
from spp.wrapping.adapter_files import MASKS_NAME, MASKS_STATE_NAME, AdapterFiles

FORMAT_VERSION = 1


def read_masks(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a checkpoint says of its masks, and {module path: packed mask}.

    Raises:
        CheckpointError: the files are bad, missing or of another version.
    """
    values = read_json(directory / MASKS_STATE_NAME, "state of the mask updates")
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory / MASKS_STATE_NAME} has format_version {values.get('format_version')!r}, not {FORMAT_VERSION}"
        )
    with CheckpointReader(directory, file=MASKS_NAME) as reader:
        masks = {path: reader.load(path) for path in reader}
    wrong = sorted(path for path, bits in masks.items() if bits.dtype != torch.uint8 or bits.ndim != 1)
    if wrong:
        raise CheckpointError(f"{directory / MASKS_NAME}: the mask of {wrong[0]} has another shape or dtype")
    return values, masks


class MovedMasks:
    """The masks of a checkpoint, and the dense model whose values came back.

    Args:
        files: the checkpoint.
        dense: directory or hub id of the dense model; None is the one that the checkpoint names.
        opened: closes the dense model's files.

    Raises:
        CheckpointError: the masks cannot be read.
    """

    def __init__(self, files: AdapterFiles, dense: str | None, opened: ExitStack) -> None:
        self.files = files
        values, self.masks = read_masks(files.source)
        self._start, self._crc = (_mapping(values, name) for name in ("start_masks", "values_crc32"))
        self.dense = str(values.get("dense") if dense is None else dense)
        self._opened = opened
        self._found: tuple[CheckpointReader, Mapping[str, Place]] | None = None

    def weight(self, place: Place, weight: Tensor, given: str) -> Tensor:
        """Return W of a layer for the checkpoint's mask, as it is stored.

        Args:
            weight: W₀ as it is stored; one that has the mask already is returned as it is.
            given: the base, as it was passed.

        Raises:
            MaskError: it is not the pruned weight that the run began with.
            CheckpointError: the dense model cannot be read, is another, or lacks the layer.
        """
        path, recorded = place.path, (self.files.base_masks or {}).get(place.path)
        now = mask_sha256(weight)
        if recorded == now or path not in self.masks:
            return weight
        if self._start.get(path) != now:
            raise MaskError(
                f"the zeros of {path} are neither those of the checkpoint {self.files.source} nor those that its run "
                f"began with; {where_it_belongs(self.files.base_name, given)}"
            )
        matrix = place.matrices(weight)[0]
        values = torch.where(nonzero_mask(matrix), matrix, self._dense_values(path, matrix))
        form = FLOATS.get((self.files.base_forms or {}).get(path, ""), weight.dtype)
        if content_crc32(values.to(form)) != self._crc.get(path):
            raise CheckpointError(
                f"{self.dense} is another dense model than the run of {self.files.source} had, or {given} another "
                f"pruned one: the values of {path} differ",
                remedy=f"pass the right one, {arg('dense', ...)}",
            )
        if self.masks[path].numel() != (values.numel() + 7) // 8:
            raise CheckpointError(f"{self.files.source / MASKS_NAME}: the mask of {path} has another shape or dtype")
        moved = values.masked_fill(~unpack_bits(as_array(self.masks[path]), values.shape), 0)
        return moved.T.contiguous() if place.transposed else moved

    def _dense_values(self, path: str, matrix: Tensor) -> Tensor:
        reader, places = self._dense_places()
        values = places[path].matrices(places[path].weight(reader))[0] if path in places else None
        if values is None or values.shape != matrix.shape:
            raise CheckpointError(f"{self.dense} has no weight for {path} of the shape {tuple(matrix.shape)}")
        return values.to(matrix.dtype)

    def _dense_places(self) -> tuple[CheckpointReader, Mapping[str, Place]]:
        """Return the dense model's files, and where the layers are in them; opened when they are needed."""
        if self._found is None:
            try:
                directory = local_directory(self.dense, "dense model", weights_only=True)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{self.files.source} is from a run with mask updates, whose weights came back with values of "
                    f"{self.dense}: {error.marked}",
                    option="dense",
                    remedy=f"pass {arg('dense', ...)} with the dense model's directory, or resume the run to its end "
                    f"and merge its adapter into its base",
                ) from None
            reader = self._opened.enter_context(CheckpointReader(directory))
            self._found = reader, locate(reader, list(self.masks))
        return self._found


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}
