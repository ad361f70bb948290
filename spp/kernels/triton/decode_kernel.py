"""W itself from a packed matrix, any rectangle of it. The twin is spp.weights.PackedWeight.decode."""

import triton
import triton.language as tl
from torch import Tensor

from spp.kernels.triton.launch import launch
from spp.kernels.triton.tile import load_tile, operand
from spp.weights import PackedWeight

BLOCK_ROWS = 4
BLOCK_COLS = 512


@triton.jit(do_not_specialize=["first_row", "end_row", "row_bytes", "stretches"])
def _decode_kernel(
    values_ptr,
    codes_ptr,
    starts_ptr,
    out_ptr,
    first_row,
    end_row,
    first,
    end,
    stride_row,
    stride_col,
    row_bytes,
    stretches,
    FORM: tl.constexpr,
    PER_BYTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = first_row + tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_inside = rows < end_row
    first_col = (first // BLOCK_COLS + tl.program_id(1)) * BLOCK_COLS
    weight = load_tile(
        values_ptr,
        codes_ptr,
        starts_ptr,
        rows,
        rows_inside,
        first_col,
        end,
        stride_row,
        stride_col,
        row_bytes,
        stretches,
        FORM,
        PER_BYTE,
        BLOCK_COLS,
    )
    cols = first_col + tl.arange(0, BLOCK_COLS)
    inside = rows_inside[:, None] & ((cols >= first) & (cols < end))[None, :]
    places = (rows - first_row)[:, None] * (end - first) + (cols - first)[None, :]
    tl.store(out_ptr + places, weight, mask=inside)


def decode(packed: PackedWeight, rows: slice, cols: slice, out: Tensor) -> Tensor:
    """Write W[rows, cols] into `out`, contiguous and of the block's shape and W's dtype and device; return it.

    Args:
        packed: W (m, n), float32, bfloat16 or float16.
    """
    (first_row, end_row, _), (first, end, _) = rows.indices(packed.shape[0]), cols.indices(packed.shape[1])
    tiles = triton.cdiv(end, BLOCK_COLS) - first // BLOCK_COLS
    pointers, numbers, constants = operand(packed)
    launch(
        _decode_kernel,
        (triton.cdiv(end_row - first_row, BLOCK_ROWS), tiles if end > first else 0),
        *pointers,
        out,
        first_row,
        end_row,
        first,
        end,
        *numbers,
        **constants,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLS=BLOCK_COLS,
    )
    return out
