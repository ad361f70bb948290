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

from spp.masks.patterns import Pattern

STRETCH = 1024  # columns between two entries of `starts`


@dataclass(frozen=True)
class Layout:
    """The facts that are needed to read the tensors of a packed matrix.

    Args:
        rows: m.
        cols: n.
        kept: N of an N:M pattern; 0 for any pattern.
        group: M; 0 for any pattern.
    """

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
        """Return the bytes of all tensors for a number of kept weights of a dtype.

        Args:
            values: how many are kept, of which an N:M layout makes the number that it needs.
            itemsize: bytes of one.
        """
        values = self.rows * self.row_values if self.is_nm else values
        starts = 4 if values < 2**31 else 8
        return values * itemsize + self.rows * (self.row_bytes + self.stretches * starts)
