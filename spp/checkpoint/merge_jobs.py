"""What is done to each tensor of a checkpoint while an adapter is merged into it.

    not a projection      read → convert, if that is asked for → write, sum up
    a projection          read → merge or convert, round, rescue → masks packed and compared → write, sum up
    by plain torch        the same, a whole weight at a time: what the compiled pass does not do

A weight's checks come when all of its pieces are done, in the order of their meaning: the base is finite, it has the
zeros that the adapter was trained on, the result is finite and has them too.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spp.certificate import TensorRecord
from spp.checkpoint.adapters import Part, sum_of
from spp.checkpoint.pipeline import Job, Scratch, Sink
from spp.checkpoint.places import Place, Places
from spp.checkpoint.scanning import (
    PIECE_BYTES,
    Bytes,
    crc32,
    describe,
    entry_pieces,
    put_together,
    read_piece,
    scan_piece,
)
from spp.checkpoint.sources import input_axes
from spp.errors import MaskError, NonFiniteError
from spp.files import CheckpointReader, mask_sha256
from spp.inject import layer_generator
from spp.kernels.native import elementwise
from spp.kernels.native.compiler import DTYPES as COMPILED
from spp.kernels.native.elementwise import Found, Matrix, terms_of
from spp.merge import DTYPES
from spp.merge_weight import LayerMerge, layer_merge, merge_experts, merge_tensor, sum_experts
from spp.patterns import all_finite, pack_bits
from spp.rules import rescue_
from spp.targets import is_projection_key


class Merging:
    """What all jobs of a merge share, and what they have found so far.

    Args:
        reader: of the base; places: of the layers in it.
        parts: the adapters.
        dtype, rounding, seed: as for `merge_checkpoint`.

    Attributes:
        merges: {module path: what was done}.
        tensors, other: as in a certificate. base_masks: {key: mask_sha256} of the base's tensors.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        places: Places,
        parts: list[Part],
        dtype: torch.dtype | None,
        rounding: str,
        seed: int,
    ) -> None:
        self.reader, self.places, self.parts = reader, places, parts
        self.dtype, self.rounding, self.seed = dtype, rounding, seed
        self.layers = sum_of(parts)
        self.axes = input_axes(reader)
        self.merges: dict[str, LayerMerge] = {}
        self.tensors: dict[str, TensorRecord] = {}
        self.other: dict[str, int] = {}
        self.base_masks: dict[str, str] = {}
        self.by_torch = threading.Lock()  # held by who works on a whole weight: one at a time is in memory
        self._place_of = {key: place for place in places.places for key in place.keys}
        self._ready: dict[str, Tensor] = {}  # merged tensors on disk of a group whose other tensors were asked for

    def stored(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor of the output has."""
        found = self.reader.dtype(key)
        return self.dtype if self.dtype is not None and found in DTYPES else found

    def job(self, key: str, sink: Sink) -> Job:
        """Return the work on a tensor, which hands its bytes to `sink`."""
        shape, place = self.reader.shape(key), self._place_of.get(key)
        if place is None and not is_projection_key(key, len(shape)):
            return OtherJob(self, key, sink)
        if place is None and self.stored(key) == self.reader.dtype(key):
            return WeightJob(self, key, sink, None, [])
        matrices = self._matrices(key, place)
        return TorchJob(self, key, sink, place) if matrices is None else WeightJob(self, key, sink, place, matrices)

    def _matrices(self, key: str, place: Place | None) -> list[Matrix] | None:
        """Return what the compiled pass needs to merge or convert a weight; None where torch has to do it."""
        before, after, shape = self.reader.dtype(key), self.stored(key), self.reader.shape(key)
        by_chance = place is not None and self.rounding == "stochastic" and after in (torch.bfloat16, torch.float16)
        grouped = place is not None and place.group is not None
        library = elementwise.library() if before in COMPILED and after in COMPILED else None
        if library is None or by_chance or grouped or len(shape) not in (2, 3) or math.prod(shape) == 0:
            return None
        rows, cols = shape[-2:]
        if place is None:
            return [Matrix(library, math.prod(shape[:-1]), cols, before, after)]
        if len(shape) == 3 and rows * cols % 8:
            return None  # packed bits of an expert would begin inside a byte
        layer = self.layers[place.path]
        outputs = cols if place.transposed else rows
        of_experts = zip(*(p.unbind(0) for p in layer.params), strict=True) if len(shape) == 3 else [layer.params]
        matrices = []
        for params in of_experts:
            terms = terms_of(layer.rule, layer.rule.prepare(list(params), layer.scaling, outputs, torch.float32))
            if terms is None:
                return None
            matrices.append(Matrix(library, rows, cols, before, after, terms, transposed=place.transposed))
        return matrices

    def keep(self, key: str, dtype: torch.dtype, bits: Bytes, found: Found) -> None:
        """Record a weight that was made, from the packed mask of the base, which it has too."""
        facts, mask = describe(self.reader.shape(key), dtype, self.axes[key], bits, found)
        self.base_masks[key] = mask
        self.tensors[key] = TensorRecord(
            facts.shape, facts.dtype, self.axes[key], facts.pattern, facts.zeros, mask, found.crc
        )

    def require_finite(self, key: str, finite: bool) -> None:
        """Raise unless a projection of the base is finite."""
        if not finite:
            raise NonFiniteError(f"{key} of {self.reader.directory} holds NaN or infinity; mend the base first")

    def require_masks(self, path: str, mask: str) -> None:
        """Raise unless a layer of the base has the zeros that the adapters were trained on."""
        for part in self.parts:
            if path in part.layers and (part.files.base_masks or {}).get(path, mask) != mask:
                self._raise_masks(part)

    def merged_on_disk(self, key: str, place: Place) -> Tensor:
        """Return one tensor on disk of a merged weight; the others of its group wait to be asked for."""
        if key not in self._ready:
            if place.group is None:
                self._ready[key] = self.merge(place, self.reader.tensor(key))
            else:
                disk = self.places.disk
                assert disk is not None
                joined = disk.join(place.group, self.reader.tensor)
                for other in self.places.places:
                    if other.group is place.group:
                        name = next(name for name in joined if name in (other.path, f"{other.path}.weight"))
                        joined[name] = self.merge(other, joined[name])
                self._ready |= disk.split(joined)
        return self._ready.pop(key).contiguous()

    def merge(self, place: Place, weight: Tensor) -> Tensor:
        """Return the merged weight of a layer, in the layout of `weight`."""
        path = place.path
        self.require_masks(path, mask_sha256(weight))
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "rounding": self.rounding,
            "generator": layer_generator(self.seed, path),
            "where": path,
        }
        layer = self.layers[path]
        matrices = place.matrices(weight)
        if len(place.shape) == 3:
            of_experts = list(zip(*(p.unbind(0) for p in layer.params), strict=True))
            merged, self.merges[path] = merge_experts(
                layer.rule, matrices, of_experts, layer.scaling, transposed=place.transposed, **options
            )
        else:
            merged, self.merges[path] = merge_tensor(layer.rule, matrices[0], layer.params, layer.scaling, **options)
            merged = merged.T if place.transposed else merged
        return merged

    def _raise_masks(self, part: Part) -> None:
        masks, differing = part.files.base_masks or {}, []
        for place in self.places.places:
            if place.path not in part.layers or place.path not in masks:
                continue
            if place.group is None:
                weight = self.reader.tensor(place.keys[0])
            else:
                assert self.places.disk is not None
                joined = self.places.disk.join(place.group, self.reader.tensor)
                weight = joined.get(place.path, joined.get(f"{place.path}.weight", torch.empty(0)))
            if mask_sha256(weight) != masks[place.path]:
                differing.append(place.path)
        raise MaskError(
            f"the zeros of {self.reader.directory} are not those that the adapter in {part.files.source} was trained "
            f"on in {len(differing)} layers: {', '.join(sorted(differing))}. It belongs to "
            f"{part.files.base_name or 'another base'}: pass that one"
        )


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
        place = self.sink.place(begin * stored)
        data = read_piece(self.merging.reader, self.key, begin * size, end * size, scratch, place)
        bits = self.bits[begin // 8 : (end + 7) // 8]
        if self.matrices:
            out = scratch.bytes("out", (end - begin) * stored, place)
            matrix, source = self.matrices[number], data.ctypes.data
            self.found[piece] = matrix.merge(source, out.ctypes.data, bits, begin - first, end - first)
            data = out
        else:
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
