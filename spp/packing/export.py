"""From a dense pruned checkpoint to a packed one (its format: spp.weights.packed.disk) and back, tensor by tensor.

    pack    for each tensor: read → check → hash, which tells its layout; then for each: read → pack → decode and
            compare the hash → write
    back    for each tensor: read → decode → compare the hash → write

At any time one tensor is dense or packed in memory. Shards stay shards, under their names. The files beside the weights
are copied, with the certificate: it speaks of the dense tensors, so the packed checkpoint is verified by decoding
and the dense one that comes back by the same file.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spp.certifying.certificate import Certificate, TensorLayout
from spp.certifying.save import make_certificate
from spp.certifying.sources import checkpoint_directory, open_source, require_projections
from spp.certifying.verify import header_problems, pruned_matrices, verify
from spp.errors import CheckpointError, ConfigError, MaskError, call
from spp.files import (
    atomic_directory,
    content_sha256,
    dtype_name,
    read_json,
    write_json,
    write_tensors,
)
from spp.files.carry import CERTIFICATE_NAME, carry_files, refuse_overlap
from spp.files.hashes import tensor_bytes
from spp.files.header import size_of
from spp.files.reader import INDEX
from spp.files.writer import TensorFile
from spp.masks.patterns import DENSE, UNSTRUCTURED
from spp.models.streamed import refuse_quantized
from spp.weights import FLOATS
from spp.weights.packed.disk import FORMAT_VERSION, QUANT_METHOD, SUFFIXES, DenseReader, Descriptor, packed_settings
from spp.weights.packed.layout import INTEGERS, pack_tensor
from spp.weights.packed.matrix import PackedWeight

logger = logging.getLogger(__name__)

_HEADER = 400  # bytes that the entries of a packed tensor may take in a file's header; a gain below that is none
_PIECE = 1 << 20  # weights looked at together
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def export_packed(
    dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    strict_bits: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write a pruned checkpoint with its pruned weights packed; the output appears whole and certified, or not at all.

    Packed is what the certificate names, or without one the projections and every other matrix of which a tenth is zero
    (not embeddings), where that saves space; experts too, fused or apart. `spp.load_packed` loads the output,
    `spp.export_dense` is the way back.

    Args:
        dir: the pruned checkpoint (safetensors), or a hub id. Its certificate, if it has one, is checked on the way.
        out_dir: a directory outside `dir` that does not exist yet, unless `overwrite`.
        strict_bits: refuse weights with −0.0, which come back as 0.0; all else comes back bit for bit.
        overwrite: replace what is at `out_dir`, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        ExportReport: the packed tensors and their sizes.

    Raises:
        ConfigError: `dir` is packed or quantized already, or nothing in it is worth packing; `out_dir` is, contains or
            lies inside it.
        MaskError, CheckpointError: the files are bad, or not what their certificate says.
        NonFiniteError: a projection holds NaN or infinity.
        OutputError: `out_dir` exists, or cannot be written.

    Example:
        >>> spp.export_packed("pruned-2of4", "packed-2of4").ratio  # doctest: +SKIP
        0.5625
    """
    base = checkpoint_directory(dir)
    refuse_overlap(Path(out_dir), base, "the checkpoint")
    made = atomic_directory(out_dir, overwrite=overwrite, copies=[base])
    with made as directory, DenseReader(base) as reader:
        config = read_json(reader.directory / "config.json", "the model's config")
        if reader.packed or packed_settings(config) is not None:
            raise ConfigError(f"{base} is packed already; {call('export_dense')} makes it dense")
        refuse_quantized(base)
        carry_files(reader.directory, None, set(reader.shards()), told=False)  # before any work
        packing = _Packing(reader, strict_bits)
        layouts = packing.write(directory)
        settings = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        _write_rest(reader, directory, layouts, {**config, "quantization_config": settings})
        packing.certificate().write(directory)
        with DenseReader(directory) as written:
            report = report_export(written, packing.certificate())
    logger.info("packed %d tensors into %s", len(report.tensors), out_dir)
    return report


def export_dense(
    dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, overwrite: bool = False
) -> ExportReport:
    """Write a packed checkpoint dense again: the plain one that it was made from, −0.0 excepted, which is 0.0 now.

    Args:
        dir: a packed checkpoint, or a hub id; what its certificate says is checked on the way.
        out_dir: a directory outside `dir` that does not exist yet, unless `overwrite`.
        overwrite: replace what is at `out_dir`, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        ExportReport: the tensors that were packed and their sizes.

    Raises:
        ConfigError: `dir` is not packed; `out_dir` is, contains or lies inside it.
        MaskError, CheckpointError: the files are bad, or not what their certificate says.
        OutputError: `out_dir` exists, or cannot be written.

    Example:
        >>> spp.export_dense("packed-2of4", "pruned-2of4")  # doctest: +SKIP
    """
    base = checkpoint_directory(dir)
    refuse_overlap(Path(out_dir), base, "the checkpoint")
    made = atomic_directory(out_dir, overwrite=overwrite, copies=[base])
    with made as directory, DenseReader(base) as reader:
        if not reader.packed:
            refuse_quantized(base)
            require_projections(reader, whole=True)
            raise ConfigError(f"{base} is not packed; {call('export_packed')} packs it")
        config = read_json(reader.directory / "config.json", "the model's config")
        if packed_settings(config) is not None:
            del config["quantization_config"]
        certificate = _whole(Certificate.read(base), reader)
        layouts = {
            name: {key: (reader.dtype(key), reader.shape(key)) for key in keys}
            for name, keys in reader.shards().items()
            if keys  # a file may hold nothing but parts of tensors that others describe
        }
        with tqdm(total=len(reader.keys()), desc="unpacking", unit="tensor", disable=None) as bar:
            for name, layout in layouts.items():
                write_tensors(directory / name, layout, lambda key: _dense_bytes(reader, key, certificate, bar))
        _write_rest(reader, directory, layouts, config)
        certificate.write(directory)
        report = report_export(reader, certificate)
    logger.info("unpacked %d tensors into %s", len(report.tensors), out_dir)
    return report


class _Packing:
    """Which tensors of a checkpoint are packed, how, and the certificate of what they decode to.

    Args:
        reader: of the dense checkpoint.
        strict: refuse −0.0.

    Raises:
        ConfigError: nothing is worth packing, a name is taken, or `strict` and there is a −0.0.
    """

    def __init__(self, reader: DenseReader, strict: bool) -> None:
        self._reader = reader
        self._certificate = _certify(reader)
        self._plan: dict[str, Descriptor] = {}
        self._changed: dict[str, tuple[int, str]] = {}  # {key: crc32 and sha256 of the contents without −0.0}
        for key, record in self._certificate.tensors.items():
            dtype = reader.dtype(key)
            if record.pattern == DENSE or dtype not in FLOATS.values() or record.input_axis < len(record.shape) - 2:
                continue
            kept = record.numel - record.zeros
            descriptor = Descriptor.of(record.shape, record.input_axis, record.pattern, kept, dtype.itemsize)
            stored = sum(size_of(*entry) for entry in descriptor.stored(kept, dtype).values())
            if stored + _HEADER < size_of(dtype, record.shape):
                self._plan[key] = descriptor
        if not self._plan:
            pruned = any(record.pattern != DENSE for record in self._certificate.tensors.values())
            remedy = "what is pruned is too small or has too few; leave it dense" if pruned else "prune it first"
            raise ConfigError(f"{reader.directory}: no weight has zeros enough to be smaller packed; {remedy}")
        taken = sorted(key + suffix for key in self._plan for suffix in SUFFIXES if key + suffix in reader)
        if taken:
            raise ConfigError(f"{reader.directory} has a tensor {taken[0]}, a name that its packed form needs")
        if strict:
            signed = {key: count for key in self._plan if (count := _negative_zeros(reader.tensor(key)))}
            if signed:
                listing = ", ".join(f"{key} ({count})" for key, count in sorted(signed.items()))
                raise ConfigError(f"{reader.directory} holds −0.0, which would come back as 0.0: {listing}")

    def write(self, directory: Path) -> dict[str, Layout]:
        """Write every shard into a directory; return what each file holds."""
        shards = self._reader.shards()
        layouts = {name: self._layout(keys) for name, keys in shards.items()}
        with tqdm(total=len(self._reader.keys()), desc="packing", unit="tensor", disable=None) as bar:
            for name, keys in shards.items():
                with TensorFile(directory / name, layouts[name]) as file:
                    for part, pieces in (part for key in keys for part in self._parts(key)):
                        file.write_all(part, pieces)
                        bar.update(part in self._reader)
        return layouts

    def _layout(self, keys: Iterable[str]) -> Layout:
        """Return what a file holds for these tensors."""
        layout: Layout = {}
        for key in keys:
            dtype = self._reader.dtype(key)
            if key in self._plan:
                stored = self._plan[key].stored(self._kept(key), dtype)
                layout |= {key + suffix: entry for suffix, entry in stored.items()}
            else:
                layout[key] = (dtype, self._reader.shape(key))
        return layout

    def _parts(self, key: str) -> Iterator[tuple[str, Iterable[memoryview]]]:
        """Yield name and bytes of all that is stored for a tensor; what it decodes to is compared with the dense one.

        Raises:
            MaskError: it is another one.
        """
        descriptor = self._plan.get(key)
        if descriptor is None:
            yield key, [self._reader.raw(key)]
            return
        weight, layout = self._reader.tensor(key), descriptor.layout
        packed = PackedWeight(layout, *pack_tensor(descriptor.matrix(weight), layout, self._kept(key)))
        crc = _crc32(descriptor.pieces(packed))
        if crc != self._certificate.tensors[key].content_crc32:
            if crc != _crc32(part + 0.0 for part in weight.view(-1).split(_PIECE)):
                raise MaskError(f"{key} would not come back as it is (is the file being changed?); nothing was written")
            sha256 = "" if self._certificate.content_sha256 is None else content_sha256(descriptor.dense(packed))
            self._changed[key] = crc, sha256
        yield key, tensor_bytes(descriptor.tensor())
        for suffix, part in zip(SUFFIXES, packed.tensors(), strict=False):
            yield key + suffix, tensor_bytes(part)

    def certificate(self) -> Certificate:
        """Return the certificate of what the written tensors decode to."""
        tensors, hashes = dict(self._certificate.tensors), self._certificate.content_sha256
        for key, (crc, sha256) in self._changed.items():
            tensors[key] = replace(tensors[key], content_crc32=crc)
            hashes = None if hashes is None else {**hashes, key: sha256}
        return replace(self._certificate, tensors=tensors, content_sha256=hashes)

    def _kept(self, key: str) -> int:
        record = self._certificate.tensors[key]
        return record.numel - record.zeros


def _whole(certificate: Certificate, reader: DenseReader) -> Certificate:
    """Return the certificate of a packed checkpoint, if names, shapes and dtypes are those that it says."""
    if header_problems(certificate, reader):
        verify(reader.directory)  # which lists them
    layout = {key: TensorLayout.of(reader.shape(key), reader.dtype(key)) for key in certificate.other}
    return replace(certificate, other_layout=layout)


def _certify(reader: DenseReader) -> Certificate:
    """Return the certificate of what is to be packed: that of the directory, checked, or a new one."""
    known = None
    if (reader.directory / CERTIFICATE_NAME).exists():
        known = Certificate.read(reader.directory)
        also: Iterable[str] = known.tensors
    else:
        with open_source(reader.directory) as source:
            also = pruned_matrices(source)
    deep = known is not None and known.content_sha256 is not None
    found = make_certificate(reader, deep=deep, also=tuple(also))
    if known is None:
        return found
    known = replace(known, other_layout=known.other_layout or found.other_layout)  # an older one has none
    same = replace(found, base=known.base, origin=known.origin, spp_version=known.spp_version) == known
    if not same or (known.base and known.base.fingerprint != known.fingerprint()):
        verify(reader.directory, deep=deep)  # says what is amiss
        raise CheckpointError(
            f"{reader.directory}: its {CERTIFICATE_NAME} names other tensors than this spp would; "
            f"{call('certify', 'dir')} writes a new one"
        )
    return known


def _negative_zeros(t: Tensor) -> int:
    bits = t.view(INTEGERS[t.element_size()]).view(-1)
    lowest = torch.iinfo(bits.dtype).min
    return sum(int((part == lowest).sum()) for part in bits.split(_PIECE))


def _crc32(pieces: Iterable[Tensor]) -> int:
    crc = 0
    for piece in pieces:
        for data in tensor_bytes(piece):
            crc = zlib.crc32(data, crc)
    return crc


def _dense_bytes(reader: DenseReader, key: str, certificate: Certificate, bar: Any) -> Iterator[memoryview]:
    """Yield a tensor's bytes; those that the certificate does not know are an error at the end."""
    bar.update()
    crc = 0
    for data in reader.pieces(key):
        crc = zlib.crc32(data, crc)
        yield data
    record = certificate.tensors.get(key)
    expected = certificate.other.get(key) if record is None else record.content_crc32
    if expected is not None and crc != expected:
        verify(reader.directory)  # lists all that has changed
        raise CheckpointError(f"{reader.directory}: {key} changes while it is read")


def _write_rest(reader: DenseReader, directory: Path, layouts: Mapping[str, Layout], config: Mapping[str, Any]) -> None:
    """Write what is not weights: the files beside them, the config, the index of shards."""
    carry_files(reader.directory, directory, set(reader.shards()))
    write_json(directory / "config.json", config)
    if reader.index is not None:
        metadata = reader.index.get("metadata")
        size = sum(size_of(*entry) for layout in layouts.values() for entry in layout.values())
        metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
        file_of = {key: name for name, layout in layouts.items() for key in layout}
        write_json(directory / INDEX, {**reader.index, "metadata": metadata, "weight_map": file_of})


# ---- What an export packed or unpacked, and what it takes in either form.


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor that is packed on one side of an export.

    Args:
        shape, dtype, pattern: as in a SparsityReport.
        dense_bytes, packed_bytes: what it takes in either form.
    """

    shape: tuple[int, ...]
    dtype: str
    pattern: str
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True, repr=False)
class ExportReport:
    """The result of an export.

    Args:
        tensors: those that are packed, by key on disk.
        dense_bytes, packed_bytes: of all tensors of the checkpoint, in either form.
    """

    tensors: dict[str, ExportedTensor]
    dense_bytes: int
    packed_bytes: int

    @property
    def ratio(self) -> float:
        """Packed bytes over dense ones, of the tensors that are packed."""
        return sum(t.packed_bytes for t in self.tensors.values()) / sum(t.dense_bytes for t in self.tensors.values())

    def __repr__(self) -> str:
        return f"ExportReport({len(self.tensors)} packed tensors, ratio {self.ratio:.4f})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        tensors = {key: {**asdict(t), "shape": list(t.shape)} for key, t in self.tensors.items()}
        sizes = {"dense_bytes": self.dense_bytes, "packed_bytes": self.packed_bytes, "ratio": self.ratio}
        return {"tensors": tensors, **sizes}


def report_export(reader: DenseReader, certificate: Certificate) -> ExportReport:
    """Return the report on a packed checkpoint.

    Args:
        reader: of it.
        certificate: its own.
    """

    def dense_bytes(key: str) -> int:
        return size_of(reader.dtype(key), reader.shape(key))

    tensors = {
        key: ExportedTensor(
            shape=reader.shape(key),
            dtype=dtype_name(reader.dtype(key)),
            pattern=certificate.tensors[key].pattern if key in certificate.tensors else UNSTRUCTURED,
            dense_bytes=dense_bytes(key),
            packed_bytes=reader.stored_bytes(key),
        )
        for key in reader.packed
    }
    dense = sum(dense_bytes(key) for key in reader)
    return ExportReport(tensors, dense, sum(reader.stored_bytes(key) for key in reader))
