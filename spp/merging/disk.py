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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.certifying.certificate import BaseRecord, Certificate, fingerprint
from spp.certifying.scan import Bytes
from spp.certifying.sources import checkpoint_directory
from spp.errors import AdapterError, MaskError, SPPWarning, some_of
from spp.files import CheckpointReader, dtype_name, mask_sha256, values_sha256
from spp.files.carry import refuse_overlap
from spp.files.hashes import joined_sha256, piece_sha256
from spp.kernels.native import elementwise
from spp.kernels.native.elementwise import Found, Matrix, terms_of
from spp.merging.model import check_rounding, draw_seed
from spp.merging.parts import AdapterLike, Part, read_parts, sum_of
from spp.merging.places import Place, Places
from spp.merging.report import LayerMerge, MergeReport, sum_layers
from spp.merging.rewrite import Rewriting, ValueHashes, output, write_shards
from spp.merging.weight import layer_merge, merge_experts, merge_tensor
from spp.models.disk_keys import Group
from spp.rules.idle import idle_reason
from spp.weights import FLOATS
from spp.weights.base_values import NOT_COMPARABLE, OTHER, BaseComparison, BaseVerdict, gravest
from spp.wrapping.state import layer_generator

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
) -> MergeReport:
    """Merge an adapter into a pruned checkpoint; the output appears whole, checked and certified, or not at all.

    The files beside the weights are copied (config, tokenizer, remote code, …), but not README.md, the base's card.
    Not promised: that the base is what its own certificate says, which `spp.verify` checks.

    Args:
        base_dir: the pruned checkpoint (safetensors), or a hub id.
        adapter_dir: the adapter, ours or the SPP authors', or a hub id; or several with a weight each,
            [("a", 0.7), ("b", 0.3)]: of their weighted sum, W · (1 + Σ_t w_t·(s_t·β_t) · A_t) is rounded once. Their
            layers and ranks need not be the same.
        out_dir: a directory outside all of these that does not exist yet, unless `overwrite`.
        dtype: convert all floating tensors; None keeps each tensor's own.
        rounding: "nearest" or "stochastic"; as for `spp.merge`.
        seed: of stochastic rounding; None draws one from torch's global generator.
        overwrite: replace what is at `out_dir`, if it is an output (spp.files.recognised) and holds nothing else.
        dry_run: do and check everything, and write nothing.
        strict_values: refuse a base whose values are known not to be those that an adapter was trained on, instead of
            warning. One that is quantized or of another dtype than in training, so that there is nothing to compare,
            and an adapter that does not say are never refused (spp.weights.base_values).

    Returns:
        MergeReport, its layers by module path; `base` says whether the base has the values that were trained on.

    Raises:
        AdapterError: an adapter does not fit; all missing, unexpected and misshapen layers in one message. With
            `strict_values`, the base has other values.
        MaskError: the base's zeros are not those that an adapter was trained on, or a merge would change one.
        NonFiniteError: NaN or infinity in an adapter, a projection or a result.
        CheckpointError: files are bad, or projections of the base are stored so that their zeros cannot be read.
        ConfigError: `out_dir` is, contains or lies inside a source, or an option or an adapter's config is wrong.
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
    with CheckpointReader(base) as reader:
        merging = Merging(reader, Places(reader, parts), parts, dtype, rounding, draw_seed(rounding, seed))
        with output(merging, out_dir, overwrite=overwrite, dry_run=dry_run) as directory:
            write_shards(merging, directory, "merging", card=False)  # another model: its card is not the base's
            _require_all_merged(merging)
            verdicts = merging.verdicts()
            _require_values(verdicts, strict=strict_values)
            certificate = _certificate(merging, base_dir)
            if directory is not None:
                certificate.write(directory)
    logger.info("merged %d layers%s", len(merging.merges), "" if dry_run else f" into {out_dir}")
    for verdict in verdicts:
        if verdict.state == OTHER:
            warnings.warn(verdict.message, SPPWarning, stacklevel=2)
        elif verdict.state == NOT_COMPARABLE:
            logger.info(verdict.message)
    idle = idle_reason((layer.rule, layer.params, layer.scaling) for layer in merging.layers.values())
    report = MergeReport.from_layers(dict(sorted(merging.merges.items())), certificate.report(), idle=idle)
    return replace(report, base=gravest(verdicts))


def _require_all_merged(merging: Merging) -> None:
    left = sorted(merging.layers.keys() - merging.merges.keys())
    if left:
        sources = ", ".join(str(part.files.source) for part in merging.parts)
        raise AdapterError(f"the adapter in {sources} was not merged into {', '.join(left)}")


def _require_values(verdicts: Sequence[BaseVerdict], *, strict: bool) -> None:
    others = [verdict.message for verdict in verdicts if verdict.state == OTHER]
    if strict and others:
        raise AdapterError(f"{'; '.join(others)}; merge it there. Nothing was written")


def _certificate(merging: Merging, base: str | os.PathLike[str]) -> Certificate:
    record = BaseRecord(os.fspath(base), fingerprint(merging.base_masks))
    certificate = merging.certificate(record)
    if certificate.fingerprint() != record.fingerprint:
        raise MaskError(
            "the masks of the merged checkpoint do not reproduce the base's fingerprint; nothing was written"
        )
    return certificate


# ---- What the jobs of a merge share: the adapters' sum, what has been found, and the merge in plain torch.


class Merging(Rewriting):
    """A checkpoint into which adapters are merged.

    Args:
        reader: of the base; places: of the layers in it.
        parts: the adapters.
        dtype, rounding, seed: as for `merge_checkpoint`.

    Attributes:
        merges: {module path: what was done}.
        base_masks: {key: mask_sha256} of the base's tensors.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        places: Places,
        parts: list[Part],
        dtype: torch.dtype | None,
        rounding: str,
        seed: int,
    ) -> None:
        self.place_of = {key: place for place in places.places for key in place.keys}
        super().__init__(reader, dtype, self.place_of, self.place_of)
        self.places, self.parts = places, parts
        self.rounding, self.seed = rounding, seed
        self.layers = sum_of(parts)
        self.merges: dict[str, LayerMerge] = {}
        self.base_masks: dict[str, str] = {}
        self._comparisons = [
            BaseComparison(f.base_values, f.base_forms, f.source, f.base_name) for f in (part.files for part in parts)
        ]
        self._ready: dict[str, Tensor] = {}  # merged tensors on disk of a group whose other tensors were asked for

    def matrices(self, key: str) -> list[Matrix] | None:
        """Return what the compiled pass needs to merge or convert a weight; None where torch has to do it."""
        place = self.place_of.get(key)
        if place is None:
            return super().matrices(key)
        before, after, shape = self.reader.dtype(key), self.stored(key), self.reader.shape(key)
        library = elementwise.compiled(before, after)
        if library is None or self._needs_torch(place, after, shape):
            return None
        layer, (rows, cols) = self.layers[place.path], shape[-2:]
        outputs = cols if place.transposed else rows
        matrices = []
        for params in _of_experts(layer.params) if len(shape) == 3 else [layer.params]:
            terms = terms_of(layer.rule, layer.rule.prepare(list(params), layer.scaling, outputs, torch.float32))
            if terms is None:
                return None
            matrices.append(Matrix(library, rows, cols, before, after, terms, transposed=place.transposed))
        return matrices

    def _needs_torch(self, place: Place, after: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Whether the compiled pass does not merge such a weight."""
        by_chance = self.rounding == "stochastic" and after in (torch.bfloat16, torch.float16)
        splits_a_byte = len(shape) == 3 and shape[1] * shape[2] % 8 != 0  # in which an expert's packed bits would begin
        return by_chance or splits_a_byte or place.group is not None or 0 in shape

    def keep(self, key: str, dtype: torch.dtype, bits: Bytes, found: Found) -> None:
        """Record a weight that was made; its mask is the base's too."""
        super().keep(key, dtype, bits, found)
        self.base_masks[key] = self.tensors[key].mask_sha256

    def changed_by(self, key: str, found: list[Found]) -> None:
        """Check and record what the compiled pass merged."""
        place = self.place_of[key]
        self.require_masks(place.path, self.base_masks[key])
        done = [layer_merge(of_one) for of_one in found]
        self.merges[place.path] = sum_layers(done) if len(place.shape) == 3 else done[0]

    def value_hashes(self, key: str, pieces: int) -> ValueHashes | None:
        """Return what hashes a weight of the base in every form that an adapter recorded."""
        place = self.place_of.get(key)
        dtypes = [] if place is None else self._recorded(place.path)
        if place is None or not dtypes:
            return None
        return PieceHashes(self, place, self.reader.dtype(key), dtypes, pieces)

    def _recorded(self, path: str) -> list[torch.dtype]:
        """Return the dtypes that adapters recorded the values of a layer in."""
        forms = {comparison.form(path) for comparison in self._comparisons}
        return [FLOATS[form] for form in sorted(form for form in forms if form in FLOATS)]

    def compare_values(self, path: str, dtype: torch.dtype, hashes: dict[str, str | None]) -> None:
        """Compare a layer of the base with what the adapters recorded.

        Args:
            dtype: that the base has it in.
            hashes: of its values, {recorded dtype: hash}.
        """
        for part, comparison in zip(self.parts, self._comparisons, strict=True):
            if path in part.layers:
                comparison.add(path, dtype_name(dtype), hashes.get(comparison.form(path) or ""))

    def verdicts(self) -> list[BaseVerdict]:
        """Return what has been found of the base's values for each adapter."""
        for part, comparison in zip(self.parts, self._comparisons, strict=True):
            for place in self.places.places:
                if place.path in part.layers and comparison.form(place.path) not in FLOATS:
                    comparison.add(place.path, dtype_name(self.reader.dtype(place.keys[0])), None)
        return [comparison.verdict() for comparison in self._comparisons]

    def require_masks(self, path: str, mask: str) -> None:
        """Raise unless a layer of the base has the zeros that the adapters were trained on."""
        for part in self.parts:
            if path in part.layers and (part.files.base_masks or {}).get(path, mask) != mask:
                self._raise_masks(part)

    def make(self, key: str, tensor: Tensor) -> Tensor:
        """Return one tensor on disk of a merged weight; the others of its group wait to be asked for."""
        place = self.place_of[key]
        if place.group is None:
            return self._merge(place, tensor).contiguous()
        if key not in self._ready:
            self._ready |= self._merged_group(place.group)
        return self._ready.pop(key).contiguous()

    def _merged_group(self, group: Group) -> dict[str, Tensor]:
        """Return the tensors on disk of a group whose weights in memory were merged."""
        joined = self._joined(group)
        for key in group.disk:
            self.reader.release(key)
        for place in self.places.places:
            if place.group is group:
                name = _name_among(joined, place)
                joined[name] = self._merge(place, joined[name])
        assert self.places.disk is not None
        return self.places.disk.split(joined)

    def _joined(self, group: Group) -> dict[str, Tensor]:
        """Return the tensors in memory that a group becomes."""
        assert self.places.disk is not None
        return self.places.disk.join(group, self.reader.tensor)

    def _merge(self, place: Place, weight: Tensor) -> Tensor:
        """Return the merged weight of a layer, in the layout of `weight`."""
        path, layer = place.path, self.layers[place.path]
        self.require_masks(path, mask_sha256(weight))
        hashes = {dtype_name(dtype): values_sha256(weight, dtype) for dtype in self._recorded(path)}
        self.compare_values(path, weight.dtype, hashes)
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "rounding": self.rounding,
            "generator": layer_generator(self.seed, path),
            "where": path,
        }
        matrices = place.matrices(weight)
        if len(place.shape) == 3:
            params = _of_experts(layer.params)
            options["transposed"] = place.transposed
            merged, self.merges[path] = merge_experts(layer.rule, matrices, params, layer.scaling, **options)
            return merged
        merged, self.merges[path] = merge_tensor(layer.rule, matrices[0], layer.params, layer.scaling, **options)
        return merged.T if place.transposed else merged

    def _raise_masks(self, part: Part) -> None:
        """Name all layers of the base whose zeros are not those that an adapter was trained on."""
        masks = part.files.base_masks or {}
        differing = [
            place.path
            for place in self.places.places
            if place.path in part.layers and place.path in masks
            if mask_sha256(self._weight(place)) != masks[place.path]
        ]
        raise MaskError(
            f"the zeros of {self.reader.directory} are not those that the adapter in {part.files.source} was trained "
            f"on in {len(differing)} layers: {some_of(differing)}. It belongs to "
            f"{part.files.base_name or 'another base'}: pass that one"
        )

    def _weight(self, place: Place) -> Tensor:
        """Return the weight of a layer of the base, as it is in memory."""
        if place.group is None:
            return self.reader.tensor(place.keys[0])
        joined = self._joined(place.group)
        return joined[_name_among(joined, place)]


def _of_experts(params: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return a stack's parameters expert by expert."""
    return list(zip(*(p.unbind(0) for p in params), strict=True))


def _name_among(tensors: Iterable[str], place: Place) -> str:
    """Return the name of a layer's weight among those of its group."""
    return next(name for name in tensors if name in (place.path, f"{place.path}.weight"))


class PieceHashes(ValueHashes):
    """Hashes a weight of the base in some dtypes, for the comparison with what adapters recorded.

    Args:
        place: of the weight. dtype: that it has there.
        recorded: dtypes to hash it in.
    """

    def __init__(
        self, merging: Merging, place: Place, dtype: torch.dtype, recorded: list[torch.dtype], pieces: int
    ) -> None:
        self._merging, self._place, self._dtype = merging, place, dtype
        self._pieces = {one: [b""] * pieces for one in recorded}

    def add(self, piece: int, data: Bytes) -> None:
        """Hash a piece."""
        values = torch.frombuffer(data, dtype=self._dtype)
        for dtype, pieces in self._pieces.items():
            pieces[piece] = piece_sha256(values, dtype)

    def finish(self) -> None:
        """Hand the hashes to the comparison."""
        joined = {dtype_name(d): joined_sha256(self._place.shape, d, parts) for d, parts in self._pieces.items()}
        self._merging.compare_values(self._place.path, self._dtype, {**joined})
