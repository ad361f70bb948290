"""From a dense matrix to kept values and codes, a few rows at a time: nothing dense is allocated beside it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.masks.patterns import as_array, count_kept, detect_packed, nonzero_mask, pack_bits
from spp.weights.packed.layout import STRETCH, Layout

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a weight: values are moved as bits
_CHUNK = 1 << 17  # weights looked at together
_PER_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def choose_layout(weight: Tensor) -> tuple[Layout, int]:
    """Return the smallest layout that holds W (m, n), and how many of its weights are kept."""
    rows, cols = weight.shape
    packed = pack_bits(weight)
    return layout_of_bits(packed, rows, cols, weight.element_size()), count_kept(packed)


def layout_of_bits(packed: npt.NDArray[np.uint8], rows: int, cols: int, itemsize: int) -> Layout:
    """Return the smallest layout for the mask of W (m, n), as `pack_bits` returns it; `itemsize`: bytes of a weight."""
    kept = count_kept(packed)
    fixed = Layout.of(rows, cols, detect_packed(packed, rows * cols, cols))
    free = Layout(rows, cols)
    return fixed if fixed.nbytes(kept, itemsize) <= free.nbytes(kept, itemsize) else free


def pack_tensor(weight: Tensor, layout: Layout, kept: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (values, codes, starts) of W on its device.

    Args:
        weight: W (m, n), any strides.
        layout, kept: as from `choose_layout`.
    """
    rows, cols = weight.shape
    shape = (rows, layout.row_values) if layout.is_nm else (kept,)
    values = torch.empty(shape, dtype=weight.dtype, device="cpu")
    bits = INTEGERS[weight.element_size()]
    codes = torch.empty((rows, layout.row_bytes), dtype=torch.uint8, device="cpu")
    wide = torch.int32 if kept < 2**31 else torch.int64
    starts = torch.empty((rows, layout.stretches), dtype=wide, device="cpu")
    flat, bytes_, begins = as_array(values.view(bits).reshape(-1)), as_array(codes), as_array(starts)
    place = 0
    step = max(1, _CHUNK // max(1, cols))
    for first in range(0, rows, step):
        part = weight.detach()[first : first + step].cpu().contiguous()
        mask = as_array(nonzero_mask(part))
        if layout.is_nm:
            _fill_groups(mask, layout)
        chosen = np.flatnonzero(mask)
        taken = as_array(part.view(bits).reshape(-1))[chosen]
        taken[taken == torch.iinfo(bits).min] = 0  # −0.0, where a group keeps fewer than N
        flat[place : place + len(chosen)] = taken
        bytes_[first : first + step] = np.packbits(mask, axis=1)
        if layout.stretches:
            counts = stretch_counts(bytes_[first : first + step]).reshape(-1)
            found = place + np.cumsum(counts, dtype=np.int64) - counts
            begins[first : first + step] = found.reshape(len(part), -1)
        place += len(chosen)
    on = weight.device
    return values.to(on), codes.to(on), None if layout.is_nm else starts.to(on)


def stretch_counts(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the number of bits set in each stretch of each row (rows, S) of a mask's codes (rows, B)."""
    rows, width = codes.shape
    edges = np.arange(0, width, STRETCH // 8)
    if not rows or not width:
        return np.zeros((rows, len(edges)), np.int64)
    result: npt.NDArray[np.int64] = np.add.reduceat(_PER_BYTE.take(codes), edges, axis=1, dtype=np.int64)
    return result


def row_counts(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the number of bits set in each row of a mask's codes (rows, B)."""
    result: npt.NDArray[np.int64] = _PER_BYTE.take(codes).sum(1, dtype=np.int64)
    return result


def _fill_groups(mask: npt.NDArray[np.bool_], layout: Layout) -> None:
    """Mark pruned positions, in place, until each group has N marks."""
    groups = mask.reshape(-1, layout.group)
    short = np.flatnonzero(groups.sum(1, dtype=np.int16) < layout.kept)
    if len(short):
        order = np.argsort(~groups[short], axis=1, kind="stable")[:, : layout.kept]
        groups[short[:, None], order] = True
