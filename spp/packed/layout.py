"""How a pruned matrix W (m, n) lies in memory: kept values, and where they belong. Layout version 1.

    values    the kept weights in W's dtype, row after row, in a row by column
    codes     uint8 (m, B): where they belong; what comes first is in the highest bits of a byte; a row starts a byte
    starts    int32 (m, S), int64 from 2³¹ values on: where a stretch of a row begins in `values`; any pattern only

Any pattern ("mask"). Bit 7 − j mod 8 of codes[i, ⌊j / 8⌋] says whether W[i, j] is kept; B = ⌈n / 8⌉, the last byte of
a row is padded with 0. `values` is (k,), k kept in all. starts[i, t] is the place in `values` of the first kept weight
of row i at a column ≥ 1024·t; S = ⌈n / 1024⌉. So any rectangle can be decoded alone, after counting at most 1023 bits
a row.

N:M, where M divides n. Each group of M columns has exactly N values, `values` is (m, N·n / M), and nothing has to be
counted: the values of columns [M·a, M·b) of row i are values[i, N·a : N·b]. A group that keeps fewer has zeros among
its values, at positions that are pruned. Two forms of codes, whichever is smaller:

    mask      as above, N bits set a group; groups lie within bytes (M ≤ 8)               1 bit a weight
    indices   w bits a value, w the least of 1, 2, 4, 8 with 2ʷ ≥ M: the k-th value of a   N·w / M bits a weight
              row belongs to column ⌊k / N⌋·M + index(k), index(k) being the bits
              8 − w − (k·w mod 8) and up of codes[i, ⌊k·w / 8⌋]; B = ⌈N·n / M · w / 8⌉

    1:2  1:4  1:8  1:16  2:16  4:16  1:32  2:32  4:32 are stored with indices, 2:4  4:8  2:8 with a mask, others as any
    pattern.

Bytes: elements · (kept share · size of the dtype + codes / 8), and 32 bits a 1024 columns for `starts`. A dense matrix
takes more than it did. A zero is a zero: −0.0 is not kept, and comes back as 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from spp.patterns import Pattern

VERSION = 1
STRETCH = 1024  # columns between two entries of `starts`


@dataclass(frozen=True)
class Layout:
    """What has to be known to read the tensors of a packed matrix.

    Args:
        rows: m.
        cols: n.
        kept: N of an N:M pattern; 0 for any pattern.
        group: M; 0 for any pattern.
        index_bits: w, where codes hold indices; 0 where they hold a mask.
    """

    rows: int
    cols: int
    kept: int = 0
    group: int = 0
    index_bits: int = 0

    @classmethod
    def of(cls, rows: int, cols: int, pattern: str) -> Layout:
        """Return the layout for a pattern, as `spp.patterns.detect_pattern` names it."""
        if ":" not in pattern:
            return cls(rows, cols)
        found = Pattern.parse(pattern)
        kept, group = found.kept or 0, found.group or 0
        bits = next(w for w in (1, 2, 4, 8) if group <= 1 << w)
        if kept * bits < group or (kept * bits == group and group > 8):
            return cls(rows, cols, kept, group, bits)
        return cls(rows, cols, kept, group) if group <= 8 else cls(rows, cols)

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
        return -(-self.row_values * self.index_bits // 8) if self.index_bits else -(-self.cols // 8)

    @property
    def stretches(self) -> int:
        """S, the entries of `starts` of a row; 0 for N:M."""
        return 0 if self.is_nm else -(-self.cols // STRETCH)

    @property
    def unit(self) -> tuple[int, int]:
        """The smallest (columns, bytes of codes) that are whole groups and whole bytes."""
        if not self.index_bits:
            return 8, 1
        values = max(self.kept, 8 // self.index_bits)
        return values // self.kept * self.group, values * self.index_bits // 8

    def nbytes(self, values: int, itemsize: int) -> int:
        """Return the bytes of all tensors for a number of kept weights of a dtype.

        Args:
            values: how many are kept, of which an N:M layout makes the number that it needs.
            itemsize: bytes of one.
        """
        values = self.rows * self.row_values if self.is_nm else values
        starts = 4 if values < 2**31 else 8
        return values * itemsize + self.rows * (self.row_bytes + self.stretches * starts)
