"""Weights as integer codes, with a scale and an integer zero point a block.

    W[i, j] = (code[i, j] − z) · s        z, s of the block of R × C weights that (i, j) is in: a row, part of one, all

The code z stands for 0, exactly, whatever the scale is, as long as z is one of the codes and the scale is finite:
`QuantizedWeight.check` looks at both. The product is taken in float32, where that of a scale of 16 bits is exact, and
rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spp.packed.quantized import QuantizedLayout


def decode_affine(
    layout: QuantizedLayout, codes: Tensor, scales: Tensor, zeros: Tensor | None, rows: slice, cols: slice, out: Tensor
) -> Tensor:
    """Write W[rows, cols] into `out`.

    Args:
        codes: int8 (m, n); scales: float32, zeros: int8 or None, one a block, row after row of blocks.
        rows, cols: with start and stop written out.
    """
    down = torch.arange(rows.start, rows.stop, device=codes.device) // layout.block_rows
    across = torch.arange(cols.start, cols.stop, device=codes.device) // layout.block
    if layout.block >= layout.cols:
        across = across[:1]

    def of_blocks(values: Tensor) -> Tensor:
        return values.view(layout.blocks)[down][:, across]  # (rows, cols), or (rows, 1) to be broadcast

    block = codes[rows, cols].to(torch.promote_types(out.dtype, torch.float32))
    if zeros is not None:
        block = block - of_blocks(zeros)
    return out.copy_(block.mul_(of_blocks(scales)))


def quantize_affine(layout: QuantizedLayout, weight: Tensor, *, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (m, n), scales and zero points, one a block, for a dense weight (m, n).

    A block's scale is the least with which its codes reach from the smallest to the largest weight, 0 among them; with
    `asymmetric` the zero point is free, else it is 0.
    """
    (m, n), (tall, wide) = weight.shape, (layout.block_rows, layout.block)
    blocks = weight.detach().float().view(m // tall, tall, n // wide, wide).transpose(1, 2)  # (M, N, R, C)
    low, high = blocks.amin((2, 3)).clamp_max(0), blocks.amax((2, 3)).clamp_min(0)  # (M, N)
    if asymmetric:
        scales = (high - low) / (layout.high - layout.low)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        zeros = (layout.low - low / scales).round_().clamp_(layout.low, layout.high)
    else:
        scales = torch.maximum(high / max(layout.high, 1), low / layout.low)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        zeros = torch.zeros_like(scales)
    codes = (blocks / scales[..., None, None]).round_().add_(zeros[..., None, None]).clamp_(layout.low, layout.high)
    codes = codes.transpose(1, 2).reshape(m, n)
    return codes.to(torch.int8), scales.view(-1), zeros.view(-1).to(torch.int8)
