"""A checkpoint that is written anew with some of its weights changed: what is shared by all who work on it.

    for each shard of the base: for each tensor: read → change and check, or copy → write and hash; then the certificate

What is not changed is copied byte for byte, or converted where another dtype is asked for.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spp.certifying.certificate import BaseRecord, Certificate, TensorLayout, TensorRecord
from spp.certifying.save import certified_keys
from spp.certifying.scan import PIECE_BYTES, Bytes, crc32, describe, entry_pieces, put_together, read_piece, scan_piece
from spp.certifying.sources import input_axes
from spp.errors import MaskError, NonFiniteError
from spp.files import CheckpointReader, atomic_directory, check_target, write_json
from spp.files.carry import carry_files, update_config
from spp.files.header import size_of
from spp.files.pipeline import Job, Scratch, Sink, run
from spp.files.reader import INDEX
from spp.files.writer import TensorFile
from spp.kernels.native import elementwise
from spp.kernels.native.elementwise import Found, Matrix
from spp.masks.patterns import all_finite, as_array, pack_bits
from spp.merging.model import DTYPES
from spp.models.targets import is_other_matrix, is_projection_key
from spp.rules import rescue_


class ValueHashes(ABC):
    """Hashes the values of a weight while they are read."""

    @abstractmethod
    def add(self, piece: int, data: Bytes) -> None:
        """Take the bytes of a piece; several threads may."""

    @abstractmethod
    def finish(self) -> None:
        """Put the pieces together."""


class Rewriting(ABC):
    """A checkpoint that is written anew, and what its certificate will say.

    Args:
        reader: of the checkpoint.
        dtype: of all floating tensors of the output; None keeps each one's own.
        changed: keys of the tensors that `make` makes anew.
        certified: keys of tensors that are among the certificate's, besides the projections and the matrices that a
            certificate of the checkpoint names.

    Attributes:
        tensors, other: of the certificate, of what has been made.
        by_torch: held by who works on a whole weight: one at a time is in memory.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype | None,
        changed: Collection[str],
        certified: Collection[str],
    ) -> None:
        self.reader, self.dtype = reader, dtype
        before = {key for key in certified_keys(reader.directory) if self._is_matrix(key)}
        self.changed, self._certified = frozenset(changed), before.union(certified)
        self.axes = input_axes(reader)
        self.tensors: dict[str, TensorRecord] = {}
        self.other: dict[str, int] = {}
        self.by_torch = threading.Lock()

    def _is_matrix(self, key: str) -> bool:
        return key in self.reader and len(self.reader.shape(key)) == 2 and self.reader.dtype(key).is_floating_point

    @abstractmethod
    def make(self, key: str, tensor: Tensor) -> Tensor:
        """Return what is written in place of a changed tensor, contiguous and in the dtype of the output.

        Args:
            tensor: what is there, mapped from its file.
        """

    def keeps_zeros(self, key: str) -> bool:
        """Whether the zeros of a weight stay where they are."""
        return True

    def stored(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor of the output has."""
        found = self.reader.dtype(key)
        return self.dtype if self.dtype is not None and found in DTYPES else found

    def size(self) -> int:
        """Return the bytes of all tensors of the output."""
        return sum(size_of(self.stored(key), self.reader.shape(key)) for key in self.reader)

    def is_weight(self, key: str) -> bool:
        """Whether the certificate describes the zeros of a tensor."""
        return key in self._certified or is_projection_key(key, len(self.reader.shape(key)))

    def matrices(self, key: str) -> list[Matrix] | None:
        """Return what the compiled pass needs to make a weight; None where torch has to do it.

        Here of those that are converted only: who changes some by a compiled pass says how.
        """
        before, after, shape = self.reader.dtype(key), self.stored(key), self.reader.shape(key)
        library = elementwise.compiled(before, after)
        if library is None or key in self.changed or len(shape) not in (2, 3) or math.prod(shape) == 0:
            return None
        return [Matrix(library, math.prod(shape[:-1]), shape[-1], before, after)]

    def keep(self, key: str, dtype: torch.dtype, bits: Bytes, found: Found) -> None:
        """Record a weight that was made.

        Args:
            dtype: the weight's, in the output.
            bits: its packed mask.
            found: what is known of its bytes.
        """
        facts, mask = describe(self.reader.shape(key), dtype, self.axes[key], bits, found)
        self.tensors[key] = TensorRecord(
            facts.shape, facts.dtype, self.axes[key], facts.pattern, facts.zeros, mask, found.crc
        )

    def changed_by(self, key: str, found: list[Found]) -> None:
        """Check and record what the compiled pass made of a changed weight, after `keep`.

        Args:
            found: what is known of each of its matrices.
        """
        raise NotImplementedError(key)  # whose `matrices` are never a changed weight's

    def value_hashes(self, key: str, pieces: int) -> ValueHashes | None:
        """Return what takes the pieces of a weight as they are read; None where nobody asks for its values."""
        return None

    def certificate(self, base: BaseRecord | None = None) -> Certificate:
        """Return the certificate of what has been made."""
        layout = {k: TensorLayout.of(self.reader.shape(k), self.stored(k)) for k in self.other}
        return Certificate(self.tensors, self.other, base, other_layout=layout)

    def require_finite(self, key: str, finite: bool) -> None:
        """Raise unless a weight of the base is finite."""
        if not finite:
            raise NonFiniteError(f"{key} of {self.reader.directory} holds NaN or infinity; mend the base first")

    def overflow(self, key: str) -> NonFiniteError:
        """Return the error of a tensor that is not finite in the dtype of the output."""
        return NonFiniteError(f"{key} overflows in {self.stored(key)}; merge to a wider dtype")


# ---- What is done to each tensor of a checkpoint that is written anew.
#
#     CopyJob        not a weight: read → sum up, write
#     ConvertJob     not a weight: read → convert → sum up, write
#     WeightJob      a weight as it is: read → pack its mask, sum up → write
#     CompiledJob    a weight: read → change or convert, round, rescue → pack masks and compare them, sum up → write
#     TorchJob       the same, a whole tensor at a time: what the compiled pass does not do
#
# A weight's checks come when all of its pieces are done, in the order of their meaning: the base is finite, it has the
# zeros that an adapter was trained on, the result is finite and has them too.


def bytes_of(tensor: Tensor) -> Bytes:
    """Return the bytes of a contiguous tensor, not copied."""
    return as_array(tensor.reshape(-1).view(torch.uint8)) if tensor.numel() else np.empty(0, np.uint8)


def job_of(rewriting: Rewriting, key: str, sink: Sink) -> Job:
    """Return the work on a tensor, which hands its bytes to `sink`."""
    unchanged = key not in rewriting.changed
    if unchanged and rewriting.stored(key) == rewriting.reader.dtype(key):
        return WeightJob(rewriting, key, sink) if rewriting.is_weight(key) else CopyJob(rewriting, key, sink)
    if unchanged and not rewriting.is_weight(key):
        return ConvertJob(rewriting, key, sink)
    matrices = rewriting.matrices(key)
    return TorchJob(rewriting, key, sink) if matrices is None else CompiledJob(rewriting, key, sink, matrices)


class CopyJob(Job):
    """A tensor that the certificate does not describe, copied byte for byte."""

    def __init__(self, rewriting: Rewriting, key: str, sink: Sink) -> None:
        self.rewriting, self.key, self.sink = rewriting, key, sink
        size = size_of(rewriting.reader.dtype(key), rewriting.reader.shape(key))
        self.bytes = entry_pieces(size, PIECE_BYTES)
        self.pieces = len(self.bytes)
        self.found = [Found()] * self.pieces

    def do(self, piece: int, scratch: Scratch) -> None:
        """Copy some bytes."""
        begin, end = self.bytes[piece]
        data = read_piece(self.rewriting.reader, self.key, begin, end, scratch, self.sink.place(begin))
        self.found[piece] = Found(crc=crc32(data), size=data.size)
        self.sink.write(begin, data)

    def finish(self) -> None:
        """Record the checksum."""
        self.rewriting.other[self.key] = put_together(self.found).crc


class ConvertJob(Job):
    """A tensor that the certificate does not describe, in another dtype; a matrix keeps its zeros."""

    def __init__(self, rewriting: Rewriting, key: str, sink: Sink) -> None:
        self.rewriting, self.key, self.sink = rewriting, key, sink
        self.before, self.after = rewriting.reader.dtype(key), rewriting.stored(key)
        shape = rewriting.reader.shape(key)
        self.is_matrix = is_other_matrix(key, len(shape), self.before)
        self.entries = entry_pieces(math.prod(shape))
        self.pieces = len(self.entries)
        self.found = [Found()] * self.pieces

    def do(self, piece: int, scratch: Scratch) -> None:
        """Convert some entries."""
        begin, end = self.entries[piece]
        size = self.before.itemsize
        data = read_piece(self.rewriting.reader, self.key, begin * size, end * size, scratch)
        values = torch.frombuffer(data, dtype=self.before) if data.size else torch.empty(0, dtype=self.before)
        result = values.to(self.after)
        if self.is_matrix:
            rescue_(result, values)
        made = bytes_of(result)
        self.found[piece] = Found(
            finite_before=all_finite(values), finite_after=all_finite(result), crc=crc32(made), size=made.size
        )
        self.sink.write(begin * self.after.itemsize, made)

    def finish(self) -> None:
        """Check the tensor as a whole and record its checksum."""
        found = put_together(self.found)
        if found.finite_before and not found.finite_after:
            raise self.rewriting.overflow(self.key)
        self.rewriting.other[self.key] = found.crc


class WeightJob(Job):
    """A weight that stays as it is: copied while its mask is packed."""

    def __init__(self, rewriting: Rewriting, key: str, sink: Sink) -> None:
        self.rewriting, self.key, self.sink = rewriting, key, sink
        self.before, self.after = rewriting.reader.dtype(key), rewriting.stored(key)
        count = math.prod(rewriting.reader.shape(key))
        self.entries = self.cut(count)
        self.pieces = len(self.entries)
        self.found = [Found()] * self.pieces
        self.bits = np.empty((count + 7) // 8, np.uint8)

    def cut(self, count: int) -> list[tuple[int, int]]:
        """Return (begin, end) of the pieces of the weight's entries."""
        return entry_pieces(count)

    def do(self, piece: int, scratch: Scratch) -> None:
        """Make some entries and write them."""
        begin, end = self.entries[piece]
        bits = self.bits[begin // 8 : (end + 7) // 8]
        data, self.found[piece] = self.made(piece, bits, scratch)
        self.sink.write(begin * self.after.itemsize, data)

    def made(self, piece: int, bits: Bytes, scratch: Scratch) -> tuple[Bytes, Found]:
        """Return the bytes of a piece's entries after, and what was found; pack their mask into `bits`."""
        (begin, end), size = self.entries[piece], self.before.itemsize
        place = self.sink.place(begin * size)
        data = read_piece(self.rewriting.reader, self.key, begin * size, end * size, scratch, place)
        return data, scan_piece(data, self.before, bits)

    def finish(self) -> None:
        """Check the weight as a whole and record it."""
        found = put_together(self.found)
        self.rewriting.require_finite(self.key, found.finite_before)
        self.rewriting.keep(self.key, self.after, self.bits, found)
        del self.bits, self.found


class CompiledJob(WeightJob):
    """A weight that the compiled pass changes or converts.

    Args:
        matrices: of one size, which the weight is in a row: one, or one an expert.
    """

    def __init__(self, rewriting: Rewriting, key: str, sink: Sink, matrices: list[Matrix]) -> None:
        self.matrices = matrices
        super().__init__(rewriting, key, sink)
        self.values = rewriting.value_hashes(key, self.pieces)

    def cut(self, count: int) -> list[tuple[int, int]]:
        """Return (begin, end) of the pieces of the weight's entries; none is of two matrices."""
        each = self.matrices[0].count
        pieces = entry_pieces(each)
        return [(first + begin, first + end) for first in range(0, count, each) for begin, end in pieces]

    def made(self, piece: int, bits: Bytes, scratch: Scratch) -> tuple[Bytes, Found]:
        """Merge a piece's entries while they are read; where their values are hashed, once they have been."""
        begin, end = self.entries[piece]
        each = self.matrices[0].count
        first = begin // each * each  # entry that the matrix begins with
        size = self.after.itemsize
        data = scratch.bytes("out", (end - begin) * size, self.sink.place(begin * size))
        matrix, of_matrix = self.matrices[begin // each], (data.ctypes.data, bits, begin - first, end - first)
        at, stop = begin * self.before.itemsize, end * self.before.itemsize
        if self.values is not None:
            before = read_piece(self.rewriting.reader, self.key, at, stop, scratch)
            self.values.add(piece, before)
            return data, matrix.merge(before.ctypes.data, *of_matrix)
        with self.rewriting.reader.reading(self.key) as (file, start):
            return data, matrix.merge_file(file, start + at, *of_matrix)

    def finish(self) -> None:
        """Check the weight and the result, and record them."""
        each = self.pieces // len(self.matrices)
        of_matrices = [put_together(self.found[k : k + each]) for k in range(0, self.pieces, each)]
        super().finish()
        if self.key in self.rewriting.changed:
            self.rewriting.changed_by(self.key, of_matrices)
        if self.values is not None:
            self.values.finish()
        if any(found.changed or not found.finite_after for found in of_matrices):
            self._raise()

    def _raise(self) -> None:
        """Say what is wrong with the result: torch finds the place."""
        rewriting, key = self.rewriting, self.key
        if key not in rewriting.changed:
            raise rewriting.overflow(key)
        with rewriting.by_torch:
            rewriting.make(key, rewriting.reader.tensor(key))
        raise AssertionError(f"{key}: the compiled merge failed its checks where torch's passed")


class TorchJob(Job):
    """A tensor that plain torch changes or converts, as a whole."""

    def __init__(self, rewriting: Rewriting, key: str, sink: Sink) -> None:
        self.rewriting, self.key, self.sink = rewriting, key, sink
        self.is_weight = rewriting.is_weight(key)
        self.found = Found()
        self.before = self.after = np.empty(0, np.uint8)  # packed masks of a weight

    def do(self, piece: int, scratch: Scratch) -> None:
        """Do all of it; while the result is written, another thread may begin the next."""
        with self.rewriting.by_torch:
            result = self._made()
        data = bytes_of(result)
        bits, size, found = np.empty_like(self.before), result.element_size(), []
        for begin, end in entry_pieces(result.numel()):
            part = data[begin * size : end * size]
            if self.is_weight:
                found.append(scan_piece(part, result.dtype, bits[begin // 8 : (end + 7) // 8]))
            else:
                found.append(Found(crc=crc32(part), size=part.size))
            self.sink.write(begin * size, part)
        self.after, self.found = bits, put_together(found)

    def _made(self) -> Tensor:
        rewriting, key = self.rewriting, self.key
        tensor = rewriting.reader.tensor(key)
        if self.is_weight:
            rewriting.require_finite(key, all_finite(tensor))
            self.before = pack_bits(tensor)
        if key in rewriting.changed:
            result = rewriting.make(key, tensor)
            if not self.is_weight and result.is_floating_point() and not all_finite(result):
                raise rewriting.overflow(key)
        else:
            result = tensor.to(rewriting.stored(key))
            rescue_(result, tensor)
        del tensor
        rewriting.reader.release(key)
        return result

    def finish(self) -> None:
        """Check the tensor as a whole and record it."""
        rewriting, key = self.rewriting, self.key
        if not self.is_weight:
            rewriting.other[key] = self.found.crc
            return
        if not self.found.finite_before:
            raise rewriting.overflow(key)
        if rewriting.keeps_zeros(key) and not np.array_equal(self.before, self.after):
            raise MaskError(f"{key}: the merge would change its zeros; nothing was written")
        rewriting.keep(key, rewriting.stored(key), self.after, self.found)
        del self.before, self.after


# ---- Write a checkpoint anew, shard by shard, by a few threads: pieces of tensors in memory, never the model.


@contextmanager
def output(
    rewriting: Rewriting, out_dir: str | os.PathLike[str], *, overwrite: bool, dry_run: bool
) -> Iterator[Path | None]:
    """Give the directory to write into, as `atomic_directory`; for a dry run None, if it could be written."""
    copies = [rewriting.reader.directory]
    if dry_run:
        check_target(out_dir, overwrite=overwrite, size=rewriting.size(), copies=copies)
        yield None
        return
    with atomic_directory(out_dir, overwrite=overwrite, copies=copies) as directory:
        yield directory


def write_shards(rewriting: Rewriting, directory: Path | None, task: str, *, card: bool = True) -> None:
    """Write all shards, the files beside them, and the index into a directory.

    Args:
        directory: None to make and check everything, and write nothing.
        task: what a bar shows.
        card: whether the model card goes along.
    """
    _write_tensors(rewriting, directory, task)
    reader = rewriting.reader
    carry_files(reader.directory, directory, set(reader.shards()), card=card)
    if directory is not None:
        _write_index(rewriting, directory)
        if rewriting.dtype is not None:
            update_config(directory, rewriting.dtype)


def _write_tensors(rewriting: Rewriting, directory: Path | None, task: str) -> None:
    """Make every tensor, and write it into the file of the name that the base has it in, unless there is no directory.

    A file is closed when its last tensor is done, while threads are at the next one already.
    """
    reader = rewriting.reader
    left: dict[Job, tuple[ExitStack, list[int]]] = {}  # {job: (its file, how many of its tensors are not done)}

    def jobs() -> Iterator[Job]:
        for name, keys in reader.shards().items():
            layout = {key: (rewriting.stored(key), reader.shape(key)) for key in keys}
            file, names = None, sorted(layout)
            own = ExitStack()
            if directory is not None:
                file = own.enter_context(TensorFile(directory / name, layout))
                names = file.names
            files.push(own)
            count = [len(names)]
            for key in names:
                job = job_of(rewriting, key, Sink(file, key))
                left[job] = own, count
                yield job

    def done(job: Job) -> None:
        bar.update()
        own, count = left.pop(job)
        count[0] -= 1
        if not count[0]:
            own.close()

    with ExitStack() as files, tqdm(total=len(reader.keys()), desc=task, unit="tensor", disable=None) as bar:
        run(jobs(), done, waiting=1)


def _write_index(rewriting: Rewriting, directory: Path) -> None:
    reader = rewriting.reader
    if reader.index is None:
        return
    if rewriting.dtype is None:
        shutil.copyfile(reader.directory / INDEX, directory / INDEX)
        return
    metadata: Any = reader.index.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": rewriting.size()}
    write_json(directory / INDEX, {**reader.index, "metadata": metadata})
