"""What is done to each tensor of a checkpoint while an adapter is merged into it.

    not a projection      read → convert, if that is asked for → write, sum up
    a projection          read → merge or convert, round, rescue → masks packed and compared → write, sum up
    by plain torch        the same, a whole weight at a time: what the compiled pass does not do

A weight's checks come when all of its pieces are done, in the order of their meaning: the base is finite, it has the
zeros that the adapter was trained on, the result is finite and has them too.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from spp.checkpoint.merge_state import Merging
from spp.checkpoint.pipeline import Job, Scratch, Sink
from spp.checkpoint.places import Place
from spp.checkpoint.scanning import PIECE_BYTES, Bytes, crc32, entry_pieces, put_together, read_piece, scan_piece
from spp.errors import MaskError, NonFiniteError
from spp.kernels.native.elementwise import Found, Matrix
from spp.merge_weight import layer_merge, sum_experts
from spp.patterns import all_finite, pack_bits
from spp.rules import rescue_
from spp.targets import is_projection_key


def job_of(merging: Merging, key: str, sink: Sink) -> Job:
    """Return the work on a tensor, which hands its bytes to `sink`."""
    shape, place = merging.reader.shape(key), merging.place_of.get(key)
    if place is None and not is_projection_key(key, len(shape)):
        return OtherJob(merging, key, sink)
    if place is None and merging.stored(key) == merging.reader.dtype(key):
        return WeightJob(merging, key, sink, None, [])
    matrices = merging.matrices(key, place)
    if matrices is None:
        return TorchJob(merging, key, sink, place)
    return WeightJob(merging, key, sink, place, matrices)


class OtherJob(Job):
    """A tensor whose zeros do not matter: copied byte for byte, or converted."""

    def __init__(self, merging: Merging, key: str, sink: Sink) -> None:
        self.merging, self.key, self.sink = merging, key, sink
        self.before, self.after = merging.reader.dtype(key), merging.stored(key)
        count = math.prod(merging.reader.shape(key))
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
        reader = self.merging.reader
        if self.before == self.after:
            data = read_piece(reader, self.key, begin, end, scratch, self.sink.place(begin))
            self.found[piece] = Found(crc=crc32(data), size=data.size)
            self.sink.write(begin, data)
            return
        size = self.before.itemsize
        data = read_piece(reader, self.key, begin * size, end * size, scratch)
        values = torch.frombuffer(data, dtype=self.before) if data.size else torch.empty(0, dtype=self.before)
        result = values.to(self.after)
        made: Bytes = result.view(torch.uint8).numpy() if result.numel() else np.empty(0, np.uint8)
        self.found[piece] = Found(
            finite_before=all_finite(values), finite_after=all_finite(result), crc=crc32(made), size=made.size
        )
        self.sink.write(begin * self.after.itemsize, made)

    def finish(self) -> None:
        """Record the checksum."""
        found = put_together(self.found)
        if found.finite_before and not found.finite_after:
            raise NonFiniteError(f"{self.key} overflows in {self.after}; merge to a wider dtype")
        self.merging.other[self.key] = found.crc


class WeightJob(Job):
    """A projection, by pieces.

    Args:
        place: what is merged into it, if anything.
        matrices: for the compiled pass, one or one an expert; none to leave it as it is.
    """

    def __init__(self, merging: Merging, key: str, sink: Sink, place: Place | None, matrices: list[Matrix]) -> None:
        self.merging, self.key, self.sink, self.place, self.matrices = merging, key, sink, place, matrices
        self.before, self.after = merging.reader.dtype(key), merging.stored(key)
        count = math.prod(merging.reader.shape(key))
        each = count // max(len(matrices), 1)
        self.bounds = [
            (k, k * each, begin, end) for k in range(max(len(matrices), 1)) for begin, end in entry_pieces(each)
        ]
        self.pieces = len(self.bounds)
        self.found = [Found()] * self.pieces
        self.bits = np.empty((count + 7) // 8, np.uint8)

    def do(self, piece: int, scratch: Scratch) -> None:
        """Merge, convert or look at a piece."""
        number, first, begin, end = self.bounds[piece]
        begin, end = first + begin, first + end
        size, stored = self.before.itemsize, self.after.itemsize
        reader, place = self.merging.reader, self.sink.place(begin * stored)
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
        found = put_together(self.found)
        self.merging.require_finite(self.key, found.finite_before)
        self.merging.keep(self.key, self.after, self.bits, found)
        if self.place is not None:
            self.merging.require_masks(self.place.path, self.merging.base_masks[self.key])
        if found.changed or not found.finite_after:
            self._raise()
        if self.place is not None:
            done = [layer_merge(found) for found in self._of_matrices()]
            self.merging.merges[self.place.path] = sum_experts(done) if len(self.place.shape) == 3 else done[0]
        del self.bits, self.found

    def _of_matrices(self) -> list[Found]:
        pieces = self.pieces // len(self.matrices)
        return [put_together(self.found[k : k + pieces]) for k in range(0, self.pieces, pieces)]

    def _raise(self) -> None:
        """Say what is wrong with the result: torch's merge finds the place."""
        if self.place is not None:
            with self.merging.by_torch:
                self.merging.merge(self.place, self.merging.reader.tensor(self.key))
            raise AssertionError(f"{self.key}: the compiled merge failed its checks where torch's passed")
        raise NonFiniteError(f"{self.key} overflows in {self.after}; merge to a wider dtype")


class TorchJob(Job):
    """A projection that plain torch merges or converts, as a whole."""

    def __init__(self, merging: Merging, key: str, sink: Sink, place: Place | None) -> None:
        self.merging, self.key, self.sink, self.place = merging, key, sink, place
        self.found = Found()
        self.before = self.after = np.empty(0, np.uint8)  # packed masks

    def do(self, piece: int, scratch: Scratch) -> None:
        """Do all of it; while the result is written, another thread may begin the next."""
        merging, key = self.merging, self.key
        with merging.by_torch:
            weight = merging.reader.tensor(key)
            merging.require_finite(key, all_finite(weight))
            before = pack_bits(weight)
            if self.place is not None:
                result = merging.merged_on_disk(key, self.place)
            else:
                result = weight.to(merging.stored(key))
                rescue_(result, weight)
            del weight
            for mapped in (key, *(self.place.keys if self.place is not None else ())):
                merging.reader.release(mapped)
        data: Bytes = result.reshape(-1).view(torch.uint8).numpy() if result.numel() else np.empty(0, np.uint8)
        bits, size, found = np.empty_like(before), result.element_size(), []
        for begin, end in entry_pieces(result.numel()):
            part = data[begin * size : end * size]
            found.append(scan_piece(part, result.dtype, bits[begin // 8 : (end + 7) // 8]))
            self.sink.write(begin * size, part)
        self.before, self.after, self.found = before, bits, put_together(found)

    def finish(self) -> None:
        """Check the weight as a whole and record it."""
        dtype = self.merging.stored(self.key)
        if not self.found.finite_before:
            raise NonFiniteError(f"{self.key} overflows in {dtype}; merge to a wider dtype")
        if not np.array_equal(self.before, self.after):
            raise MaskError(f"{self.key}: the merge would change its zeros; nothing was written")
        self.merging.keep(self.key, dtype, self.after, self.found)
        del self.before, self.after
