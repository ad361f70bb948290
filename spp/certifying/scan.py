"""One pass over a tensor: its mask, whether it is finite, its pattern, and its checksums.

A tensor is taken in pieces, each looked at by the compiled pass (spp.kernels.native.elementwise) or, where there is
none or it does not know the dtype, by plain torch (spp.masks.patterns); what the pieces give is put together.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.certifying.certificate import SparsityReport, TensorRecord, TensorSparsity, make_report
from spp.certifying.sources import Source
from spp.files import CheckpointReader, dtype_name
from spp.files.hashes import packed_sha256
from spp.files.pipeline import Job, Scratch, run
from spp.kernels.native import elementwise
from spp.kernels.native.compiler import DTYPES
from spp.kernels.native.elementwise import PIECE, Found
from spp.masks.patterns import all_finite, as_array, count_kept, detect_along, pack_bits

Bytes = npt.NDArray[np.uint8]
PIECE_BYTES = 2 * PIECE  # of a tensor whose entries do not matter


@dataclass(frozen=True)
class Scanned:
    """The result of a scan of one tensor.

    Attributes:
        crc: zlib.crc32 of its bytes.
        mask: sha256 of its mask, as spp.files.mask_sha256; "" where only bytes were looked at.
        facts: its zeros; None where only bytes were looked at.
        axis: the input axis that they were looked at along.
        sha256: hex, of its bytes, where that was asked for.
    """

    crc: int
    mask: str = ""
    facts: TensorSparsity | None = None
    axis: int = 0
    sha256: str | None = None

    @property
    def zeros(self) -> TensorSparsity:
        """The zeros of a tensor that was looked at as one of values."""
        assert self.facts is not None
        return self.facts

    def record(self) -> TensorRecord:
        """Return what a certificate says of the tensor."""
        zeros = self.zeros
        return TensorRecord(zeros.shape, zeros.dtype, self.axis, zeros.pattern, zeros.zeros, self.mask, self.crc)


def crc32(data: Bytes) -> int:
    """Return zlib.crc32 of contiguous bytes."""
    library = elementwise.compiled()
    return zlib.crc32(data.data) if library is None else elementwise.crc32(library, data)


def scan_piece(data: Bytes, dtype: torch.dtype, bits: Bytes) -> Found:
    """Look at the entries in `data`, and write the packed bits of their mask into `bits`.

    Without the compiled pass `kept` and `most` are not counted: `describe` does that.
    """
    library = elementwise.compiled(dtype)
    if library is not None:
        return elementwise.scan(library, data.ctypes.data, dtype, data.size // dtype.itemsize, bits)
    values = torch.frombuffer(data, dtype=dtype) if data.size else torch.empty(0, dtype=dtype, device="cpu")
    bits[:] = pack_bits(values)
    finite = all_finite(values)
    return Found(kept=-1, finite_before=finite, finite_after=finite, crc=zlib.crc32(data.data), size=data.size)


def describe(
    shape: tuple[int, ...], dtype: torch.dtype, axis: int, bits: Bytes, found: Found
) -> tuple[TensorSparsity, str]:
    """Return (the zeros of a tensor along an axis, the sha256 of its mask) from its packed mask and what was found."""
    counted = found.kept >= 0
    numel, kept = math.prod(shape), found.kept if counted else count_kept(bits)
    zeros = numel - kept
    pattern = detect_along(bits, shape, axis, kept, found.most if counted else None)
    share = zeros / numel if numel else 0.0
    facts = TensorSparsity(shape, dtype_name(dtype), zeros, share, pattern, found.finite_before)
    return facts, packed_sha256(shape, bits)


def entry_pieces(count: int, step: int | None = None) -> list[tuple[int, int]]:
    """Return (begin, end) of the pieces of `count` entries, PIECE or `step` each; one, empty, of none."""
    step = step or PIECE
    return [(begin, min(begin + step, count)) for begin in range(0, max(count, 1), step)]


class ScanJob(Job):
    """Scan one tensor of a checkpoint.

    Args:
        axis: the input axis; None to look at its bytes alone.
        deep: with the sha256 of its bytes; then it is one piece after the other, as of a packed tensor anyway.
    """

    def __init__(self, reader: CheckpointReader, name: str, axis: int | None, *, deep: bool = False) -> None:
        self.reader, self.name, self.axis = reader, name, axis
        self.shape, self.dtype = reader.shape(name), reader.dtype(name)
        self.result: Scanned | None = None
        count = math.prod(self.shape)
        in_turn = deep or not reader.lies_in_file(name)
        dtypes = () if axis is None else (self.dtype,)  # of bytes alone none need be known
        self._library = None if in_turn else elementwise.compiled(*dtypes)
        self._bounds = entry_pieces(count, PIECE if self._library is None else 4 * PIECE)
        self._found: list[Found] = [Found()] * len(self._bounds)
        self._bits = np.empty((count + 7) // 8 if axis is not None else 0, np.uint8)
        self._digest = hashlib.sha256() if deep else None
        self._in_turn = in_turn
        self.pieces = 1 if in_turn else len(self._bounds)

    def do(self, piece: int, scratch: Scratch) -> None:
        """Look at a piece, or at all of them in turn."""
        if self._library is not None:
            self._found[piece] = self._compiled(*self._bounds[piece])
            return
        size = self.dtype.itemsize
        if not self._in_turn:
            begin, end = self._bounds[piece]
            self._look(piece, read_piece(self.reader, self.name, begin * size, end * size, scratch))
            return
        for index, data in enumerate(regrouped(self.reader.pieces(self.name), PIECE * size, scratch)):
            self._look(index, data)
            if self._digest is not None:
                self._digest.update(data.data)

    def _look(self, index: int, data: Bytes) -> None:
        if self.axis is None:
            self._found[index] = Found(crc=crc32(data), size=data.size)
        else:
            begin, end = self._bounds[index]
            self._found[index] = scan_piece(data, self.dtype, self._bits[begin // 8 : (end + 7) // 8])

    def _compiled(self, begin: int, end: int) -> Found:
        """Look at entries [begin, end) while they are read, in parts that stay in the cache."""
        size = self.dtype.itemsize
        with self.reader.reading(self.name) as (file, start):
            offset = start + begin * size
            if self.axis is not None:
                bits = self._bits[begin // 8 : (end + 7) // 8]
                return elementwise.scan_file(self._library, file, offset, self.dtype, end - begin, bits)
            crc = elementwise.crc32_file(self._library, file, offset, (end - begin) * size)
            return Found(crc=crc, size=(end - begin) * size)

    def finish(self) -> None:
        """Put the pieces together."""
        found = put_together(self._found)
        sha256 = self._digest.hexdigest() if self._digest else None
        if self.axis is None:
            self.result = Scanned(found.crc, sha256=sha256)
        else:
            facts, mask = describe(self.shape, self.dtype, self.axis, self._bits, found)
            self.result = Scanned(found.crc, mask, facts, self.axis, sha256)
        del self._bits, self._found


def put_together(pieces: list[Found]) -> Found:
    """Return what is known of a tensor from its pieces, in order; `kept` is −1 where they were not counted."""
    found = pieces[0]
    for piece in pieces[1:]:
        found = found.then(piece)
    return found if all(piece.kept >= 0 for piece in pieces) else replace(found, kept=-1)


def read_piece(reader: CheckpointReader, key: str, begin: int, end: int, scratch: Scratch, place: int = 0) -> Bytes:
    """Return bytes [begin, end) of a tensor of a checkpoint, in a thread's buffer."""
    data = scratch.bytes("in", end - begin, place)
    reader.read(key, begin, data.data)
    return data


def regrouped(pieces: Iterable[memoryview], size: int, scratch: Scratch) -> Iterator[Bytes]:
    """Yield the bytes of some pieces `size` at a time, the last ones fewer; once, none, if there are none."""
    data, filled, whole = scratch.bytes("in", size), 0, False
    for piece in pieces:
        rest = np.frombuffer(piece, np.uint8)
        while rest.size:
            part = rest[: size - filled]
            data[filled : filled + part.size] = part
            filled, rest = filled + part.size, rest[part.size :]
            if filled == size:
                yield data
                filled, whole = 0, True
    if filled or not whole:
        yield data[:filled]


def scan_tensor(t: Tensor, axis: int) -> Scanned:
    """Scan a tensor in memory, in one pass over its values; its crc stays 0.

    Args:
        t: on the CPU it is looked at where it is; elsewhere a part of it is copied at a time.
        axis: the input axis.
    """
    t, axis = t.detach(), axis % t.dim()
    if type(t) is Tensor and t.device.type == "cpu" and t.is_contiguous() and t.dtype in DTYPES:
        flat: Bytes = as_array(t.reshape(-1).view(torch.uint8))
        bits, size = np.empty((t.numel() + 7) // 8, np.uint8), t.element_size()
        bounds = entry_pieces(t.numel())
        parts = [scan_piece(flat[a * size : b * size], t.dtype, bits[a // 8 : (b + 7) // 8]) for a, b in bounds]
        found = put_together(parts)
    else:
        bits = pack_bits(t)
        found = Found(kept=-1, finite_before=all_finite(t))
    facts, mask = describe(tuple(t.shape), t.dtype, axis, bits, found)
    return Scanned(0, mask, facts, axis)


def report_from_tensors(tensors: Iterable[tuple[str, Tensor, int]]) -> SparsityReport:
    """Return the report on (name, tensor, input axis), one tensor at a time."""
    return make_report({name: scan_tensor(t, axis).zeros for name, t, axis in tensors})


class TensorJob(Job):
    """Scan one tensor of a model in memory, as a whole; of its bytes nothing is said.

    Args:
        get: gives it, when it is its turn.
        axis: the input axis.
    """

    def __init__(self, name: str, get: Callable[[str], Tensor], axis: int) -> None:
        self.name, self.get, self.axis = name, get, axis
        self.result: Scanned | None = None

    def do(self, piece: int, scratch: Scratch) -> None:
        """Look at the tensor."""
        self.result = scan_tensor(self.get(self.name), self.axis)

    def finish(self) -> None:
        """Nothing is left to do."""


def scan_reader(
    reader: CheckpointReader,
    axes: Mapping[str, int | None],
    *,
    deep: bool = False,
    done: Callable[[str], Any] | None = None,
) -> dict[str, Scanned]:
    """Scan tensors of a checkpoint.

    Args:
        axes: {key: input axis, or None to look at the bytes alone}.
        deep: with the sha256 of their bytes.
        done: called with each key when it has been looked at.
    """
    return _scanned((ScanJob(reader, key, axis, deep=deep) for key, axis in axes.items()), done)


def scan_source(source: Source, keys: Iterable[str], done: Callable[[str], Any] | None = None) -> dict[str, Scanned]:
    """Scan those of some weights that a model or a checkpoint has."""
    axes = {key: axis for key in keys if (axis := source.axis(key)) is not None}
    if source.reader is not None:
        return scan_reader(source.reader, axes, done=done)
    return _scanned((TensorJob(key, source.get, axis) for key, axis in axes.items()), done)


def _scanned(jobs: Iterable[ScanJob | TensorJob], done: Callable[[str], Any] | None) -> dict[str, Scanned]:
    results: dict[str, Scanned] = {}

    def keep(job: Job) -> None:
        assert isinstance(job, (ScanJob, TensorJob)) and job.result is not None
        results[job.name] = job.result
        if done is not None:
            done(job.name)

    run(jobs, keep)
    return results
