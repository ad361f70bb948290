"""Decode a rectangle of a packed matrix with torch's own operations: any device, and the twin of the fast decoders."""

from __future__ import annotations

import torch
from torch import Tensor

from spp.packed.layout import STRETCH, Layout

CHUNK = 1 << 22  # weights decoded together: the temporaries take some 20 bytes a weight
_SHIFTS = (7, 6, 5, 4, 3, 2, 1, 0)


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
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=codes.device)
    mask = (bytes_.unsqueeze(2) >> shifts & 1).flatten(1)  # (rows, 8 · bytes)
    rank = mask.cumsum(1, dtype=torch.int64) - 1
    cut = slice(cols.start - first, cols.stop - first)
    mask, rank = mask[:, cut].to(torch.bool), rank[:, cut]
    if starts is None:
        begins = torch.arange(rows.start, rows.stop, device=codes.device) * layout.row_values
    else:
        begins = starts[rows, stretch].to(torch.int64)
    _take(values.reshape(-1), mask, begins.unsqueeze(1) + rank, out)


def _take(values: Tensor, mask: Tensor, places: Tensor, out: Tensor) -> None:
    if values.numel() == 0:
        out.zero_()
        return
    found = values[places.clamp_(0, values.numel() - 1)]
    out.copy_(found.masked_fill_(~mask, 0))
