"""Merge an adapter into a checkpoint shard by shard: one tensor at a time in memory, never the model.

    for each shard of the base: for each tensor: read → merge and check, or copy → write → hash; then the certificate

The tensors are bit for bit those of `spp.merge` in memory; what the adapter does not touch is copied byte for byte.
Experts that disk and memory keep apart or together are converted, merged and converted back, one weight at a time.
Whatever the adapter holds a layer for is merged and certified, the output head too, if it was adapted by name.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spp.adapter_files import AdapterFiles, read_adapter
from spp.certificate import (
    CERTIFICATE_NAME,
    BaseRecord,
    Certificate,
    TensorRecord,
    certify_tensor,
    fingerprint,
)
from spp.checkpoint.places import Place, Places
from spp.checkpoint.sources import checkpoint_directory, input_axes
from spp.errors import AdapterError, ConfigError, MaskError, NonFiniteError
from spp.files import (
    CheckpointReader,
    atomic_directory,
    dtype_name,
    mask_sha256,
    read_json,
    require_replaceable,
    write_json,
    write_tensors,
)
from spp.files.hashes import tensor_bytes
from spp.files.header import size_of
from spp.files.reader import INDEX, require_inside
from spp.inject import layer_generator
from spp.merge import DTYPES, MergeReport, check_rounding, draw_seed
from spp.merge_weight import LayerMerge, merge_experts, merge_tensor
from spp.patterns import all_finite
from spp.rules import get_rule, rescue_
from spp.targets import is_projection_key

logger = logging.getLogger(__name__)

_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_NOT_CARRIED = (CERTIFICATE_NAME, "adapter_config.json", INDEX)  # the index is written apart
_LARGEST_CARRIED = 256 * 2**20  # bytes of a file beside the weights; the largest tokenizers have a tenth


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
        job = _Job(reader, files, Places(reader, files), dtype, rounding, draw_seed(rounding, seed))
        shards = reader.shards()
        with tqdm(total=len(reader.keys()), desc="merging", unit="tensor", disable=None) as bar:
            for name, keys in shards.items():
                layout = {key: (_stored(reader, key, dtype), reader.shape(key)) for key in keys}
                write_tensors(directory / name, layout, lambda key: job.produce(key, bar))
        job.require_all_merged()
        carry_files(base, directory, set(shards))
        _write_index(reader, directory, dtype)
        if dtype is not None:
            update_config(directory, dtype)
        base_record = BaseRecord(os.fspath(base_dir), fingerprint(job.base_masks))
        certificate = Certificate(job.tensors, job.other, base_record)
        if certificate.fingerprint() != base_record.fingerprint:
            raise MaskError(
                "the masks of the merged checkpoint do not reproduce the base's fingerprint; nothing was written"
            )
        certificate.write(directory)
    logger.info("merged %d layers into %s", len(job.merges), out_dir)
    return MergeReport.from_layers(dict(sorted(job.merges.items())), certificate.report())


@dataclass
class _Job:
    """What a merge needs while it runs, and what it has found so far."""

    reader: CheckpointReader
    files: AdapterFiles
    places: Places
    dtype: torch.dtype | None
    rounding: str
    seed: int
    merges: dict[str, LayerMerge] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    base_masks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rule = get_rule(self.files.config.rule)
        self.layers = self.files.layers()
        self.axes = input_axes(self.reader)
        self.place_of = {key: place for place in self.places.places for key in place.keys}
        self._ready: dict[str, Tensor] = {}  # merged tensors on disk of a group whose other tensors were asked for

    def produce(self, key: str, bar: Any) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of the output, and keep the certificate's record of it."""
        bar.update()
        shape = self.reader.shape(key)
        place = self.place_of.get(key)
        if place is None and not is_projection_key(key, len(shape)):
            yield from self._produce_other(key)
            return
        weight = self.reader.tensor(key)
        if not all_finite(weight):
            raise NonFiniteError(f"{key} of {self.reader.directory} holds NaN or infinity; mend the base first")
        self.base_masks[key] = mask_sha256(weight)
        if place is not None:
            result = self._merged(key, place)
        elif _stored(self.reader, key, self.dtype) != weight.dtype:
            result = weight.to(_stored(self.reader, key, self.dtype))
            rescue_(result, weight)
        else:
            result = weight
        if not all_finite(result):
            raise NonFiniteError(f"{key} overflows in {result.dtype}; merge to a wider dtype")
        self.tensors[key] = certify_tensor(result, self.axes[key])
        yield from tensor_bytes(result)

    def require_all_merged(self) -> None:
        """Raise an AdapterError unless every layer of the adapter was merged."""
        left = sorted(self.layers.keys() - self.merges.keys())
        if left:
            raise AdapterError(f"the adapter in {self.files.source} was not merged into {', '.join(left)}")

    def _produce_other(self, key: str) -> Iterator[memoryview]:
        if _stored(self.reader, key, self.dtype) == self.reader.dtype(key):
            pieces: list[memoryview] = [self.reader.raw(key)]
        else:
            before = self.reader.tensor(key)
            result = before.to(_stored(self.reader, key, self.dtype))
            if all_finite(before) and not all_finite(result):
                raise NonFiniteError(f"{key} overflows in {result.dtype}; merge to a wider dtype")
            pieces = list(tensor_bytes(result))
        self.other[key] = 0
        for piece in pieces:
            self.other[key] = zlib.crc32(piece, self.other[key])
        yield from pieces

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


def _stored(reader: CheckpointReader, key: str, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a tensor of the output has."""
    found = reader.dtype(key)
    return dtype if dtype is not None and found in DTYPES else found


def refuse_overlap(out: Path, source: Path, what: str) -> None:
    """Raise a ConfigError where the output is, contains or lies inside a source."""
    out, source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if out.is_relative_to(source) or source.is_relative_to(out):
        where = "is" if out == source else "lies inside" if out.is_relative_to(source) else "contains"
        raise ConfigError(f"the output {out} {where} {what} {source}; choose a path outside it")


def carry_files(base: Path, directory: Path, shards: set[str]) -> None:
    """Copy what lies beside the weights: config, tokenizer, generation config, chat templates, remote code, …"""
    for folder, subfolders, names in os.walk(base):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = Path(folder).relative_to(base)
        for name in sorted(names):
            source = Path(folder, name)
            if name.startswith(".") or name in shards or name in _NOT_CARRIED or name.endswith(_WEIGHT_ENDINGS):
                continue
            require_inside(source, base)
            status = source.stat()
            if not stat.S_ISREG(status.st_mode):
                continue
            if status.st_size > _LARGEST_CARRIED:
                logger.warning("%s has %d bytes and is not carried along", source, status.st_size)
                continue
            (directory / here).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, directory / here / name)


def _write_index(reader: CheckpointReader, directory: Path, dtype: torch.dtype | None) -> None:
    if reader.index is None:
        return
    if dtype is None:
        shutil.copyfile(reader.directory / INDEX, directory / INDEX)
        return
    metadata = reader.index.get("metadata")
    sizes = (size_of(_stored(reader, key, dtype), reader.shape(key)) for key in reader)
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": sum(sizes)}
    write_json(directory / INDEX, {**reader.index, "metadata": metadata})


def update_config(directory: Path, dtype: torch.dtype) -> None:
    """Have a checkpoint's config.json say which dtype its weights have."""
    path = directory / "config.json"
    if path.exists():
        config = read_json(path, "config.json")
        _set_dtype(config, dtype_name(dtype))
        config.setdefault("dtype", dtype_name(dtype))
        write_json(path, config)


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict):
            _set_dtype(value, name)
