"""sparsity.json, the certificate of a checkpoint's zeros, and SparsityReport, what a model's zeros look like.

    format_version   1
    spp_version      the library that wrote it
    base             {name_or_path, fingerprint} of the pruned model that an adapter was merged into, or null
    totals           {numel, zeros, sparsity} over `tensors`
    tensors          {key on disk: {shape, dtype, input_axis, pattern, zeros, mask_sha256, content_crc32}}: projections
    other            {key on disk: content_crc32}, everything else
    other_layout     {key on disk: {shape, dtype}} of the tensors of `other`; older certificates lack it
    content_sha256   {key on disk: hex} of every tensor; only in a certificate that was asked for it (deep)

    fingerprint = sha256 over b"spp-base-1", then for each key of `tensors`, sorted: key, b"\\0", hex mask, b"\\n"

The fingerprint depends on masks only: a merge that kept every zero reproduces its base's. Keys are sorted and no time
is written, so the same checkpoint gives the same bytes. A key that is not listed here is passed over, so that later
versions can add some.

What is not promised: the file is not signed, so whoever changes the checkpoint on purpose can write a certificate that
fits; a crc32 finds what happens by accident, the sha256 of a deep certificate also what is made to look alike. No check
depends on spp_version and base.name_or_path. NaN and infinity are looked for in `tensors` alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from spp._version import __version__
from spp.errors import CheckpointError, call, some_of
from spp.files import atomic_file, dtype_name, read_json, write_json
from spp.files.carry import CERTIFICATE_NAME
from spp.files.hashes import fingerprint
from spp.files.recognised import CERTIFICATE
from spp.files.tables import Table, grouped, joined, spread
from spp.masks.patterns import DENSE

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
        zeros_added: how many zeros there are beside those of a model that had fewer, in all that was compared with it;
            None where none may be added.
    """

    sparsity: float
    pattern: str
    tensors: dict[str, TensorSparsity]
    zeros_added: int | None = None

    def __repr__(self) -> str:
        return f"SparsityReport({len(self.tensors)} tensors, pattern {self.pattern}, sparsity {self.sparsity:.4f})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        values = asdict(self)
        for tensor in values["tensors"].values():
            tensor["shape"] = list(tensor["shape"])
        if self.zeros_added is None:
            del values["zeros_added"]
        return values

    def _repr_html_(self) -> str:
        """Return the table of the zeros, for notebooks."""
        return sparsity_table(self).html()


@dataclass(frozen=True)
class TensorRecord:
    """The entry of one projection weight; the fields are those of the file."""

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
        return math.prod(self.shape)

    def sparsity(self) -> TensorSparsity:
        """Return the part that a report shows; what is certified is finite."""
        share = self.zeros / self.numel if self.numel else 0.0
        return TensorSparsity(self.shape, self.dtype, self.zeros, share, self.pattern, valid=True)


@dataclass(frozen=True)
class TensorLayout:
    """How the bytes of a tensor outside the projections are to be read; the fields are those of the file."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> TensorLayout:
        """Return that of a tensor."""
        return cls(tuple(shape), dtype_name(dtype))


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
        other_layout: shape and dtype of every tensor of `other`; None in an older certificate.
        origin: path or hub id of the dense model that it was pruned from, if that is known.
        spp_version: the version that wrote it.
    """

    tensors: dict[str, TensorRecord]
    other: dict[str, int]
    base: BaseRecord | None = None
    content_sha256: dict[str, str] | None = None
    other_layout: dict[str, TensorLayout] | None = None
    origin: str | None = None
    spp_version: str = field(default=__version__)

    def fingerprint(self) -> str:
        """Return the fingerprint of these masks."""
        return fingerprint({key: record.mask_sha256 for key, record in self.tensors.items()})

    def report(self) -> SparsityReport:
        """Return what the certificate says as a report; what it certifies is finite."""
        return make_report({key: record.sparsity() for key, record in self.tensors.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the object that the file holds."""
        numel = sum(record.numel for record in self.tensors.values())
        zeros = sum(record.zeros for record in self.tensors.values())
        values: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "spp_version": self.spp_version,
            "base": asdict(self.base) if self.base else None,
            "totals": {"numel": numel, "zeros": zeros, "sparsity": zeros / numel if numel else 0.0},
            "tensors": _as_objects(self.tensors),
            "other": dict(self.other),
        }
        if self.other_layout is not None:
            values["other_layout"] = _as_objects(self.other_layout)
        if self.origin is not None:
            values["origin"] = self.origin
        if self.content_sha256 is not None:
            values["content_sha256"] = dict(self.content_sha256)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = CERTIFICATE_NAME) -> Certificate:
        """Return the certificate that `to_dict` made.

        Raises:
            CheckpointError: it is malformed, newer than we are, or lists no projection; `where` is named.
        """
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
                other_layout=_layouts(values.get("other_layout")),
                origin=None if values.get("origin") is None else _text(values["origin"]),
                spp_version=_text(values["spp_version"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where} is malformed: {type(error).__name__}: {error}") from None
        if values.get("totals") != certificate.to_dict()["totals"]:
            raise CheckpointError(f"{where} is malformed: its totals are not the sums over its tensors")
        certificate._check_keys(where)
        return certificate

    def _check_keys(self, where: str) -> None:
        """Raise unless there are projections, and each tensor is listed once in every part that lists it."""
        if not any(math.prod(tensor.shape) for tensor in self.tensors.values()):
            raise CheckpointError(
                f"{where} lists no projection with any weights, so it certifies nothing; {call('certify', 'dir')} "
                f"writes one"
            )
        twice = self.tensors.keys() & self.other.keys()
        if twice:
            raise CheckpointError(f"{where} is malformed: tensors and other both list {some_of(twice)}")
        parts: list[tuple[str, Mapping[str, Any] | None, Set[str]]] = [
            ("other_layout", self.other_layout, self.other.keys()),
            ("content_sha256", self.content_sha256, self.tensors.keys() | self.other.keys()),
        ]
        for name, part, keys in parts:
            if part is not None and part.keys() != keys:
                differing = some_of(part.keys() ^ keys)
                raise CheckpointError(f"{where} is malformed: {name} lists other tensors than it should: {differing}")

    def write(self, directory: str | os.PathLike[str]) -> Path:
        """Write sparsity.json into a directory, atomically, also in place of an older one; return its path."""
        path = Path(directory) / CERTIFICATE_NAME
        with atomic_file(path, overwrite=True, kind=CERTIFICATE) as temporary:
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


def certified_keys(directory: Path) -> set[str]:
    """Return the keys of the tensors of a certificate that is there and can be read."""
    try:
        return set(Certificate.read(directory).tensors)
    except CheckpointError:
        return set()


def make_report(tensors: dict[str, TensorSparsity]) -> SparsityReport:
    """Return the report on tensors whose zeros are known."""
    zeros, numel = sum(t.zeros for t in tensors.values()), sum(math.prod(t.shape) for t in tensors.values())
    patterns = {t.pattern for t in tensors.values()} or {DENSE}
    pattern = patterns.pop() if len(patterns) == 1 else MIXED
    return SparsityReport(sparsity=zeros / numel if numel else 0.0, pattern=pattern, tensors=tensors)


def sparsity_table(report: SparsityReport, *, every: bool = False) -> Table:
    """Return the zeros of a model's projections as a table.

    Args:
        report: of `spp.sparsity`, `spp.verify` or `spp.certify`.
        every: one row a tensor instead of one a kind of projection.

    Example:
        >>> print(sparsity_table(spp.sparsity("pruned")).text())  # doctest: +SKIP
    """
    if every:
        columns = ("tensor", "shape", "dtype", "zeros", "sparsity", "pattern")
        return Table("sparsity", columns, tuple(_tensor_row(name, t) for name, t in report.tensors.items()))
    rows = []
    for kind, group in grouped(report.tensors).items():
        rows.append(
            (
                kind,
                str(len(group)),
                joined("×".join(map(str, t.shape)) for t in group),
                joined(t.dtype for t in group),
                spread([t.sparsity for t in group], "{:.4f}".format),
                joined(t.pattern for t in group),
            )
        )
    total = ("all", str(len(report.tensors)), "", "", f"{report.sparsity:.4f}", report.pattern)
    columns = ("projection", "tensors", "shape", "dtype", "sparsity", "pattern")
    return Table("sparsity", columns, (*rows, total))


def _tensor_row(name: str, tensor: TensorSparsity) -> tuple[str, ...]:
    shape = "×".join(map(str, tensor.shape))
    return name, shape, tensor.dtype, str(tensor.zeros), f"{tensor.sparsity:.4f}", tensor.pattern


def _as_objects(records: Mapping[str, TensorRecord | TensorLayout]) -> dict[str, dict[str, Any]]:
    return {key: {**asdict(record), "shape": list(record.shape)} for key, record in records.items()}


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _LARGEST_RANK:
        raise ValueError(f"{value!r:.60} is no shape")
    return tuple(_number(length) for length in value)


def _layouts(value: Any) -> dict[str, TensorLayout] | None:
    if value is None:
        return None
    return {key: TensorLayout(_shape(of["shape"]), _text(of["dtype"])) for key, of in value.items()}


def _record(value: Any) -> TensorRecord:
    shape = value["shape"]
    record = TensorRecord(
        shape=_shape(shape),
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
