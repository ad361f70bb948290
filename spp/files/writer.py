"""Writing safetensors files as a stream: the header from the shapes, then one tensor after the other.

Tensors are stored in the order of the reference implementation (wider dtypes first, then by name), the only
metadata is {"format": "pt"}, so the same tensors give the same bytes.

A checkpoint of gigabytes that goes through the system's cache is copied there, drives out what other programs read, and
waits for the disk at the end. Where the system can (O_DIRECT), whole pages of a large file go to the disk straight from
memory, if they begin in a page of memory as they do in the file. The rest of a piece, less than a page at either end,
is kept and written the usual way when the others are done; so is everything where the system cannot.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import accumulate
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from spp.errors import CheckpointError, output_error
from spp.files.hashes import tensor_bytes
from spp.files.header import DTYPE_CODES, build_header, size_of

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Pieces = Iterable[memoryview]

PAGE = 4096  # bytes that a disk writes as one, at most, and the pages of the system's cache
LARGE = 2**29  # bytes of a file from which on it goes around the cache; what is smaller is soon read again
_AT_ONCE = 2**18  # bytes through the cache; with more, the system looks for larger pieces of free memory, and is slower
_MOST_KEPT = 2**26  # bytes of ends of pieces; those of a file of 30 GB

_CANNOT = (errno.EINVAL, errno.ENOTSUP)
_RANKS = {dtype: i for i, dtype in enumerate(  # the reference implementation's order of dtypes of one width
    (torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.uint16,
     torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64,
     torch.int64, torch.uint64)
)}  # fmt: skip


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OutputError: the file cannot be written.
        CheckpointError: a tensor's dtype is none that the format knows.
    """
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(path, layout, lambda name: tensor_bytes(tensors[name]))


def write_tensors(path: str | os.PathLike[str], layout: Layout, produce: Callable[[str], Pieces]) -> None:
    """Write a safetensors file whose tensors are made one at a time.

    Args:
        path: the file.
        layout: name -> (dtype, shape) of every tensor.
        produce: gives the bytes of the tensor of that name, in pieces; called once for each, in the order of the file.
    """
    with TensorFile(path, layout) as file:
        for name in file.names:
            file.write_all(name, produce(name))


class TensorFile:
    """A safetensors file whose tensors come in pieces, in any order and from several threads.

    Args:
        path: the file; what is there is written over.
        layout: name -> (dtype, shape) of every tensor.

    Attributes:
        names: of the tensors, in the order in which they lie.

    Raises:
        OutputError: the file cannot be written.
        CheckpointError: a tensor's dtype is none that the format knows.
    """

    def __init__(self, path: str | os.PathLike[str], layout: Layout) -> None:
        for name, (dtype, _) in layout.items():
            if dtype not in DTYPE_CODES:
                raise CheckpointError(f"{path}: tensor {name!r} is {dtype}, which safetensors files cannot hold")
        self._path = path
        self._layout = dict(sorted(layout.items(), key=lambda item: (-_RANKS[item[1][0]], item[0])))
        self.names = list(self._layout)
        self._written = dict.fromkeys(self.names, 0)
        self._lock = threading.Lock()
        header = build_header(self._layout)
        sizes = [size_of(*entry) for entry in self._layout.values()]
        self._begin = dict(zip(self.names, accumulate(sizes, initial=len(header)), strict=False))
        try:
            self._file = OutputFile(path, len(header) + sum(sizes))
            try:
                self._file.put(0, memoryview(header))
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise output_error(error, path) from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.finish()
        except OSError as failure:
            raise output_error(failure, self._path) from failure
        finally:
            self._file.close()
        for name, written in self._written.items() if kind is None else ():
            if written != size_of(*self._layout[name]):
                dtype, shape = self._layout[name]
                raise AssertionError(f"{name}: {written} bytes for {dtype} of shape {shape}")

    def write(self, name: str, start: int, piece: memoryview) -> None:
        """Write some bytes of a tensor, from its byte `start` on."""
        if start + len(piece) > size_of(*self._layout[name]):
            raise AssertionError(f"{name}: byte {start + len(piece)} is none of it")
        with self._lock:
            self._written[name] += len(piece)
        try:
            self._file.put(self._begin[name] + start, piece)
        except OSError as error:
            raise output_error(error, self._path) from error

    def write_all(self, name: str, pieces: Pieces) -> None:
        """Write a whole tensor, which comes in pieces, in order."""
        start = 0
        for piece in pieces:
            self.write(name, start, piece)
            start += len(piece)

    def place(self, name: str, start: int) -> int:
        """Return where in a page byte `start` of a tensor lies: beginning there in memory, it is written fastest."""
        return (self._begin[name] + start) % PAGE


class OutputFile:
    """A new file, of which every byte is written once.

    Args:
        path: what is there is written over.
        size: what the file will have.

    Raises:
        OSError: it cannot be made. So do the methods where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by close()
        self._lock = threading.Lock()
        self._direct = -1
        self._ends: list[tuple[int, bytes]] = []
        if size >= LARGE and hasattr(os, "O_DIRECT"):
            with suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)

    def finish(self) -> None:
        """Write what is left."""
        with self._lock:
            ends, self._ends = self._ends, []
        for at, data in sorted(ends):
            self._through(at, memoryview(data))

    def close(self) -> None:
        """Close it, finished or not."""
        self._file.close()
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def put(self, at: int, data: memoryview) -> None:
        """Write some bytes, from byte `at` of the file on."""
        first = min(-at % PAGE, len(data))
        whole = (len(data) - first) // PAGE * PAGE
        if self._direct < 0 or whole < _AT_ONCE or np.frombuffer(data[first:], np.uint8).ctypes.data % PAGE:
            self._through(at, data)
            return
        done = first + self._around(at + first, data[first : first + whole])
        if done < first + whole:
            self._through(at + done, data[done : first + whole])
        ends = [(at, bytes(data[:first])), (at + first + whole, bytes(data[first + whole :]))]
        with self._lock:  # a write through the cache would wait for those around it
            self._ends += [end for end in ends if end[1]]
            many = len(self._ends) * PAGE > 2 * _MOST_KEPT
        if many:
            self.finish()

    def _around(self, at: int, data: memoryview) -> int:
        """Write whole pages around the cache; return how many bytes it took: none, where it takes none."""
        done = 0
        while done < len(data):
            try:
                count = os.pwrite(self._direct, data[done:], at + done)
            except OSError as error:
                if error.errno in _CANNOT:
                    break
                raise
            done += count
            if count % PAGE:
                break
        return done

    def _through(self, at: int, data: memoryview) -> None:
        while data:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self._file.fileno(), data[:_AT_ONCE], at)
            else:
                with self._lock:
                    self._file.seek(at)
                    count = self._file.write(data) or 0
            data, at = data[count:], at + count
