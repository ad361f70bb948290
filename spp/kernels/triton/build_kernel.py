"""W_eff, or W′ = W_eff − W, of one SPP layer, in one pass over W.

    t = s·β        u[i, j] = t[i] · α[g(i), j]        g(i) = ⌊((i+1)·r − 1) / m⌋
    W_eff = round(W · (1 + u)), rescued               W′ = W · u

The arithmetic is float32, each step rounded by itself, then rounded to W's dtype; a kept weight that came out as zero
is rescued, and only then the result is converted to the dtype of the product: bit for bit what
spp.rules.adapter.effective_block computes, which is the twin. W, dense or packed, is read once, W_eff written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spp.kernels.triton.tile import BLOCK_COLS, BLOCK_ROWS, launch, load_tile, operand
from spp.rules.adapter import smallest_kept
from spp.rules.spp import Factors
from spp.weights import PackedWeight


@triton.jit
def _magnitude_bits(value, BITS: tl.constexpr):
    """The bits of a float without its sign, as int32: 0 for a zero of either sign and for nothing else."""
    if BITS == 32:
        return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def _with_sign_of(value, MAGNITUDE: tl.constexpr, BITS: tl.constexpr):
    """The float with the sign of `value` and the bits MAGNITUDE, in the dtype of `value`."""
    if BITS == 32:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits ^ (bits & 0x7FFFFFFF)) | MAGNITUDE).to(value.dtype, bitcast=True)
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        return ((bits & 0x8000) | MAGNITUDE).to(tl.int16).to(value.dtype, bitcast=True)


@triton.jit
def _updated(weight, update, DELTA: tl.constexpr, SMALLEST: tl.constexpr, BITS: tl.constexpr):
    """W · (1 + u), rounded to W's dtype and rescued; with DELTA, W · u in float32."""
    if DELTA:
        return weight.to(tl.float32) * update
    else:
        result = (weight.to(tl.float32) * (1.0 + update)).to(weight.dtype)
        lost = (_magnitude_bits(weight, BITS) != 0) & (_magnitude_bits(result, BITS) == 0)
        return tl.where(lost, _with_sign_of(weight, SMALLEST, BITS), result)


@triton.jit(do_not_specialize=["m", "r", "row_bytes", "stretches"])
def _build_kernel(
    weight_ptr, codes_ptr, starts_ptr, alpha_ptr, scaled_beta_ptr, out_ptr, m, n, r, stride_row, stride_col,
    row_bytes, stretches, FORM: tl.constexpr, PER_BYTE: tl.constexpr, DELTA: tl.constexpr, SMALLEST: tl.constexpr,
    WEIGHT_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_inside = rows < m
    first_col = tl.program_id(1) * BLOCK_COLS
    weight = load_tile(
        weight_ptr, codes_ptr, starts_ptr, rows, rows_inside, first_col, n, stride_row, stride_col, row_bytes,
        stretches, FORM, PER_BYTE, BLOCK_COLS,
    )  # fmt: skip
    cols = first_col + tl.arange(0, BLOCK_COLS)
    inside = rows_inside[:, None] & (cols < n)[None, :]
    groups = ((rows + 1) * r - 1) // m
    alpha = tl.load(alpha_ptr + groups[:, None] * n + cols[None, :], mask=inside, other=0.0)
    scaled = tl.load(scaled_beta_ptr + rows, mask=rows_inside, other=0.0)
    result = _updated(weight, scaled[:, None] * alpha, DELTA, SMALLEST, WEIGHT_BITS)
    tl.store(out_ptr + rows[:, None] * n + cols[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


def build(weight: Tensor | PackedWeight, factors: Factors, out: Tensor) -> None:
    """Write the whole W_eff (m, n), rounded to the dtype of `weight` and rescued, into `out`.

    Args:
        weight: W (m, n), float32, bfloat16 or float16; a tensor of any strides, or packed.
        factors: from the SPP rule's `prepare`, in float32.
        out: (m, n) contiguous, in the dtype of the product.
    """
    _run(weight, factors, out, delta=False)


def delta(weight: Tensor | PackedWeight, factors: Factors, out: Tensor) -> None:
    """Write the whole W′ = W_eff − W (m, n), rounded once, into `out`; arguments as in `build`."""
    _run(weight, factors, out, delta=True)


def smallest_bits(dtype: torch.dtype) -> int:
    """Return the bits of the magnitude that a rescued weight gets."""
    as_int = torch.int32 if dtype.itemsize == 4 else torch.int16
    return int(torch.tensor(smallest_kept(dtype), dtype=dtype).view(as_int))


def _run(weight: Tensor | PackedWeight, factors: Factors, out: Tensor, *, delta: bool) -> None:
    m, n = weight.shape
    pointers, numbers, constants = operand(weight)
    launch(
        _build_kernel, (triton.cdiv(m, BLOCK_ROWS), triton.cdiv(n, BLOCK_COLS)), *pointers,
        factors.alpha.contiguous(), factors.scaled_beta.contiguous(), out, m, n, factors.alpha.shape[0], *numbers,
        **constants, DELTA=delta, SMALLEST=smallest_bits(weight.dtype), WEIGHT_BITS=8 * weight.dtype.itemsize,
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS,
    )  # fmt: skip
