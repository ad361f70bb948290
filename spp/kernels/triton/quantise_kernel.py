"""A matrix scaled, rounded to float8 e4m3 and transposed, in one pass. Its twin is spp.kernels.work.TorchWork.quantise.

The rounding is integer arithmetic on the bits of a float32, to nearest even, so that it is the same on every device.
e4m3 has a bias of 7 and 3 bits of mantissa; below 2⁻⁶ its steps are 2⁻⁹, the last bit of a float32 at 2¹⁴; from 480 on
there is only NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spp.kernels.triton.launch import launch

BLOCK = 64  # a tile of 64 × 64: whole 64-byte lines are written


@triton.jit
def _e4m3(value):
    """The bits of a float32 rounded to e4m3, as uint8."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + ((size >> 20) & 1) + 0x7FFFF - 0x3C000000) >> 20  # the exponent's bias from 127 to 7
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size >= 0x43F00000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["tokens", "padded_cols"])
def _quantise_kernel(
    x_ptr, inverse_ptr, out_ptr, tokens, cols, padded_tokens, padded_cols, stride_row, stride_col, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (t < tokens)[:, None] & (j < cols)[None, :]
    x = tl.load(x_ptr + t[:, None] * stride_row + (j.to(tl.int64) * stride_col)[None, :], mask=inside, other=0.0)
    scaled = _e4m3(x.to(tl.float32) * tl.load(inverse_ptr))
    places = j.to(tl.int64)[:, None] * padded_tokens + t[None, :]
    tl.store(out_ptr + places, tl.trans(scaled), mask=(j < padded_cols)[:, None] & (t < padded_tokens)[None, :])


def quantise(x: Tensor, inverse: Tensor, out: Tensor) -> None:
    """Write (x · inverse)ᵀ, rounded to float8 e4m3, into `out`, and zeros where it is larger.

    Args:
        x: (T, k), any strides.
        inverse: a float32 scalar on the device.
        out: (≥ k, ≥ T) contiguous, float8_e4m3fn.
    """
    launch(
        _quantise_kernel,
        (triton.cdiv(out.shape[1], BLOCK), triton.cdiv(out.shape[0], BLOCK)),
        x,
        inverse,
        out.view(torch.uint8),
        *x.shape,
        out.shape[1],
        out.shape[0],
        *x.stride(),
        BLOCK=BLOCK,
    )
