"""The masks of a wrapped model as something that changes: what is kept of each layer, and its weight for a given mask.

    V = W₀ where W₀ ≠ 0, else D        the value that each weight has whenever it is kept
    W = V ⊙ mask                       at any time

W₀ is the pruned weight at the start, D the dense one. Wanda and magnitude keep values as they are: then V is D, which
stays where it is (on the disk, mapped). Where pruning changed values (SparseGPT) V is held in memory, on the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spp.errors import CheckpointError, ConfigError, SPPWarning, arg
from spp.files import CheckpointReader, content_crc32, mask_sha256, save_tensors, write_json
from spp.files.hub import local_directory
from spp.layers.linear import SPPLinear
from spp.masks.patterns import all_finite, as_array, nonzero_mask, pack_bits, unpack_bits
from spp.masks.select import group_of
from spp.merging.masks import FORMAT_VERSION, read_masks
from spp.merging.places import locate
from spp.models.projection import find_projections
from spp.weights import PackedWeight, QuantizedLayout
from spp.wrapping.adapter_files import MASKS_NAME, MASKS_STATE_NAME
from spp.wrapping.wrap import adapter_layers, require_layers

RELATED = 0.5  # the cosine of pruned and dense weights, over what is kept, below which they are hardly one model's

DenseSource = str | os.PathLike[str] | nn.Module
Bits = npt.NDArray[np.uint8]  # of a mask (m, n), as `pack_bits` packs it


class LayerMask:
    """One layer, its mask and the values V of its weights.

    Attributes:
        bits, hash: of the mask as it is now. start_bits, start: as they were at the start.
        group: M of its N:M pattern, None for an unstructured mask.
        regrowable: how many weights are pruned at the start that have a value to come back with.
        checksum: crc32 of V.
        cosine: of W₀ and D, over what is kept.
    """

    def __init__(self, path: str, layer: SPPLinear, dense: Callable[[], Tensor], name: str) -> None:
        self.path, self.layer = path, layer
        self._dense, self._name = dense, name
        weight = layer.matrix.detach()
        self._dtype = weight.dtype
        kept = nonzero_mask(weight)
        values = dense().to(weight.device, weight.dtype)
        if values.shape != weight.shape:
            raise ConfigError(
                f"{path} is {tuple(weight.shape)}, but in {name} {tuple(values.shape)}; mask updates need the dense "
                "model that this one was made of"
            )
        if not all_finite(values):
            raise ConfigError(f"{path} of {name} holds NaN or infinity (in {weight.dtype}); mend it first")
        self.cosine = _cosine(weight, values, kept)
        self._held: Tensor | None = None
        if not torch.equal(weight, values.masked_fill(~kept, 0)):
            values = torch.where(kept, weight, values)
            self._held = values.cpu()
        self.regrowable = int(torch.count_nonzero(nonzero_mask(values) & ~kept))
        self.group = group_of(kept)
        self.bits = self.start_bits = pack_bits(kept)
        self.hash = self.start = self._hash(kept)
        self.checksum = content_crc32(values)

    def values(self) -> Tensor:
        """Return V (m, n) in W's dtype, on its device."""
        values = self._dense().to(self._dtype) if self._held is None else self._held
        return values.to(self.layer.stored_weight.device)

    def write(self, bits: Bits) -> None:
        """Make W what it is for another mask; W stays as it is where the mask keeps what V lacks."""
        values = self.values()
        mask = unpack_bits(bits, values.shape).to(values.device)
        if bool((mask & ~nonzero_mask(values)).any()):
            raise CheckpointError(f"the mask of {self.path} keeps weights that are zero in {self._name}")
        weight = values.masked_fill(~mask, 0)
        with torch.no_grad():
            if self.layer.packed_layout is not None:
                self.layer.hold_packed(PackedWeight.pack(weight, f"{self.path}.weight"))
            else:
                self.layer.weight.copy_(weight if self.layer.input_axis == -1 else weight.T)
        self.bits, self.hash = bits, self._hash(mask)

    def _hash(self, mask: Tensor) -> str:
        return mask_sha256(mask if self.layer.input_axis == -1 else mask.T)  # as the weight is stored


class MaskState:
    """The masks of all adapted layers of a wrapped model.

    Args:
        model: wrapped, its weights those of the pruned model at the start.
        dense: directory or hub id of the dense model, or the model itself, which must stay as it is.

    Attributes:
        layers: {path: LayerMask}, in module order.
        changed: whether a mask may differ from that at the start.

    Raises:
        ConfigError: fused experts or quantized weights among the layers, or a dense model that lacks a layer, has
            another shape or the same zeros.
        CheckpointError: its files are bad.
    """

    def __init__(self, model: nn.Module, dense: DenseSource) -> None:
        layers: dict[str, SPPLinear] = {}
        for path, layer in require_layers(model).items():
            if not isinstance(layer, SPPLinear):
                raise ConfigError(
                    f"the masks of fused experts cannot be updated, such as {path}; leave them out with "
                    f"{arg('exclude_modules')}"
                )
            if isinstance(layer.packed_layout, QuantizedLayout):
                raise ConfigError(f"the masks of quantized weights cannot be updated, such as {path}")
            layers[path] = layer
        self.name = f"the dense {type(dense).__name__}" if isinstance(dense, nn.Module) else os.fspath(dense)
        weights = _dense_weights(dense, list(layers), self.name)
        self.layers = {path: LayerMask(path, layer, weights[path], self.name) for path, layer in layers.items()}
        if not any(layer.regrowable for layer in self.layers.values()):
            raise ConfigError(
                f"no weight could ever come back: {self.name} has the zeros of the model that trains, or that one has "
                "none; mask updates need a pruned model, and the dense one that it was made of"
            )
        self.changed = False
        unlike = min(self.layers.values(), key=lambda layer: layer.cosine)
        if unlike.cosine < RELATED:
            warnings.warn(
                f"{unlike.path} of {self.name} hardly resembles the pruned weight (cosine {unlike.cosine:.2f}); is it "
                "the model that was pruned?",
                SPPWarning,
                stacklevel=3,
            )

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether these are the masks of a model as it is wrapped now."""
        now = adapter_layers(model)
        return now.keys() == self.layers.keys() and all(now[p] is mask.layer for p, mask in self.layers.items())

    def follow(self, model: nn.Module) -> None:
        """Go on with the layers of a model that has been wrapped anew, with the masks that it has."""
        layers = adapter_layers(model)
        for path, mask in self.layers.items():
            layer = layers[path]
            assert isinstance(layer, SPPLinear)
            mask.layer = layer

    def write(self, masks: dict[str, Bits]) -> None:
        """Give layers other masks."""
        self.changed = self.changed or bool(masks)  # first: a failure half-way can be undone
        for path, bits in masks.items():
            self.layers[path].write(bits)

    def hashes(self) -> dict[str, str]:
        """Return {path: hash} of the masks as they were written last."""
        return {path: layer.hash for path, layer in self.layers.items()}

    def restore(self) -> None:
        """Give every layer the weights that it had at the start, bit for bit but for the signs of zeros."""
        if self.changed:
            self.write({path: layer.start_bits for path, layer in self.layers.items()})
            self.changed = False

    def save(self, directory: Path) -> None:
        """Write the masks as they were written last, and what they belong to, into a directory that exists."""
        save_tensors(directory / MASKS_NAME, {path: torch.from_numpy(one.bits) for path, one in self.layers.items()})
        write_json(
            directory / MASKS_STATE_NAME, {"format_version": FORMAT_VERSION, "dense": self.name, **self._origin()}
        )

    def _origin(self) -> dict[str, dict[str, Any]]:
        return {
            "start_masks": {path: layer.start for path, layer in self.layers.items()},
            "values_crc32": {path: layer.checksum for path, layer in self.layers.items()},
        }

    def load(self, directory: Path) -> None:
        """Give the layers the masks that `save` wrote.

        Raises:
            CheckpointError: the files are bad or missing, or belong to another pruned or another dense model.
        """
        values, masks = read_masks(directory)
        for (name, now), what in zip(self._origin().items(), ("pruned", "dense"), strict=True):
            found = values.get(name)
            found = found if isinstance(found, dict) else {}
            differing = sorted(path for path in found.keys() | now.keys() if found.get(path) != now.get(path))
            if differing:
                raise CheckpointError(
                    f"{directory} was written by a run from another {what} model: {len(differing)} layers differ, such "
                    f"as {differing[0]}; resume with the models that the run began with"
                )
        if masks.keys() != self.layers.keys():
            raise CheckpointError(f"{directory / MASKS_NAME} does not hold the masks of this model's layers")
        for path, layer in self.layers.items():
            if masks[path].shape != layer.start_bits.shape:
                raise CheckpointError(f"{directory / MASKS_NAME}: the mask of {path} has another shape or dtype")
        self.write({path: as_array(bits) for path, bits in masks.items()})
        self.changed = True


def _dense_weights(source: DenseSource, paths: Sequence[str], name: str) -> dict[str, Callable[[], Tensor]]:
    """Return {path: what gives the dense weight (m, n)}, on the CPU and mapped where it is on the disk."""
    found: dict[str, Callable[[], Tensor]] = {}
    if isinstance(source, nn.Module):
        for projection in find_projections(source):
            if projection.path in paths and not projection.fused:
                found[projection.path] = lambda p=projection: p.matrices()[0]  # type: ignore[misc]
    else:
        reader = CheckpointReader(local_directory(source, "dense model", weights_only=True))
        for path, place in locate(reader, paths).items():
            if place.group is None and not place.fused:
                found[path] = lambda p=place: p.matrices(p.weight(reader))[0]  # type: ignore[misc]
    missing = sorted(set(paths) - found.keys())
    if missing:
        raise ConfigError(
            f"{name} has no weight for {len(missing)} layers, such as {missing[0]}; mask updates need the dense model "
            "that the pruned one was made of"
        )
    return found


def _cosine(weight: Tensor, values: Tensor, kept: Tensor) -> float:
    """Return the cosine of two matrices over the entries that a mask keeps; 1 where it keeps none."""
    one, other = weight.double(), values.masked_fill(~kept, 0).double()
    norms = float(one.norm()) * float(other.norm())
    return float((one * other).sum()) / norms if norms else 1.0
