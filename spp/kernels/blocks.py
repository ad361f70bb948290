"""How a product is cut into blocks, and in which dtype it runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spp.kernels import cpu
from spp.kernels.choice import kernels

# Measured on CPUs: matrix products with fewer than 512 rows or columns of W are slower than the whole, and the passes
# over a block that builds W_eff or reduces G are fastest while the block stays in the last cache.
BLOCK_ELEMENTS = 2**22
_THIN = 2**13  # a block has at least BLOCK_ELEMENTS / _THIN = 512 rows or columns, however long they are


def slices(length: int, step: int) -> Iterator[slice]:
    """Yield consecutive slices that cover range(length); none for length 0."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def row_step(rows: int, cols: int, alignment: int) -> int:
    """Return how many rows a block has: about BLOCK_ELEMENTS elements, a multiple of `alignment` where that is near."""
    if rows * cols <= BLOCK_ELEMENTS:
        return max(rows, 1)
    step = _step(cols)
    if alignment <= 2 * step:
        step = max(1, round(step / alignment)) * alignment
    return min(step, rows)


def col_step(rows: int, cols: int) -> int:
    """Return how many columns a block of whole columns has, a multiple of 64 where that fits."""
    if rows * cols <= BLOCK_ELEMENTS:
        return max(cols, 1)
    step = _step(rows)
    return min(step - step % 64 if step >= 64 else step, cols)


def _step(length: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(length, 1), BLOCK_ELEMENTS // _THIN)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of `dtype` operands run on `device`; the compiled ones know float32 alone."""
    if device.type == "cpu" and dtype.itemsize == 2 and (kernels() == "native" or not cpu.has_products(dtype)):
        return torch.float32
    return dtype
