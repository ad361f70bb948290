"""Merge an adapter into a checkpoint shard by shard: one tensor at a time in memory, never the model.

The tensors are bit for bit those of `spp.merge` in memory; what the adapter does not touch is copied byte for byte.
Experts that disk and memory keep apart or together are converted, merged and converted back, one weight at a time.
Whatever the adapter holds a layer for is merged and certified, the output head too, if it was adapted by name.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.adapter_files import AdapterFiles, read_adapter
from spp.certificate import BaseRecord, Certificate, fingerprint
from spp.checkpoint.places import Place, Places
from spp.checkpoint.rewriting import Rewriting, refuse_overlap
from spp.checkpoint.sources import checkpoint_directory
from spp.errors import AdapterError, MaskError
from spp.files import CheckpointReader, atomic_directory, mask_sha256, require_replaceable
from spp.inject import layer_generator
from spp.merge import MergeReport, check_rounding, draw_seed
from spp.merge_weight import LayerMerge, merge_experts, merge_tensor
from spp.rules import get_rule

logger = logging.getLogger(__name__)


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merge an adapter into a pruned checkpoint; the output appears whole, checked and certified, or not at all.

    Args:
        base_dir: the pruned checkpoint (safetensors), or a hub id.
        adapter_dir: the adapter, ours or the SPP authors', or a hub id.
        out_dir: a directory outside both that does not exist yet, unless `overwrite`.
        dtype: convert all floating tensors; None keeps each tensor's own.
        rounding: "nearest" or "stochastic"; as for `spp.merge`.
        seed: of stochastic rounding; None draws one from torch's global generator.
        overwrite: replace what is at `out_dir`.

    Returns:
        MergeReport, its layers by module path.

    Raises:
        AdapterError: the adapter does not fit; all missing, unexpected and misshapen layers in one message.
        MaskError: the base's zeros are not those that the adapter was trained on, or a merge would change one.
        NonFiniteError: NaN or infinity in the adapter, a projection or a result.
        CheckpointError: files are bad.
        ConfigError: `out_dir` is, contains or lies inside a source, or an option or the adapter's config is wrong.
        OutputError: `out_dir` exists, or cannot be written.

    Example:
        >>> spp.merge_checkpoint("pruned-2of4", "adapter", "tuned-2of4").survived  # doctest: +SKIP
        0.98
    """
    check_rounding(dtype, rounding)
    base, files = checkpoint_directory(base_dir), read_adapter(Path(adapter_dir))
    refuse_overlap(Path(out_dir), base, "the base")
    refuse_overlap(Path(out_dir), files.source, "the adapter")
    require_replaceable(out_dir)
    with atomic_directory(out_dir, overwrite=overwrite) as directory, CheckpointReader(base) as reader:
        job = _Job(reader, files, dtype, rounding, draw_seed(rounding, seed))
        job.write(directory, "merging")
        job.require_all_merged()
        base_record = BaseRecord(os.fspath(base_dir), fingerprint(job.base_masks))
        certificate = Certificate(job.tensors, job.other, base_record)
        if certificate.fingerprint() != base_record.fingerprint:
            raise MaskError(
                "the masks of the merged checkpoint do not reproduce the base's fingerprint; nothing was written"
            )
        certificate.write(directory)
    logger.info("merged %d layers into %s", len(job.merges), out_dir)
    return MergeReport.from_layers(dict(sorted(job.merges.items())), certificate.report())


class _Job(Rewriting):
    """What a merge needs while it runs, and what it has found so far."""

    def __init__(
        self, reader: CheckpointReader, files: AdapterFiles, dtype: torch.dtype | None, rounding: str, seed: int
    ) -> None:
        self.files = files
        self.places = Places(reader, files)
        self.place_of = {key: place for place in self.places.places for key in place.keys}
        super().__init__(reader, dtype, self.place_of)
        self.rounding, self.seed = rounding, seed
        self.rule = get_rule(files.config.rule)
        self.layers = files.layers()
        self.merges: dict[str, LayerMerge] = {}
        self.base_masks: dict[str, str] = {}
        self._ready: dict[str, Tensor] = {}  # merged tensors on disk of a group whose other tensors were asked for

    def changed(self, key: str, weight: Tensor | None) -> Tensor | None:
        """Return a merged weight, and keep the hash of every mask of the base."""
        if weight is None:
            return None
        self.base_masks[key] = mask_sha256(weight)
        place = self.place_of.get(key)
        return None if place is None else self._merged(key, place)

    def require_all_merged(self) -> None:
        """Raise an AdapterError unless every layer of the adapter was merged."""
        left = sorted(self.layers.keys() - self.merges.keys())
        if left:
            raise AdapterError(f"the adapter in {self.files.source} was not merged into {', '.join(left)}")

    def _merged(self, key: str, place: Place) -> Tensor:
        """Return one tensor on disk of a merged weight; the others of its group wait to be asked for."""
        if key not in self._ready:
            if place.group is None:
                self._ready[key] = self._merge(place, self.reader.tensor(key))
            else:
                disk = self.places.disk
                assert disk is not None
                joined = disk.join(place.group, self.reader.tensor)
                for other in self.places.places:
                    if other.group is place.group:
                        name = next(name for name in joined if name in (other.path, f"{other.path}.weight"))
                        joined[name] = self._merge(other, joined[name])
                self._ready |= disk.split(joined)
        return self._ready.pop(key).contiguous()

    def _merge(self, place: Place, weight: Tensor) -> Tensor:
        """Return the merged weight of a layer, in the layout of `weight`."""
        masks, path = self.files.base_masks or {}, place.path
        if path in masks and masks[path] != mask_sha256(weight):
            self._raise_masks(masks)
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "rounding": self.rounding,
            "generator": layer_generator(self.seed, path),
            "where": path,
        }
        matrices, params, scaling = place.matrices(weight), self.layers[path], self.files.config.scaling
        if len(place.shape) == 3:
            of_experts = list(zip(*(p.unbind(0) for p in params), strict=True))
            merged, self.merges[path] = merge_experts(
                self.rule, matrices, of_experts, scaling, transposed=place.transposed, **options
            )
        else:
            merged, self.merges[path] = merge_tensor(self.rule, matrices[0], params, scaling, **options)
            merged = merged.T if place.transposed else merged
        return merged

    def _raise_masks(self, masks: dict[str, str]) -> None:
        differing = []
        for place in self.places.places:
            if place.group is None:
                weight = self.reader.tensor(place.keys[0])
            else:
                assert self.places.disk is not None
                joined = self.places.disk.join(place.group, self.reader.tensor)
                weight = joined.get(place.path, joined.get(f"{place.path}.weight", torch.empty(0)))
            if place.path in masks and mask_sha256(weight) != masks[place.path]:
                differing.append(place.path)
        raise MaskError(
            f"the zeros of {self.reader.directory} are not those that the adapter in {self.files.source} was trained "
            f"on in {len(differing)} layers: {', '.join(sorted(differing))}. It belongs to "
            f"{self.files.base_name or 'another base'}: pass that one"
        )
