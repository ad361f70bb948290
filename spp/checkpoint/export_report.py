"""What an export packed or unpacked, and what it takes in either form."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spp.certificate import Certificate
from spp.files import dtype_name
from spp.files.header import size_of
from spp.packed.disk import DenseReader
from spp.patterns import UNSTRUCTURED


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
    """What an export wrote.

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
