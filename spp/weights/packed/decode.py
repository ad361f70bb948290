"""Decode a rectangle of a packed matrix on the CPU: values are moved as bits, a few rows at a time.

N:M: a table gives the places of a byte's values, a second one that of the byte, and one indexed write puts the
values there; by numpy on one thread, where it is faster, by torch on several. Any pattern: the bits that are set are
the places.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.masks.patterns import SHIFTS, as_array
from spp.weights.packed.layout import INTEGERS, STRETCH, Layout, row_counts

_CHUNK = 1 << 17  # weights decoded together: places, values and the result of a chunk stay in a core's cache
_THREADED_CHUNK = 1 << 19  # the same for several cores
Array = npt.NDArray[Any]
_local = threading.local()


def decode_cpu(
    layout: Layout, values: Tensor, codes: Tensor, starts: Tensor | None, rows: slice, cols: slice, out: Tensor
) -> None:
    """Write W[rows, cols] into `out`.

    Args:
        layout, values, codes, starts: of W, on the CPU.
        rows, cols: with 0 ≤ start ≤ stop ≤ m or n, step 1.
        out: contiguous, of the block's shape and W's dtype.
    """
    if out.numel() == 0:
        return
    bits = INTEGERS[values.element_size()]
    first = cols.start // 8 * 8
    last = min(-(-cols.stop // 8) * 8, layout.cols)
    cut = slice(cols.start - first, cols.stop - first)
    whole = cut.stop - cut.start == last - first
    source, target = values.view(bits), out.view(bits)
    held, bytes_ = as_array(source), as_array(codes)
    begins = bytes_ if starts is None else as_array(starts)  # N:M has none
    threaded = layout.is_nm and torch.get_num_threads() > 1
    step = _rows_together(last - first, threaded)
    spare = None if whole else torch.empty((step, last - first), dtype=bits, device="cpu")
    for begin in range(rows.start, rows.stop, step):
        part = slice(begin, min(begin + step, rows.stop))
        at = target[part.start - rows.start : part.stop - rows.start]
        block = at if spare is None else spare[: len(at)]
        if threaded:
            _decode_groups_threaded(layout, source, codes, part, first, last, block)
        elif layout.is_nm:
            _decode_groups(layout, held, bytes_, part, first, last, as_array(block))
        else:
            _decode_mask(held, bytes_, begins, part, first, last, as_array(block))
        if spare is not None:
            at.copy_(block[:, cut])


def _decode_groups(
    layout: Layout, values: Array, codes: Array, rows: slice, first: int, last: int, block: Array
) -> None:
    """Write W[rows, first:last] into `block`, N:M; `first` is a multiple of 8, `last` is one or is n."""
    width = last - first
    table = _places_in_byte(layout.kept, layout.group)
    inside = codes[rows, first // 8 : -(-last // 8)]
    count = width // layout.group * layout.kept
    places = table.take(inside).view(np.int64)[:, :count]  # (rows, count): in the byte's columns
    places += _first_places(layout.kept, layout.group, width)[: len(block)]
    block.fill(0)
    begin = first // layout.group * layout.kept
    block.reshape(-1)[places.reshape(-1)] = values[rows, begin : begin + count].reshape(-1)


def _decode_groups_threaded(
    layout: Layout, values: Tensor, codes: Tensor, rows: slice, first: int, last: int, block: Tensor
) -> None:
    """Write W[rows, first:last] into `block`, as `_decode_groups` does, with torch's operations."""
    width = last - first
    table = torch.from_numpy(_places_in_byte(layout.kept, layout.group).view(np.int64)).view(256, -1)
    inside = codes[rows, first // 8 : -(-last // 8)].reshape(-1).to(torch.int32)
    count = width // layout.group * layout.kept
    places = torch.index_select(table, 0, inside, out=_scratch(len(inside), table.shape[1]))
    places = places.view(len(block), -1)[:, :count]
    places += torch.from_numpy(_first_places(layout.kept, layout.group, width, True))[: len(block)]
    block.zero_()
    begin = first // layout.group * layout.kept
    block.view(-1).index_copy_(0, places.reshape(-1), values[rows, begin : begin + count].reshape(-1))


def _decode_mask(values: Array, codes: Array, starts: Array, rows: slice, first: int, last: int, block: Array) -> None:
    """Write W[rows, first:last] into `block`, any pattern; `first` is a multiple of 8, `last` is one or is n."""
    inside = codes[rows, first // 8 : -(-last // 8)]
    places = np.flatnonzero(np.unpackbits(inside, axis=1, count=last - first).view(np.bool_))
    block.fill(0)
    stretch = first // STRETCH
    if first == 0 and inside.shape[1] == codes.shape[1]:  # whole rows: their values lie in one piece
        begin = int(starts[rows.start, 0])
        chosen = values[begin : begin + len(places)]
    else:
        before = codes[rows, stretch * STRETCH // 8 : first // 8]
        begins = starts[rows, stretch] + row_counts(before)
        ends = begins + row_counts(inside)
        # A piece a row: from about 64 values on, copying pieces is faster than computing an index for each value.
        pieces = [values[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        chosen = np.concatenate(pieces)
    block.reshape(-1)[places] = chosen


def _scratch(rows: int, cols: int) -> Tensor:
    """Return int64 memory of this shape, the same at every call of a thread: fresh memory costs as much as its use."""
    size = rows * cols
    held: Tensor | None = getattr(_local, "places", None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = _local.places = torch.empty(max(size, _THREADED_CHUNK // 2), dtype=torch.int64, device="cpu")
    return held[:size].view(rows, cols)


@lru_cache(maxsize=64)
def _places_in_byte(kept: int, group: int) -> Array:
    """Return, for each byte of codes, the places of its values as one opaque item of int64s."""
    count = 8 // group * kept
    table = np.zeros((256, count), np.int64)
    for byte in range(256):
        found = [j for j in range(8) if byte >> (7 - j) & 1][:count]
        table[byte, : len(found)] = found
    return table.view(f"V{table.shape[1] * 8}").reshape(256)


@lru_cache(maxsize=16)
def _first_places(kept: int, group: int, width: int, threaded: bool = False) -> Array:
    """Return, for each value of a full chunk, where the byte that its place counts from begins."""
    begins = np.arange(width // group * kept) // (8 // group * kept) * 8
    return begins + np.arange(_rows_together(width, threaded))[:, None] * width


def _rows_together(width: int, threaded: bool) -> int:
    return max(1, (_THREADED_CHUNK if threaded else _CHUNK) // width)


def as_rows(part: slice, length: int) -> slice:
    """Return a slice with its start and stop written out and in range."""
    start, stop, step = part.indices(length)
    assert step == 1
    return slice(start, max(start, stop))


# ---- Decode a rectangle of a packed matrix with torch's own operations: any device, and the twin of the fast decoders.

CHUNK = 1 << 22  # weights decoded together: the temporaries take some 20 bytes a weight


def decode_anywhere(
    layout: Layout, values: Tensor, codes: Tensor, starts: Tensor | None, rows: slice, cols: slice, out: Tensor
) -> None:
    """Write W[rows, cols] into `out`; arguments as for `decode_cpu`."""
    step = max(1, CHUNK // max(1, layout.cols))
    for first in range(rows.start, rows.stop, step):
        part = slice(first, min(first + step, rows.stop))
        at = out[first - rows.start : part.stop - rows.start]
        _decode(layout, values, codes, starts, part, cols, at)


def _decode(
    layout: Layout, values: Tensor, codes: Tensor, starts: Tensor | None, rows: slice, cols: slice, out: Tensor
) -> None:
    stretch = 0 if layout.is_nm else cols.start // STRETCH
    first = stretch * STRETCH  # counting begins here: of a row, or of a stretch
    bytes_ = codes[rows, first // 8 : -(-cols.stop // 8)]
    shifts = torch.tensor(SHIFTS, dtype=torch.uint8, device=codes.device)
    mask = (bytes_.unsqueeze(2) >> shifts & 1).flatten(1)  # (rows, 8 · bytes)
    rank = mask.cumsum(1, dtype=torch.int64) - 1
    cut = slice(cols.start - first, cols.stop - first)
    mask, rank = mask[:, cut].to(torch.bool), rank[:, cut]
    if starts is None:
        begins = torch.arange(rows.start, rows.stop, device=codes.device) * layout.row_values
    else:
        begins = starts[rows, stretch].to(torch.int64)
    if values.numel() == 0:
        out.zero_()
        return
    places = (begins.unsqueeze(1) + rank).clamp_(0, values.numel() - 1)
    out.copy_(values.reshape(-1)[places].masked_fill_(~mask, 0))
