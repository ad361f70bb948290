"""What is done to each tensor of a checkpoint that is written anew.

    not a weight          read → convert, if that is asked for → write, sum up
    a weight              read → change or convert, round, rescue → masks packed and compared → write, sum up
    by plain torch        the same, a whole tensor at a time: what the compiled pass does not do

A weight's checks come when all of its pieces are done, in the order of their meaning: the base is finite, it has the
zeros that an adapter was trained on, the result is finite and has them too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from spp.checkpoint.pipeline import Job, Scratch, Sink
from spp.checkpoint.rewriting import Rewriting
from spp.checkpoint.scanning import PIECE_BYTES, Bytes, crc32, entry_pieces, put_together, read_piece, scan_piece
from spp.errors import MaskError
from spp.kernels.native.elementwise import Found, Matrix
from spp.patterns import all_finite, as_array, pack_bits
from spp.rules import rescue_
from spp.targets import is_other_matrix


def job_of(rewriting: Rewriting, key: str, sink: Sink) -> Job:
    """Return the work on a tensor, which hands its bytes to `sink`."""
    if key not in rewriting.changed:
        if not rewriting.is_weight(key):
            return OtherJob(rewriting, key, sink)
        if rewriting.stored(key) == rewriting.reader.dtype(key):
            return WeightJob(rewriting, key, sink, [])
    matrices = rewriting.matrices(key)
    return TorchJob(rewriting, key, sink) if matrices is None else WeightJob(rewriting, key, sink, matrices)


class OtherJob(Job):
    """A tensor that the certificate does not describe: copied byte for byte, or converted; a matrix keeps its zeros."""

    def __init__(self, rewriting: Rewriting, key: str, sink: Sink) -> None:
        self.rewriting, self.key, self.sink = rewriting, key, sink
        self.before, self.after = rewriting.reader.dtype(key), rewriting.stored(key)
        shape = rewriting.reader.shape(key)
        count, self.is_matrix = math.prod(shape), is_other_matrix(key, len(shape), self.before)
        if self.before == self.after:
            size = count * self.before.itemsize
            self.bounds = [(at, min(at + PIECE_BYTES, size)) for at in range(0, max(size, 1), PIECE_BYTES)]
        else:
            self.bounds = entry_pieces(count)
        self.pieces = len(self.bounds)
        self.found = [Found()] * self.pieces

    def do(self, piece: int, scratch: Scratch) -> None:
        """Copy or convert a piece."""
        begin, end = self.bounds[piece]
        reader = self.rewriting.reader
        if self.before == self.after:
            data = read_piece(reader, self.key, begin, end, scratch, self.sink.place(begin))
            self.found[piece] = Found(crc=crc32(data), size=data.size)
            self.sink.write(begin, data)
            return
        size = self.before.itemsize
        data = read_piece(reader, self.key, begin * size, end * size, scratch)
        values = torch.frombuffer(data, dtype=self.before) if data.size else torch.empty(0, dtype=self.before)
        result = values.to(self.after)
        if self.is_matrix:
            rescue_(result, values)
        made: Bytes = as_array(result.view(torch.uint8))
        self.found[piece] = Found(
            finite_before=all_finite(values), finite_after=all_finite(result), crc=crc32(made), size=made.size
        )
        self.sink.write(begin * self.after.itemsize, made)

    def finish(self) -> None:
        """Record the checksum."""
        found = put_together(self.found)
        if found.finite_before and not found.finite_after:
            raise self.rewriting.overflow(self.key)
        self.rewriting.other[self.key] = found.crc


class WeightJob(Job):
    """A weight, by pieces.

    Args:
        matrices: for the compiled pass, one or one an expert; none to leave it as it is.
    """

    def __init__(self, rewriting: Rewriting, key: str, sink: Sink, matrices: list[Matrix]) -> None:
        self.rewriting, self.key, self.sink, self.matrices = rewriting, key, sink, matrices
        self.before, self.after = rewriting.reader.dtype(key), rewriting.stored(key)
        count = math.prod(rewriting.reader.shape(key))
        each = count // max(len(matrices), 1)
        self.bounds = [
            (k, k * each, begin, end) for k in range(max(len(matrices), 1)) for begin, end in entry_pieces(each)
        ]
        self.pieces = len(self.bounds)
        self.found = [Found()] * self.pieces
        self.bits = np.empty((count + 7) // 8, np.uint8)

    def do(self, piece: int, scratch: Scratch) -> None:
        """Change, convert or look at a piece."""
        number, first, begin, end = self.bounds[piece]
        begin, end = first + begin, first + end
        size, stored = self.before.itemsize, self.after.itemsize
        reader, place = self.rewriting.reader, self.sink.place(begin * stored)
        bits = self.bits[begin // 8 : (end + 7) // 8]
        if self.matrices:
            data = scratch.bytes("out", (end - begin) * stored, place)
            merge = self.matrices[number].merge_file
            with reader.reading(self.key) as (file, start):
                offset = start + begin * size
                self.found[piece] = merge(file, offset, data.ctypes.data, bits, begin - first, end - first)
        else:
            data = read_piece(reader, self.key, begin * size, end * size, scratch, place)
            self.found[piece] = scan_piece(data, self.before, bits)
        self.sink.write(begin * stored, data)

    def finish(self) -> None:
        """Check the weight as a whole and record it."""
        rewriting, key, found = self.rewriting, self.key, put_together(self.found)
        rewriting.require_finite(key, found.finite_before)
        mask = rewriting.keep(key, self.after, self.bits, found)
        if key in rewriting.changed:
            rewriting.changed_by(key, mask, self._of_matrices())
        if found.changed or not found.finite_after:
            self._raise()
        del self.bits, self.found

    def _of_matrices(self) -> list[Found]:
        pieces = self.pieces // len(self.matrices)
        return [put_together(self.found[k : k + pieces]) for k in range(0, self.pieces, pieces)]

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
        data: Bytes = as_array(result.reshape(-1).view(torch.uint8))
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
