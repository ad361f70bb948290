"""Merge adapters into a checkpoint shard by shard, by a few threads: pieces of tensors in memory, never the model.

    for each shard of the base: for each tensor: read → merge and check, or copy → write and hash; then the certificate

The tensors are bit for bit those of `spp.merge` in memory; what the adapter does not touch is copied byte for byte.
Experts that disk and memory keep apart or together are converted, merged and converted back, one weight at a time.
Whatever an adapter holds a layer for is merged and certified, the output head too, if it was adapted by name.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.certifying.sources import checkpoint_directory
from spp.errors import AdapterError, ConfigError, MaskError, SPPWarning, arg, some_of
from spp.files import CheckpointReader, dtype_name, mask_sha256, values_sha256
from spp.files.carry import refuse_overlap
from spp.kernels.native import elementwise
from spp.kernels.native.elementwise import Found, Matrix, terms_of
from spp.merging.masks import MovedMasks
from spp.merging.places import AdapterLike, Part, Place, find_also, find_places, read_parts, sum_of
from spp.merging.report import LayerMerge, MergeReport, sum_layers
from spp.merging.rewrite import Hashes, Rewriting, Transform, output, stored_dtype, write_shards
from spp.merging.weight import check_rounding, draw_seed, layer_merge, merge_also, merge_weight
from spp.rules.adapter import idle_reason
from spp.weights import FLOATS
from spp.weights.base_values import NOT_COMPARABLE, OTHER, BaseComparison, BaseVerdict, gravest, where_it_belongs

logger = logging.getLogger(__name__)


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter_dir: AdapterLike,
    out_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    strict_values: bool = False,
    dense: str | os.PathLike[str] | None = None,
) -> MergeReport:
    """Merge an adapter into a pruned checkpoint; the output appears whole, checked and certified, or not at all.

    The files beside the weights are copied (config, tokenizer, remote code, …), but not README.md, the base's card.
    Not promised: that the base is what its own certificate says, which `spp.verify` checks.

    Args:
        base_dir: the pruned checkpoint (safetensors), or a hub id.
        adapter_dir: the adapter, ours or the SPP authors', or a hub id; or several with a weight each,
            [("a", 0.7), ("b", 0.3)]: of their weighted sum, W · (1 + Σ_t w_t·(s_t·β_t) · A_t) is rounded once, and
            of what trained as a whole p + Σ_t w_t (p_t − p). Their layers and ranks need not be the same.
        out_dir: a directory outside all of these that does not exist yet, unless `overwrite`.
        dtype: convert all floating tensors; None keeps each tensor's own.
        rounding: "nearest" or "stochastic"; as for `spp.merge`.
        seed: of stochastic rounding; None draws one from torch's global generator.
        overwrite: replace what is at `out_dir`, if it is an output (spp.files.recognised) and holds nothing else.
        dry_run: do and check everything, and write nothing.
        strict_values: refuse a base whose values are known not to be those that an adapter was trained on, instead of
            warning. One that is quantized or of another dtype than in training, so that there is nothing to compare,
            and an adapter that does not say are never refused (spp.weights.base_values).
        dense: of a checkpoint of a run with mask updates, directory or hub id of the dense model, whose values came
            back; None is the one that the checkpoint names. `base_dir` is the model that the run began with then, and
            the output has the checkpoint's zeros.

    Returns:
        MergeReport, its layers by module path; `base` says whether the base has the values that were trained on.

    Raises:
        AdapterError: an adapter does not fit; all missing, unexpected and misshapen layers in one message. With
            `strict_values`, the base has other values.
        MaskError: the base's zeros are not those that an adapter was trained on, or a merge would change one.
        NonFiniteError: NaN or infinity in an adapter, a projection or a result.
        CheckpointError: files are bad, or projections of the base are stored so that their zeros cannot be read.
        ConfigError: `out_dir` is, contains or lies inside a source, or an option or an adapter's config is wrong;
            `dense` without such a checkpoint.
        OutputError: `out_dir` exists, or cannot be written.

    Example:
        >>> spp.merge_checkpoint("pruned-2of4", "adapter", "tuned-2of4").survived  # doctest: +SKIP
        0.98
    """
    check_rounding(dtype, rounding)
    base, parts = checkpoint_directory(base_dir), read_parts(adapter_dir)
    refuse_overlap(Path(out_dir), base, "the base")
    for part in parts:
        refuse_overlap(Path(out_dir), part.files.source, "the adapter")
    with ExitStack() as opened:
        reader = opened.enter_context(CheckpointReader(base))
        moving = [part.files for part in parts if part.files.has_moved_masks]
        if dense is not None:
            _check_dense(dense, out_dir, moving)
        moved = MovedMasks(moving[0], None if dense is None else os.fspath(dense), opened) if moving else None
        merging = _Merging(reader, parts, dtype, rounding, draw_seed(rounding, seed), base_dir, moved)
        rewriting = Rewriting(reader, merging.transforms, dtype, certified=merging.certified)
        with output(rewriting, out_dir, overwrite=overwrite, dry_run=dry_run) as directory:
            write_shards(rewriting, directory, "merging", card=False)  # another model: its card is not the base's
            merging.require_all()
            verdicts = merging.verdicts()
            others = [verdict.message for verdict in verdicts if verdict.state == OTHER]
            if strict_values and others:
                raise AdapterError(f"{'; '.join(others)}. Nothing was written")
            certificate = rewriting.certificate(base_dir if moved is None else None)  # whose zeros they may not be
            if directory is not None:
                certificate.write(directory)
    logger.info("merged %d layers%s", len(merging.merges), "" if dry_run else f" into {out_dir}")
    for message in others:
        warnings.warn(message, SPPWarning, stacklevel=2)
    for verdict in verdicts:
        if verdict.state == NOT_COMPARABLE:
            logger.info(verdict.message)
    idle = idle_reason(merging.layers.values())
    layers, also = dict(sorted(merging.merges.items())), dict(sorted(merging.also.items()))
    report = MergeReport.from_layers(layers, certificate.report(), idle=idle, also=also)
    return replace(report, base=gravest(verdicts))


def _check_dense(dense: str | os.PathLike[str], out_dir: str | os.PathLike[str], moving: Sequence[object]) -> None:
    """Refuse a dense model that nothing needs, or that the output would be written into."""
    if not moving:
        raise ConfigError(
            f"{arg('dense')} is {os.fspath(dense)}, but no adapter is a checkpoint of a run with mask updates: leave "
            f"it out"
        )
    if os.path.isdir(dense):
        refuse_overlap(Path(out_dir), Path(dense), "the dense model")


class _Merging:
    """The transform of each weight into which adapters are merged, and what was done.

    Args:
        reader: of the base.
        parts: the adapters.
        dtype, rounding, seed: as for `merge_checkpoint`.
        given: the base, as it was passed.
        moved: the masks of a checkpoint, which the base is brought to first.

    Attributes:
        layers: {module path: the adapters' sum there}.
        transforms: by key on disk.
        certified: the keys of these whose zeros the certificate describes: not what trained as a whole.
        merges: {module path: what was done}.
        also: {parameter name: its largest change} of what trained as a whole.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        parts: list[Part],
        dtype: torch.dtype | None,
        rounding: str,
        seed: int,
        given: str | os.PathLike[str],
        moved: MovedMasks | None,
    ) -> None:
        self.reader, self.parts, self.layers = reader, parts, sum_of(parts)
        self.places = find_places(reader, parts)
        self._dtype, self._rounding, self._seed, self._given = dtype, rounding, seed, os.fspath(given)
        self._moved = moved
        self._comparisons = [
            BaseComparison(f.base_values, f.base_forms, f.source, f.base_name, given)
            for f in (part.files for part in parts)
        ]
        self.merges: dict[str, LayerMerge] = {}
        self._ready: dict[str, Tensor] = {}  # merged tensors on disk of a group whose other tensors were asked for
        self.transforms = {
            key: Transform(
                partial(self._make, place),
                partial(self._compiled, place),
                partial(self._done, place),
                hashed=self._recorded(place.path),
                keeps_zeros=moved is None,
            )
            for place in self.places
            for key in place.keys
        }
        self.certified = set(self.transforms)
        self.also: dict[str, float] = {}
        self._also = find_also(reader, parts)
        if both := sorted(self.certified & self._also.keys()):
            raise AdapterError(f"{both[0]} is adapted by one adapter and was trained as a whole by another")
        self.transforms |= {key: Transform(self._make_whole, keeps_zeros=False) for key in self._also}

    def require_all(self) -> None:
        """Raise unless each layer was merged."""
        left = sorted(self.layers.keys() - self.merges.keys())
        if left:
            sources = ", ".join(str(part.files.source) for part in self.parts)
            raise AdapterError(f"the adapter in {sources} was not merged into {', '.join(left)}")

    def verdicts(self) -> list[BaseVerdict]:
        """Return what has been found of the base's values for each adapter."""
        for part, comparison in zip(self.parts, self._comparisons, strict=True):
            for place in self.places:
                if place.path in part.layers and comparison.form(place.path) not in FLOATS:
                    comparison.add(place.path, dtype_name(self.reader.dtype(place.keys[0])), None)
        return [comparison.verdict() for comparison in self._comparisons]

    def _make(self, place: Place, key: str, tensor: Tensor) -> Tensor:
        """Return one tensor on disk of a merged weight; the others of its group wait to be asked for."""
        if place.group is None:
            return self._merge(place, tensor)
        if key not in self._ready:
            joined = place.joined(self.reader)
            for disk_key in place.group.disk:
                self.reader.release(disk_key)
            for one in self.places:
                if one.group is place.group:
                    name = one.name_among(joined)
                    joined[name] = self._merge(one, joined[name])
            self._ready |= place.split(joined)
        return self._ready.pop(key)

    def _make_whole(self, key: str, tensor: Tensor) -> Tensor:
        """Return a parameter that trained as a whole."""
        name = self._also[key]
        terms = [(part.files.also[name], part.weight) for part in self.parts if name in part.files.also]
        stored: dict[str, Any] = {"dtype": self._dtype, "rounding": self._rounding, "seed": self._seed}
        made, self.also[name] = merge_also(terms, tensor, where=name, **stored)
        return made

    def _merge(self, place: Place, weight: Tensor) -> Tensor:
        """Return the merged weight of a layer, in the layout of `weight`."""
        path = place.path
        if self._moved is not None:
            weight = self._moved.weight(place, weight, self._given)
        hashes = {dtype_name(dtype): values_sha256(weight, dtype) for dtype in self._recorded(path)}
        mask = mask_sha256(weight)
        self._check_base(path, weight.dtype, mask, hashes)
        merged, self.merges[path] = merge_weight(
            place.matrices(weight),
            self.layers[path],
            transposed=place.transposed,
            dtype=self._dtype,
            rounding=self._rounding,
            seed=self._seed,
            where=path,
        )
        if self._moved is not None and mask_sha256(merged) != mask:
            raise MaskError(f"{path}: the merge would change its zeros; nothing was written")
        return merged

    def _compiled(self, place: Place, key: str) -> list[Matrix] | None:
        """Return what the compiled pass merges a weight by; None where torch has to do it."""
        before, after, shape = self.reader.dtype(key), stored_dtype(self.reader, key, self._dtype), place.shape
        library = elementwise.compiled(before, after)
        by_chance = self._rounding == "stochastic" and after in (torch.bfloat16, torch.float16)
        splits_a_byte = place.fused and shape[1] * shape[2] % 8 != 0  # in which an expert's packed bits would begin
        if (
            self._moved is not None
            or library is None
            or by_chance
            or splits_a_byte
            or place.group is not None
            or 0 in shape
        ):
            return None
        layer, (rows, cols) = self.layers[place.path], shape[-2:]
        outputs = cols if place.transposed else rows
        matrices = []
        for one in layer.experts() if place.fused else [layer]:
            terms = terms_of(one.rule, one.rule.prepare(one.params, one.scaling, outputs, torch.float32))
            if terms is None:
                return None
            matrices.append(Matrix(library, rows, cols, before, after, terms, transposed=place.transposed))
        return matrices

    def _done(self, place: Place, found: list[Found], mask: str, hashes: Hashes) -> None:
        """Check and record what the compiled pass merged."""
        self._check_base(place.path, self.reader.dtype(place.keys[0]), mask, hashes)
        done = [layer_merge(of_one) for of_one in found]
        self.merges[place.path] = sum_layers(done) if place.fused else done[0]

    def _recorded(self, path: str) -> list[torch.dtype]:
        """Return the dtypes that adapters recorded the values of a layer in."""
        forms = {comparison.form(path) for comparison in self._comparisons}
        return [FLOATS[form] for form in sorted(form for form in forms if form in FLOATS)]

    def _check_base(self, path: str, dtype: torch.dtype, mask: str, hashes: Hashes) -> None:
        """Raise unless a layer of the base has the zeros that the adapters were trained on; compare its values.

        Args:
            dtype: that the base has it in.
            hashes: of its values, {recorded dtype: hash}.
        """
        for part, comparison in zip(self.parts, self._comparisons, strict=True):
            if path in part.layers:
                if (part.files.base_masks or {}).get(path, mask) != mask:
                    self._raise_masks(part)
                form = comparison.form(path)
                if form in FLOATS:
                    comparison.add(path, dtype_name(dtype), hashes.get(form))

    def _raise_masks(self, part: Part) -> None:
        """Name all layers of the base whose zeros are not those that an adapter was trained on."""
        masks = part.files.base_masks or {}
        differing = [
            place.path
            for place in self.places
            if place.path in part.layers and place.path in masks
            if mask_sha256(place.weight(self.reader)) != masks[place.path]
        ]
        raise MaskError(
            f"the zeros of {self.reader.directory} are not those that the adapter in {part.files.source} was trained "
            f"on in {len(differing)} layers: {some_of(differing)}; "
            f"{where_it_belongs(part.files.base_name, self._given)}"
        )
