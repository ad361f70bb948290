"""The header of a safetensors file, trusted in nothing.

8 bytes      N, little-endian: the length of the header
N bytes      JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}
the rest     the tensors' bytes, without gaps or overlaps
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from spp.errors import CheckpointError
from spp.files.jsonio import parse_object

LARGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_LARGEST_SIZE = 2**62  # elements
_LARGEST_RANK = 64  # dimensions that torch allows
_METADATA = "__metadata__"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """How a tensor is stored: dtype, shape, and its bytes from `begin` to `end` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Return the tensors of an open safetensors file in the order in which they lie, every field checked.

    Raises:
        CheckpointError: anything that is not exactly as the format says; the message names the file and the field.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise CheckpointError(f"{path} is truncated: {len(start)} bytes, and a safetensors file has at least 8")
    (length,) = struct.unpack("<Q", start)
    if length > LARGEST_HEADER or 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated or corrupt: it claims a header of {length} bytes, the file has {size} "
            f"(and the format allows {LARGEST_HEADER})"
        )
    data = file.read(length)
    if len(data) < length:
        raise CheckpointError(f"{path} is truncated inside its header")
    header = parse_object(data, f"{path}: the safetensors header")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: {_METADATA} must map text to text")
    first = 8 + length
    entries = {name: _entry(name, value, first, path) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_layout(ordered, first, size, path)
    return ordered


def build_header(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return the start of a file, up to the first tensor's bytes, for tensors stored in the order of `layout`."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + size_of(dtype, shape)
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes."""
    return dtype.itemsize * math.prod(shape)


def _entry(name: str, value: Any, first: int, path: str | os.PathLike[str]) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{where} has the dtype {code!r}; known are {', '.join(DTYPES)}")
    if (
        not _are_sizes(shape)
        or len(shape) > _LARGEST_RANK
        or math.prod(length or 1 for length in shape) > _LARGEST_SIZE
    ):
        raise CheckpointError(f"{where} has no possible shape: {str(shape)[:100]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has no possible data_offsets: {str(offsets)[:100]}")
    dtype, begin, end = DTYPES[code], int(offsets[0]), int(offsets[1])
    expected = size_of(dtype, tuple(shape))
    if end - begin != expected:
        raise CheckpointError(
            f"{where} is {code} of shape {shape}, which takes {expected} bytes; its data_offsets {offsets} "
            f"have {end - begin}"
        )
    return TensorEntry(dtype, tuple(shape), first + begin, first + end)


def _check_layout(entries: dict[str, TensorEntry], first: int, size: int, path: str | os.PathLike[str]) -> None:
    at, before = first, "the header"
    for name, entry in entries.items():
        if entry.begin != at:
            what = "overlaps" if entry.begin < at else "leaves a gap after"
            raise CheckpointError(f"{path}: tensor {name!r} {what} {before}: it begins at byte {entry.begin}, not {at}")
        at, before = entry.end, repr(name)
    if at != size:
        state = "truncated" if size < at else "corrupt (bytes follow the last tensor)"
        raise CheckpointError(f"{path} is {state}: its tensors end at byte {at}, the file at {size}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
