"""How a kernel is started, and how it reads W: a tile in registers, of a tensor or of a packed matrix.

    tensor          one load, any strides
    N:M             values of whole bytes before the column, and the bits set before it in its own byte
    any pattern     starts[i, stretch], the bits set between there and the tile, and a running sum inside the tile

How a packed matrix is stored, spp.weights.packed.layout says. A tile of columns begins at a multiple of its own width,
which divides 1024: it is within one stretch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spp.weights import PackedWeight
from spp.weights.packed.layout import STRETCH

WARPS = 4
MAX_GRID_COLS = 65535  # the limit of CUDA for a grid's second dimension


def launch(kernel: Any, grid: tuple[int, int], first: Tensor, *others: Any, **constants: Any) -> None:
    """Run `kernel(first, *others, **constants)` over `grid`, on the device of `first`, each operation rounded."""
    if 0 in grid:
        return
    assert grid[1] <= MAX_GRID_COLS, f"a grid of {grid[1]} columns"
    run: Callable[..., Any] = kernel[grid]
    device = first.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        run(first, *others, **constants, num_warps=WARPS, enable_fp_fusion=False)


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this folder was imported: kernels then run on CPU tensors, slowly."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(_nothing, InterpretedFunction)


@triton.jit
def _nothing():
    pass


# ---- A tile of W.

TENSOR, MASK, GROUPS = 0, 1, 2  # the form of W: how a kernel reads it


@triton.jit
def _ones(byte):
    """How many bits of a number below 256 are set."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


@triton.jit
def _before_tile(codes_ptr, rows, rows_inside, first_col, row_bytes):
    """How many weights are kept between the beginning of the tile's stretch and the tile, of each row."""
    byte = first_col // 1024 * 128 + tl.arange(0, 128)
    inside = rows_inside[:, None] & (byte < first_col // 8)[None, :]
    codes = tl.load(codes_ptr + rows[:, None] * row_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)
    return tl.sum(_ones(codes), axis=1)


@triton.jit
def _by_mask(
    values_ptr, codes_ptr, starts_ptr, rows, rows_inside, cols, first_col, inside, row_values, row_bytes, stretches,
    FORM: tl.constexpr, PER_BYTE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    code = tl.load(codes_ptr + rows[:, None] * row_bytes + (cols // 8)[None, :], mask=inside, other=0).to(tl.int32)
    bit = cols % 8
    kept = (code >> (7 - bit)[None, :]) & 1
    if FORM == 2:
        in_bytes = cols // 8 * PER_BYTE
        place = rows[:, None] * row_values + in_bytes[None, :] + _ones(code >> (8 - bit)[None, :])
    else:
        start = tl.load(starts_ptr + rows * stretches + first_col // 1024, mask=rows_inside, other=0).to(tl.int64)
        if WIDTH < 1024:
            start += _before_tile(codes_ptr, rows, rows_inside, first_col, row_bytes)
        place = start[:, None] + tl.cumsum(kept, axis=1) - kept
    return tl.load(values_ptr + place, mask=inside & (kept != 0), other=0.0)


@triton.jit
def load_tile(
    weight_ptr, codes_ptr, starts_ptr, rows, rows_inside, first_col, end_col, stride_row, stride_col, row_bytes,
    stretches, FORM: tl.constexpr, PER_BYTE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """W[rows, first_col : first_col + WIDTH], zero outside of the rows and from end_col on.

    rows: int64. weight_ptr: W, or its kept values. stride_row, stride_col: of W; N:M: values of a row, unused.
    """
    cols = first_col + tl.arange(0, WIDTH)
    inside = rows_inside[:, None] & (cols < end_col)[None, :]
    if FORM == 0:
        places = rows[:, None] * stride_row + (cols.to(tl.int64) * stride_col)[None, :]
        weight = tl.load(weight_ptr + places, mask=inside, other=0.0)
    else:
        weight = _by_mask(
            weight_ptr, codes_ptr, starts_ptr, rows, rows_inside, cols, first_col, inside, stride_row, row_bytes,
            stretches, FORM, PER_BYTE, WIDTH,
        )  # fmt: skip
    return weight


def operand(weight: Tensor | PackedWeight) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """Return how W is passed to a kernel: (weight, codes, starts), (stride_row, stride_col, row_bytes, stretches), and
    the constants of `load_tile` but for WIDTH.
    """
    if isinstance(weight, Tensor):
        weight = weight.detach()
        return (weight, weight, weight), (*weight.stride(), 0, 0), {"FORM": TENSOR, "PER_BYTE": 0}
    layout, values, codes = weight.layout, weight.values.detach().contiguous(), weight.codes.contiguous()
    starts = codes if weight.starts is None else weight.starts.contiguous()
    per_byte = 8 // layout.group * layout.kept if layout.is_nm else 0
    numbers = (layout.row_values if layout.is_nm else 0, 0, layout.row_bytes, layout.stretches)
    return (values, codes, starts), numbers, {"FORM": GROUPS if layout.is_nm else MASK, "PER_BYTE": per_byte}


assert STRETCH == 1024  # written out in the kernels, which see no globals


# ---- W itself from a packed matrix, any rectangle of it. The twin is spp.weights.PackedWeight.decode.

BLOCK_ROWS = 4
BLOCK_COLS = 512  # with four warps, 16 weights a thread: two accesses of 16 bytes in a 16-bit dtype


@triton.jit(do_not_specialize=["first_row", "end_row", "row_bytes", "stretches"])
def _decode_kernel(
    values_ptr, codes_ptr, starts_ptr, out_ptr, first_row, end_row, first, end, stride_row, stride_col, row_bytes,
    stretches, FORM: tl.constexpr, PER_BYTE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    rows = first_row + tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_inside = rows < end_row
    first_col = (first // BLOCK_COLS + tl.program_id(1)) * BLOCK_COLS
    weight = load_tile(
        values_ptr, codes_ptr, starts_ptr, rows, rows_inside, first_col, end, stride_row, stride_col, row_bytes,
        stretches, FORM, PER_BYTE, BLOCK_COLS,
    )  # fmt: skip
    cols = first_col + tl.arange(0, BLOCK_COLS)
    inside = rows_inside[:, None] & ((cols >= first) & (cols < end))[None, :]
    places = (rows - first_row)[:, None] * (end - first) + (cols - first)[None, :]
    tl.store(out_ptr + places, weight, mask=inside)


def decode(packed: PackedWeight, rows: slice, cols: slice, out: Tensor) -> Tensor:
    """Write W[rows, cols] into `out`, contiguous and of the block's shape and W's dtype and device; return it."""
    (first_row, end_row, _), (first, end, _) = rows.indices(packed.shape[0]), cols.indices(packed.shape[1])
    tiles = triton.cdiv(end, BLOCK_COLS) - first // BLOCK_COLS
    pointers, numbers, constants = operand(packed)
    launch(
        _decode_kernel, (triton.cdiv(end_row - first_row, BLOCK_ROWS), tiles if end > first else 0), *pointers, out,
        first_row, end_row, first, end, *numbers, **constants, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS,
    )  # fmt: skip
    return out
