"""A frozen weight as it was quantized, read a block at a time; its zeros are exact, or it is refused.

bitsandbytes

    4 bits   W[i] = table[code[i]] · scale[i // b]        "nf4", "fp4": two codes a byte, flat blocks of b weights
    8 bits   W[i, j] = code[i, j] · scale[i] / 127        "int8": a scale a row

torchao

    1-8 bits W[i, j] = (code[i, j] − z) · scale           "affine": a code a byte; z, scale a block (below)

A nested scale of 4 bits is itself table₂[code₂] · scale₂ + offset. Zero is an entry of either table, code 0 of the 8
bits and code z of torchao's, so a pruned weight stays zero whatever the scale is, as long as the scale is finite, and z
a code: `check` looks at it. Small kept weights may have become zero by quantization; the mask that is kept from there
on is that of what is stored.

Scales are held as the bits of float32 in int32 tensors: nn.Module.to(dtype) leaves those alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError
from spp.files.hashes import tensor_bytes
from spp.weights.base import WHOLE, Weight

_COUNTED = 2**22  # entries that are decoded together to be counted
_NESTED_HEAD = 257  # entries before the nested scales: 256 of the table, the offset
# At most the least magnitude of a code but zero.
_SMALLEST_CODE = {"nf4": 0.0795, "fp4": 0.0052, "int8": 1 / 127, "affine": 1}


@dataclass(frozen=True)
class QuantizedLayout:
    """How to read the tensors of a quantized weight.

    Attributes:
        form: "nf4", "fp4", "int8" or "affine".
        rows, cols: m, n.
        dtype: of W where it is multiplied.
        block: weights that share a scale, 4 bits; columns that do, affine. nested: scales that share one, 0 where
            scales are not quantized.
        block_rows: rows that share a scale; low, high: the range of the codes; affine.
    """

    form: str
    rows: int
    cols: int
    dtype: torch.dtype
    block: int = 0
    nested: int = 0
    block_rows: int = 0
    low: int = 0
    high: int = 0

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks there are below and beside each other; affine."""
        return self.rows // self.block_rows, self.cols // self.block

    def __str__(self) -> str:
        return self.form


class QuantizedWeight(Weight):
    """W (m, n) as codes and scales.

    Args:
        layout: how to read the rest.
        codes: uint8 (m·n / 2,) or int8 (m, n).
        scales: int32, the bits of float32; nested, uint8.
        nested: int32 (256 + 1 + …,), the bits of table₂, offset and scale₂; affine, int8 zero points, where not all
            are 0.
    """

    def __init__(self, layout: QuantizedLayout, codes: Tensor, scales: Tensor, nested: Tensor | None = None) -> None:
        self.layout, self.codes, self.scale_bits, self.nested = layout, codes, scales, nested
        self.shape, self.dtype, self.device = (layout.rows, layout.cols), layout.dtype, codes.device

    def bounds(self) -> Tensor:
        """Return a bound for each scale, in W's dtype."""
        if self.device.type == "meta":
            return torch.empty(0, dtype=self.dtype, device="meta")
        scales = self.scales()
        least = (scales.abs() * _SMALLEST_CODE[self.layout.form]).to(self.dtype)
        lowest = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        return torch.where(scales == 0, torch.zeros_like(least), least.clamp_min(lowest))

    def tensors(self) -> tuple[Tensor, ...]:
        rest = () if self.nested is None else (self.nested,)
        return (self.codes, self.scale_bits, *rest)

    def scales(self) -> Tensor:
        """Return the scales in float32, flat: one a block, or one a row."""
        if self.nested is None or self.layout.form == "affine":
            return self.scale_bits.view(torch.float32)
        table = self.nested.view(torch.float32)
        group = torch.arange(self.scale_bits.numel(), device=self.device) // self.layout.nested
        return table[self.scale_bits.long()] * table[_NESTED_HEAD:][group] + table[_NESTED_HEAD - 1]

    def decode(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        (m, n), scales = self.shape, self.scales()
        rows, cols = slice(*rows.indices(m)[:2]), slice(*cols.indices(n)[:2])
        if out.numel() == 0:
            return out
        if self.layout.form == "affine":
            return decode_affine(self.layout, self.codes, scales, self.nested, rows, cols, out)
        if self.layout.form == "int8":
            block = self.codes[rows, cols].float() * scales[rows, None]
            return out.copy_(block.mul_(7.874015718698502e-3))  # bitsandbytes' own 1 / 127
        return out.copy_(self._decode_4bit(scales, rows, cols))

    def _decode_4bit(self, scales: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return W[rows, cols]: of the columns that whole blocks cover, or of whole rows where a block spans two."""
        (m, n), size, height = self.shape, self.layout.block, rows.stop - rows.start
        if n % size == 0:
            first, last = cols.start // size, -(-cols.stop // size)
            codes = self.codes.view(m, n // size, size // 2)[rows, first:last]
            chosen = scales.view(m, n // size)[rows, first:last]
            decoded = self._decode_flat(codes.reshape(-1, 1), chosen.reshape(-1), (height, (last - first) * size))
            return decoded[:, cols.start - first * size : cols.stop - first * size]
        first, last = rows.start * n // size, -(-rows.stop * n // size)
        end = min(last * size, m * n)
        codes = self.codes[first * size // 2 : -(-end // 2)]
        flat = self._decode_flat(codes.reshape(-1, 1), scales[first:last], (end - first * size,))
        start = rows.start * n - first * size
        return flat[start : start + height * n].view(-1, n)[:, cols]

    def _decode_flat(self, codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        import bitsandbytes  # noqa: F401  registers the operator

        decode: Any = torch.ops.bitsandbytes.dequantize_4bit.default
        args = (codes.contiguous(), scales.contiguous(), self.layout.block, self.layout.form, shape, self.dtype)
        return decode(*args).view(shape)

    def maker(self) -> Callable[..., Weight]:
        return partial(QuantizedWeight, self.layout)

    def entries(self) -> Tensor:
        return self.matrix()

    def count_kept(self) -> int:
        """Return how many entries are not zero; rows are decoded together, never all of W."""
        m, n = self.shape
        step = max(1, _COUNTED // max(n, 1))
        return sum(int(torch.count_nonzero(self.block(slice(i, i + step), WHOLE))) for i in range(0, m, step))

    @property
    def form(self) -> str:
        """How W is stored, in words; what differs between two of a form is values."""
        layout = self.layout
        if layout.form == "affine":
            return f"codes from {layout.low} to {layout.high} in blocks of {layout.block_rows} x {layout.block}"
        return f"{layout.form} in blocks of {layout.block}" if layout.block else f"{layout.form} by rows"

    def _sha256(self, form: str) -> str | None:
        if self.is_meta:
            return None
        digest = hashlib.sha256(f"spp-values-1{form}{self.shape}".encode())
        points = () if self.nested is None or self.layout.form != "affine" else (self.nested,)
        for tensor in (self.codes, self.scales().bfloat16(), *points):
            for piece in tensor_bytes(tensor):
                digest.update(piece)
        return digest.hexdigest()

    def check(self, where: str = "the quantized weight") -> None:
        """Raise a ConfigError unless the tensors belong together, a NonFiniteError where a scale is not finite."""
        layout, count = self.layout, self.layout.rows * self.layout.cols
        if layout.form == "affine":
            blocks = layout.blocks[0] * layout.blocks[1]
        else:
            blocks = -(-count // layout.block) if layout.block else layout.rows
        expected = count if layout.form in ("int8", "affine") else -(-count // 2)
        for name, tensor, numel in (("codes", self.codes, expected), ("scales", self.scale_bits, blocks)):
            if tensor.numel() != numel:
                raise ConfigError(f"{where}: {tensor.numel()} {name}, expected {numel} for {self.shape}")
        if self.device.type != "meta" and not bool(torch.isfinite(self.scales()).all()):
            bad = int((~torch.isfinite(self.scales())).sum())
            raise NonFiniteError(f"{where} holds {bad} scales that are NaN or infinite of {blocks}; re-load the model")
        if layout.form == "affine" and self.nested is not None and self.device.type != "meta":
            low, high = int(self.nested.min()), int(self.nested.max())
            if self.nested.numel() != blocks or low < layout.low or high > layout.high:
                found = f"{self.nested.numel()} zero points from {low} to {high}"
                raise ConfigError(f"{where}: {found}, expected {blocks} from {layout.low} to {layout.high}")


# ---- Weights as integer codes, with a scale and an integer zero point a block.
#
#     W[i, j] = (code[i, j] − z) · s        z, s of the block of R × C weights that (i, j) is in: a row, part of one,
#     all
#
# The code z stands for 0, exactly, whatever the scale is, as long as z is one of the codes and the scale is finite:
# `QuantizedWeight.check` looks at both. The product is taken in float32, where that of a scale of 16 bits is exact, and
# rounded once.


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
