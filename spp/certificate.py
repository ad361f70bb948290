"""sparsity.json, the certificate of a checkpoint's zeros, and SparsityReport, what a model's zeros look like.

    format_version   1
    spp_version      the library that wrote it
    base             {name_or_path, fingerprint} of the pruned model that an adapter was merged into, or null
    totals           {numel, zeros, sparsity} over `tensors`
    tensors          {key on disk: {shape, dtype, input_axis, pattern, zeros, mask_sha256, content_crc32}}: projections
    other            {key on disk: content_crc32}, everything else
    content_sha256   {key on disk: hex} of every tensor; only in a certificate that was asked for it (deep)

    fingerprint = sha256 over b"spp-base-1", then for each key of `tensors`, sorted: key, b"\\0", hex mask, b"\\n"

The fingerprint depends on masks only: a merge that kept every zero reproduces its base's. Keys are sorted and no time
is written, so the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from spp._version import __version__
from spp.errors import CheckpointError, call
from spp.files import atomic_file, dtype_name, read_json, write_json
from spp.patterns import DENSE, all_finite, count_kept, detect_packed, pack_bits

CERTIFICATE_NAME = "sparsity.json"
FORMAT_VERSION = 1
MIXED = "mixed"

_HASH = re.compile(r"[0-9a-f]{64}")
_LARGEST_RANK = 64  # dimensions that torch allows


@dataclass(frozen=True)
class TensorSparsity:
    """The zeros of one tensor.

    Args:
        shape: of the tensor.
        dtype: "float32", "bfloat16", …
        zeros: how many of its entries are zero (−0.0 is).
        sparsity: their fraction, in [0, 1].
        pattern: "N:M", "unstructured" or "dense".
        valid: whether every entry is finite.
    """

    shape: tuple[int, ...]
    dtype: str
    zeros: int
    sparsity: float
    pattern: str
    valid: bool


@dataclass(frozen=True, repr=False)
class SparsityReport:
    """The zeros of a model's projections.

    Args:
        sparsity: fraction of zeros over all of them, in [0, 1].
        pattern: the pattern that all of them have, or "mixed".
        tensors: by name.
    """

    sparsity: float
    pattern: str
    tensors: dict[str, TensorSparsity]

    def __repr__(self) -> str:
        return f"SparsityReport({len(self.tensors)} tensors, pattern {self.pattern}, sparsity {self.sparsity:.4f})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        values = asdict(self)
        for tensor in values["tensors"].values():
            tensor["shape"] = list(tensor["shape"])
        return values


@dataclass(frozen=True)
class TensorRecord:
    """What the certificate says of one projection weight; the fields are those of the file."""

    shape: tuple[int, ...]
    dtype: str
    input_axis: int
    pattern: str
    zeros: int
    mask_sha256: str
    content_crc32: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class BaseRecord:
    """Which pruned model an adapter was merged into.

    Args:
        name_or_path: where it came from, if that is known.
        fingerprint: hex sha256 of its masks.
    """

    name_or_path: str | None
    fingerprint: str


@dataclass(frozen=True)
class Certificate:
    """The contents of sparsity.json.

    Args:
        tensors: the projections by key on disk.
        other: content_crc32 of every other tensor.
        base: what was merged into, if anything was.
        content_sha256: hex sha256 of the contents of every tensor, in a deep certificate.
        spp_version: the version that wrote it.
    """

    tensors: dict[str, TensorRecord]
    other: dict[str, int]
    base: BaseRecord | None = None
    content_sha256: dict[str, str] | None = None
    spp_version: str = field(default=__version__)

    def fingerprint(self) -> str:
        """Return the fingerprint of these masks."""
        return fingerprint({key: record.mask_sha256 for key, record in self.tensors.items()})

    def report(self) -> SparsityReport:
        """Return what the certificate says as a report; what it certifies is finite."""
        return make_report({key: record_sparsity(record) for key, record in self.tensors.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the object that the file holds."""
        numel = sum(record.numel for record in self.tensors.values())
        zeros = sum(record.zeros for record in self.tensors.values())
        values: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "spp_version": self.spp_version,
            "base": asdict(self.base) if self.base else None,
            "totals": {"numel": numel, "zeros": zeros, "sparsity": zeros / numel if numel else 0.0},
            "tensors": {k: {**asdict(r), "shape": list(r.shape)} for k, r in self.tensors.items()},
            "other": dict(self.other),
        }
        if self.content_sha256 is not None:
            values["content_sha256"] = dict(self.content_sha256)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = CERTIFICATE_NAME) -> Certificate:
        """Return the certificate that `to_dict` made; anything malformed is a CheckpointError naming `where`."""
        version = values.get("format_version")
        if type(version) is not int or version < 1:
            raise CheckpointError(f"{where} has no format_version: it is no certificate of spp")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format_version {version}; this spp ({__version__}) reads up to {FORMAT_VERSION}: "
                f"install a newer spp"
            )
        try:
            certificate = cls(
                tensors={key: _record(value) for key, value in values["tensors"].items()},
                other={key: _number(value) for key, value in values["other"].items()},
                base=_base(values["base"]),
                content_sha256=_hashes(values.get("content_sha256")),
                spp_version=_text(values["spp_version"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where} is malformed: {type(error).__name__}: {error}") from None
        if values.get("totals") != certificate.to_dict()["totals"]:
            raise CheckpointError(f"{where} is malformed: its totals are not the sums over its tensors")
        return certificate

    def write(self, directory: str | os.PathLike[str]) -> Path:
        """Write sparsity.json into a directory, atomically; return its path."""
        path = Path(directory) / CERTIFICATE_NAME
        with atomic_file(path, overwrite=True) as temporary:
            write_json(temporary, self.to_dict())
        return path

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Certificate:
        """Read the certificate of a directory; CheckpointError when it is missing, malformed or newer than we are."""
        path = Path(directory) / CERTIFICATE_NAME
        if not path.exists():
            raise CheckpointError(
                f"{directory} has no {CERTIFICATE_NAME}; {call('certify')} writes one, and comparing two checkpoints "
                f"with {call('verify', 'before, after')} needs none"
            )
        return cls.from_dict(read_json(path, "the certificate"), str(path))


def fingerprint(masks: Mapping[str, str]) -> str:
    """Return the hex fingerprint of a model from the mask_sha256 of each of its projections by key."""
    digest = hashlib.sha256(b"spp-base-1")
    for key in sorted(masks):
        digest.update(key.encode() + b"\0" + masks[key].encode() + b"\n")
    return digest.hexdigest()


def report_from_tensors(tensors: Iterable[tuple[str, Tensor, int]]) -> SparsityReport:
    """Return the report on (name, tensor, input axis), one tensor at a time."""
    return make_report({name: _facts(t, axis) for name, t, axis in tensors})


def record_sparsity(record: TensorRecord) -> TensorSparsity:
    """Return the part of a record that a report shows."""
    numel = record.numel
    return TensorSparsity(
        shape=record.shape,
        dtype=record.dtype,
        zeros=record.zeros,
        sparsity=record.zeros / numel if numel else 0.0,
        pattern=record.pattern,
        valid=True,
    )


def make_report(tensors: dict[str, TensorSparsity]) -> SparsityReport:
    """Return the report on tensors whose zeros are known."""
    zeros = sum(t.zeros for t in tensors.values())
    numel = 0
    for tensor in tensors.values():
        count = 1
        for length in tensor.shape:
            count *= length
        numel += count
    patterns = {t.pattern for t in tensors.values()} or {DENSE}
    pattern = patterns.pop() if len(patterns) == 1 else MIXED
    return SparsityReport(sparsity=zeros / numel if numel else 0.0, pattern=pattern, tensors=tensors)


def _facts(t: Tensor, input_axis: int) -> TensorSparsity:
    packed = pack_bits(t)
    numel = t.numel()
    zeros = numel - count_kept(packed)
    along = packed if input_axis in (-1, t.dim() - 1) else pack_bits(t.movedim(input_axis, -1))
    return TensorSparsity(
        shape=tuple(t.shape),
        dtype=dtype_name(t.dtype),
        zeros=zeros,
        sparsity=zeros / numel if numel else 0.0,
        pattern=detect_packed(along, numel, t.shape[input_axis]),
        valid=all_finite(t),
    )


def _record(value: Any) -> TensorRecord:
    shape = value["shape"]
    if not isinstance(shape, list) or len(shape) > _LARGEST_RANK:
        raise ValueError(f"{shape!r:.60} is no shape")
    record = TensorRecord(
        shape=tuple(_number(length) for length in shape),
        dtype=_text(value["dtype"]),
        input_axis=_number(value["input_axis"]),
        pattern=_text(value["pattern"]),
        zeros=_number(value["zeros"]),
        mask_sha256=_hash(value["mask_sha256"]),
        content_crc32=_number(value["content_crc32"]),
    )
    if record.input_axis >= len(record.shape) or record.zeros > record.numel:
        raise ValueError(f"input_axis {record.input_axis} or zeros {record.zeros} do not fit the shape {shape}")
    return record


def _base(value: Any) -> BaseRecord | None:
    if value is None:
        return None
    name = value["name_or_path"]
    return BaseRecord(None if name is None else _text(name), _hash(value["fingerprint"]))


def _hashes(value: Any) -> dict[str, str] | None:
    return None if value is None else {key: _hash(text) for key, text in value.items()}


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!s:.60} is no number of bytes, weights or a dimension")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    return value


def _hash(value: Any) -> str:
    if not _HASH.fullmatch(_text(value)):
        raise ValueError(f"{value!r:.80} is no sha256")
    return str(value)
