"""A checkpoint that is written anew, each tensor by a transform: pieces of tensors in memory, never the model.

    for each shard of the base: for each tensor: read → transform → check, hash and write; then the certificate

    no transform     the bytes as they are, or the values in another dtype, zeros kept: piece by piece
    a transform      of the whole tensor, by torch; or by the compiled pass, which gives the same bits piece by piece

A tensor is checked when all of its pieces are done, in the order of what the checks mean: the base is finite, it has
the zeros that an adapter was trained on, the result is finite and has them too.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spp.certifying.certificate import BaseRecord, Certificate, TensorLayout, TensorRecord, certified_keys
from spp.certifying.scan import (
    PIECE_BYTES,
    Bytes,
    Scanned,
    crc32,
    describe,
    entry_pieces,
    put_together,
    read_piece,
    scan_piece,
)
from spp.certifying.sources import input_axes
from spp.errors import MaskError, NonFiniteError
from spp.files import CheckpointReader, atomic_directory, check_target, dtype_name, write_json
from spp.files.carry import carry_files, update_config
from spp.files.hashes import joined_sha256, piece_sha256
from spp.files.header import size_of
from spp.files.pipeline import Job, Scratch, run
from spp.files.reader import INDEX
from spp.files.writer import TensorFile
from spp.kernels.native import elementwise
from spp.kernels.native.elementwise import Found, Matrix
from spp.masks.patterns import all_finite, as_array, count_kept, pack_bits
from spp.models.targets import is_other_matrix, is_projection_key
from spp.rules import rescue_
from spp.weights import FLOATS

Hashes = Mapping[str, str | None]


@dataclass(frozen=True)
class Transform:
    """How a tensor of a checkpoint is made anew.

    Attributes:
        make: (key, tensor as it is stored, mapped) → tensor in the dtype of the output, by torch.
        compiled: key → what the compiled pass makes it by, of one size, one or one an expert: the same bits as `make`,
            which is asked only where this is None, or to say what is wrong.
        done: (what was found of each matrix, sha256 of the mask, hashes of the values that were read) → checks and
            records what the compiled pass made.
        hashed: dtypes in which the compiled pass hashes the values that it reads, {dtype name: values_sha256}.
        keeps_zeros: whether the zeros of a weight stay where they are.
    """

    make: Callable[[str, Tensor], Tensor]
    compiled: Callable[[str], list[Matrix] | None] | None = None
    done: Callable[[list[Found], str, Hashes], None] | None = None
    hashed: Sequence[torch.dtype] = ()
    keeps_zeros: bool = True


class Rewriting:
    """A checkpoint that is written anew, and what its certificate will say.

    Args:
        reader: of the checkpoint.
        transforms: of the tensors that are made anew, by key.
        dtype: of all floating tensors of the output; None keeps each one's own.
        certified: keys of tensors that are among the certificate's, besides the projections and the matrices that a
            certificate of the checkpoint names.

    Attributes:
        weights: keys of the tensors whose zeros the certificate describes.
        matrices: keys of these and of other matrices, whose zeros stay zeros in another dtype.
        tensors, other: of the certificate, of what has been made.
        by_torch: held by who works on a whole tensor: one at a time is in memory.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        transforms: Mapping[str, Transform],
        dtype: torch.dtype | None,
        certified: Collection[str],
    ) -> None:
        self.reader, self.transforms, self.dtype = reader, transforms, dtype
        ranks = {key: len(reader.shape(key)) for key in reader}
        named = {k for k in certified_keys(reader.directory) if ranks.get(k) == 2 and reader.dtype(k).is_floating_point}
        named -= transforms.keys()  # what is made anew without being certified keeps no zeros
        self.weights = {key for key, rank in ranks.items() if is_projection_key(key, rank)}.union(named, certified)
        others = {key for key, rank in ranks.items() if is_other_matrix(key, rank, reader.dtype(key))}
        self.matrices = self.weights | others
        self.axes = input_axes(reader)
        self.tensors: dict[str, TensorRecord] = {}
        self.other: dict[str, int] = {}
        self.by_torch = threading.Lock()

    def stored(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor of the output has."""
        return stored_dtype(self.reader, key, self.dtype)

    def size(self) -> int:
        """Return the bytes of all tensors of the output."""
        return sum(size_of(self.stored(key), self.reader.shape(key)) for key in self.reader)

    def certificate(self, base: str | os.PathLike[str] | None = None) -> Certificate:
        """Return the certificate of what has been made.

        Args:
            base: name or path of the checkpoint, where all zeros are its own: the fingerprint is the base's too.
        """
        layout = {k: TensorLayout.of(self.reader.shape(k), self.stored(k)) for k in self.other}
        made = Certificate(self.tensors, self.other, other_layout=layout)
        return made if base is None else replace(made, base=BaseRecord(os.fspath(base), made.fingerprint()))


def stored_dtype(reader: CheckpointReader, key: str, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a tensor gets where all floating ones are converted to `dtype`, or keep theirs."""
    found = reader.dtype(key)
    return dtype if dtype is not None and found in FLOATS.values() else found


class TensorJob(Job):
    """Make one tensor of the output, check it, and write its bytes into a file, unless that is None."""

    def __init__(self, rewriting: Rewriting, key: str, file: TensorFile | None) -> None:
        self.rewriting, self.key, self.file = rewriting, key, file
        reader = self.reader = rewriting.reader
        self.shape, self.before, self.after = reader.shape(key), reader.dtype(key), rewriting.stored(key)
        self.is_weight, self.transform = key in rewriting.weights, rewriting.transforms.get(key)
        self.matrices = self._compiled()
        self.whole = self.transform is not None and not self.matrices
        self.entries = self._cut()
        self.pieces = 1 if self.whole else len(self.entries)
        self.found = [Found()] * len(self.entries)
        self.bits = np.empty((math.prod(self.shape) + 7) // 8 if self.is_weight else 0, np.uint8)
        hashed = self.transform.hashed if self.transform is not None and not self.whole else ()
        self.hashes = {dtype: [b""] * self.pieces for dtype in hashed}

    def _compiled(self) -> list[Matrix]:
        """Return what the compiled pass makes a weight by; none where nothing changes, or where torch has to do it."""
        transform, shape = self.transform, self.shape
        if transform is not None:
            return (transform.compiled(self.key) if transform.compiled is not None else None) or []
        if not self.is_weight or self.before == self.after or len(shape) not in (2, 3) or not math.prod(shape):
            return []
        library = elementwise.compiled(self.before, self.after)
        rows = math.prod(shape[:-1])
        return [] if library is None else [Matrix(library, rows, shape[-1], self.before, self.after)]

    def _cut(self) -> list[tuple[int, int]]:
        """Return (begin, end) of the pieces of the tensor's entries; none is of two matrices."""
        count = math.prod(self.shape)
        if self.matrices:
            each = self.matrices[0].count
            return [(first + a, first + b) for first in range(0, count, each) for a, b in entry_pieces(each)]
        copied = not self.is_weight and self.before == self.after
        return entry_pieces(count, max(1, PIECE_BYTES // self.before.itemsize) if copied else None)

    def do(self, piece: int, scratch: Scratch) -> None:
        """Make some entries and write them; of a whole tensor all, while another thread may begin the next."""
        if self.whole:
            made, zeros = self._made()
            for index, (begin, end) in enumerate(self.entries):
                part = made[begin * self.after.itemsize : end * self.after.itemsize]
                self._write(index, part, zeros[begin // 8 : (end + 7) // 8], finite_before=True)
        elif self.matrices:
            self._merge(piece, scratch)
        else:
            self._convert(piece, scratch)

    def _made(self) -> tuple[Bytes, Bytes]:
        """Return the bytes of the whole tensor, made by torch, and the packed mask of what it was made of."""
        assert self.transform is not None
        with self.rewriting.by_torch:
            tensor, zeros = self.reader.tensor(self.key), self.bits
            if self.is_weight:
                self._require_finite(all_finite(tensor))
                zeros = pack_bits(tensor)
            result = self.transform.make(self.key, tensor).contiguous()
            del tensor
            self.reader.release(self.key)
        return bytes_of(result), zeros

    def _merge(self, piece: int, scratch: Scratch) -> None:
        """Make a piece by the compiled pass while it is read; where its values are hashed, once it has been."""
        begin, end = self.entries[piece]
        each, size = self.matrices[0].count, self.after.itemsize
        first = begin // each * each  # entry that the matrix begins with
        bits = self.bits[begin // 8 : (end + 7) // 8]
        data = scratch.bytes("out", (end - begin) * size, self._place(begin * size))
        matrix, of_matrix = self.matrices[begin // each], (data.ctypes.data, bits, begin - first, end - first)
        at, stop = begin * self.before.itemsize, end * self.before.itemsize
        if self.hashes:
            read = read_piece(self.reader, self.key, at, stop, scratch)
            values = torch.frombuffer(read, dtype=self.before)
            for dtype, pieces in self.hashes.items():
                pieces[piece] = piece_sha256(values, dtype)
            self.found[piece] = matrix.merge(read.ctypes.data, *of_matrix)
        else:
            with self.reader.reading(self.key) as (file, start):
                self.found[piece] = matrix.merge_file(file, start + at, *of_matrix)
        self._put(begin * size, data)

    def _convert(self, piece: int, scratch: Scratch) -> None:
        """Copy a piece, or convert it to another dtype; a matrix keeps its zeros."""
        (begin, end), size = self.entries[piece], self.before.itemsize
        place = self._place(begin * size) if self.before == self.after else 0
        data = read_piece(self.reader, self.key, begin * size, end * size, scratch, place)
        if self.before == self.after:
            self._write(piece, data)
            return
        values = _values(data, self.before)
        result = values.to(self.after)
        if self.key in self.rewriting.matrices:
            rescue_(result, values)
        zeros = pack_bits(values) if self.is_weight else None
        self._write(piece, bytes_of(result), zeros, finite_before=all_finite(values))

    def _write(self, piece: int, data: Bytes, zeros: Bytes | None = None, *, finite_before: bool | None = None) -> None:
        """Look at the bytes of a piece and write them.

        Args:
            zeros: packed mask of what a weight's piece was made of; None where that is the piece itself.
            finite_before: whether what the piece was made of is finite; None where that is the piece itself.
        """
        begin, end = self.entries[piece]
        if self.is_weight:
            bits = self.bits[begin // 8 : (end + 7) // 8]
            found = scan_piece(data, self.after, bits)
            if zeros is not None:
                found = replace(found, changed=count_kept(bits ^ zeros))
        else:
            found = Found(crc=crc32(data), size=data.size)
            if finite_before is not None and self.after.is_floating_point:
                found = replace(found, finite_after=all_finite(_values(data, self.after)))
        if finite_before is not None:
            found = replace(found, finite_before=finite_before)
        self.found[piece] = found
        self._put(begin * self.after.itemsize, data)

    def _put(self, start: int, data: Bytes) -> None:
        if self.file is not None:
            self.file.write(self.key, start, data.data)

    def _place(self, start: int) -> int:
        """Return where in a page of memory the bytes from `start` on had best begin."""
        return 0 if self.file is None else self.file.place(self.key, start)

    def finish(self) -> None:
        """Check the tensor as a whole and record it."""
        rewriting, key, found = self.rewriting, self.key, put_together(self.found)
        if self.is_weight:
            self._require_finite(found.finite_before)
            axis = rewriting.axes[key]
            facts, mask = describe(self.shape, self.after, axis, self.bits, found)
            rewriting.tensors[key] = Scanned(found.crc, mask, facts, axis).record()
            if self.transform is not None and self.matrices:
                self._done(self.transform, mask)
        else:
            rewriting.other[key] = found.crc
        if found.finite_before and not found.finite_after:
            raise NonFiniteError(f"{key} overflows in {self.after}; merge to a wider dtype")
        if found.changed and (self.transform is None or self.transform.keeps_zeros):
            raise MaskError(f"{key}: the merge would change its zeros; nothing was written")
        del self.bits, self.found

    def _done(self, transform: Transform, mask: str) -> None:
        """Hand over what the compiled pass found; torch says what is wrong with its result."""
        each = self.pieces // len(self.matrices)
        found = [put_together(self.found[k : k + each]) for k in range(0, self.pieces, each)]
        hashes = {dtype_name(d): joined_sha256(self.shape, d, pieces) for d, pieces in self.hashes.items()}
        assert transform.done is not None
        transform.done(found, mask, hashes)
        if any(one.changed or not one.finite_after for one in found):
            with self.rewriting.by_torch:
                transform.make(self.key, self.reader.tensor(self.key))
            raise AssertionError(f"{self.key}: the compiled merge failed its checks where torch's passed")

    def _require_finite(self, finite: bool) -> None:
        if not finite:
            raise NonFiniteError(f"{self.key} of {self.reader.directory} holds NaN or infinity; mend the base first")


def bytes_of(tensor: Tensor) -> Bytes:
    """Return the bytes of a contiguous tensor, not copied."""
    return as_array(tensor.reshape(-1).view(torch.uint8)) if tensor.numel() else np.empty(0, np.uint8)


def _values(data: Bytes, dtype: torch.dtype) -> Tensor:
    """Return bytes as values, not copied."""
    return torch.frombuffer(data, dtype=dtype) if data.size else torch.empty(0, dtype=dtype, device="cpu")


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
    reader = rewriting.reader
    carry_files(reader.directory, None, set(reader.shards()), card=card, told=False)  # before hours of work
    _write_tensors(rewriting, directory, task)
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
    closing: dict[Job, ExitStack] = {}  # {the last job of a file: the file}

    def jobs() -> Iterator[Job]:
        for name, keys in reader.shards().items():
            layout = {key: (rewriting.stored(key), reader.shape(key)) for key in keys}
            file, names = None, sorted(layout)
            own = ExitStack()
            if directory is not None:
                file = own.enter_context(TensorFile(directory / name, layout))
                names = file.names
            files.push(own)
            for key in names:
                job = TensorJob(rewriting, key, file)
                if key == names[-1]:
                    closing[job] = own
                yield job

    def done(job: Job) -> None:
        bar.update()
        if job in closing:
            closing.pop(job).close()

    with ExitStack() as files, tqdm(total=len(reader.keys()), desc=task, unit="tensor", disable=None) as bar:
        run(jobs(), done, waiting=1)


def _write_index(rewriting: Rewriting, directory: Path) -> None:
    reader = rewriting.reader
    if reader.index is None:
        return
    metadata: Any = reader.index.get("metadata")
    places = {key: name for name, keys in reader.shards().items() for key in keys}
    if rewriting.dtype is None and isinstance(metadata, dict) and places == reader.index["weight_map"]:
        shutil.copyfile(reader.directory / INDEX, directory / INDEX)
        return
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": rewriting.size()}
    write_json(directory / INDEX, {**reader.index, "metadata": metadata, "weight_map": places})
