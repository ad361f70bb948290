"""How a pruned matrix W (m, n) is stored in memory: kept values, and where they belong.

    values    the kept weights in W's dtype, row after row, in a row by column
    codes     uint8 (m, B): where they belong; what comes first is in the highest bits of a byte; a row starts a byte
    starts    int32 (m, S), int64 from 2³¹ values on: where a stretch of a row begins in `values`; any pattern only

Bit 7 − j mod 8 of codes[i, ⌊j / 8⌋] says whether W[i, j] is kept; B = ⌈n / 8⌉, the last byte of a row is padded
with 0.

Any pattern. `values` is (k,), k kept in all. starts[i, t] is the place in `values` of the first kept weight of row i at
a column ≥ 1024·t; S = ⌈n / 1024⌉. So any rectangle can be decoded alone, after counting at most 1023 bits a row.

N:M, where M is 2, 4 or 8 and divides n: groups lie within bytes. Each group of M columns has exactly N values, `values`
is (m, N·n / M), and nothing has to be counted: the values of columns [M·a, M·b) of row i are values[i, N·a : N·b]. A
group that keeps fewer has zeros among its values, at positions that are pruned. Longer groups are stored as any
pattern.

Bytes: elements · (kept share · size of the dtype + 1 / 8), and 32 bits a 1024 columns for `starts`. A dense matrix
takes more than it did. A zero is a zero: −0.0 is not kept, and comes back as 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.masks.patterns import Pattern, as_array, count_kept, detect_packed, nonzero_mask

STRETCH = 1024  # columns between two entries of `starts`


@dataclass(frozen=True)
class Layout:
    """How to read the tensors of a packed matrix (m, n); `kept` and `group` are N and M, 0 for any pattern."""

    rows: int
    cols: int
    kept: int = 0
    group: int = 0

    @classmethod
    def of(cls, rows: int, cols: int, pattern: str) -> Layout:
        """Return the layout for a pattern, as `spp.masks.patterns.detect_pattern` names it."""
        if ":" not in pattern:
            return cls(rows, cols)
        found = Pattern.parse(pattern)
        kept, group = found.kept or 0, found.group or 0
        return cls(rows, cols, kept, group) if 8 % group == 0 else cls(rows, cols)

    @classmethod
    def smallest(cls, rows: int, cols: int, pattern: str, kept: int, itemsize: int) -> Layout:
        """Return the smallest layout for `kept` weights in a pattern; `itemsize`: bytes of one."""
        fixed, free = cls.of(rows, cols, pattern), cls(rows, cols)
        return fixed if fixed.nbytes(kept, itemsize) <= free.nbytes(kept, itemsize) else free

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.is_nm else "any pattern"

    @property
    def is_nm(self) -> bool:
        """Whether every group has the same number of values, so that places are known without counting."""
        return self.group > 0

    @property
    def row_values(self) -> int:
        """Values of a row, N:M only."""
        return self.cols // self.group * self.kept

    @property
    def row_bytes(self) -> int:
        """B, the bytes of codes of a row."""
        return -(-self.cols // 8)

    @property
    def stretches(self) -> int:
        """S, the entries of `starts` of a row; 0 for N:M."""
        return 0 if self.is_nm else -(-self.cols // STRETCH)

    def nbytes(self, values: int, itemsize: int) -> int:
        """Return the bytes of all tensors for kept values of a dtype; an N:M layout has the number that it needs."""
        values = self.rows * self.row_values if self.is_nm else values
        starts = 4 if values < 2**31 else 8
        return values * itemsize + self.rows * (self.row_bytes + self.stretches * starts)


# ---- From a dense matrix to values, codes and starts, a few rows at a time: nothing dense is allocated beside it.

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a weight: values are moved as bits
_CHUNK = 1 << 17  # weights looked at together
_PER_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def layout_of_bits(packed: npt.NDArray[np.uint8], rows: int, cols: int, itemsize: int) -> Layout:
    """Return the smallest layout for the mask of W (m, n), as `pack_bits` returns it; `itemsize`: bytes of a weight."""
    return Layout.smallest(rows, cols, detect_packed(packed, rows * cols, cols), count_kept(packed), itemsize)


def pack_tensor(weight: Tensor, layout: Layout, kept: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (values, codes, starts) of W (m, n), any strides, on its device; `kept` of its entries are not zero."""
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
