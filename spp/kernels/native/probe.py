"""A small run of each compiled function against torch: a library that fails it is not used."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from spp.kernels.native.compiler import Refused
from spp.kernels.native.products import FROZEN, Products, Update, block_of, empty_sums
from spp.patterns import as_array, pack_bits
from spp.rules import effective_weight, get_rule
from spp.rules.canonical import WHOLE

SHAPE = (19, 37, 75)  # T, m, n: nothing a multiple of a vector or of KEYS


def probe(library: Any) -> None:
    """Raise Refused unless the products and the reduction are what torch computes."""
    tokens, m, n = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (
        torch.randint(-3, 4, size, generator=generator).float() for size in ((tokens, n), (tokens, m), (m, n))
    )
    y, d_x = torch.empty(tokens, m), torch.empty(tokens, n)
    products = Products(library)
    x_tiles, dy_tiles = products.tiles("x", x), products.tiles("dy", dy)
    update = Update(torch.ones(m, 2), torch.tensor([[1.0], [2.0]]).expand(2, n).contiguous())
    block = block_of(weight, 0, m, update, FROZEN, torch.float32)
    products.product(x_tiles, block, y, transposed=False, add=False)
    products.product(dy_tiles, block, d_x, transposed=True, add=False)
    d_right, d_left = torch.zeros_like(update.right), empty_sums(update)
    products.reduce(x_tiles, dy_tiles, block, d_right, d_left)
    h = weight * (dy.T @ x)
    expected = (x @ weight.T, dy @ weight, update.left.T @ h, h @ update.right.T)  # whole numbers, in any order
    for name, found, wanted in zip(
        ("X Wᵀ", "dY W", "dα", "dβ"), (y, d_x, d_right, d_left.sum(0)), expected, strict=True
    ):
        if not torch.equal(found, wanted):
            raise Refused(f"the compiled {name} is not torch's on a small layer")


def probe_merge(library: Any) -> None:
    """Raise Refused unless a small weight is merged, read as a mask and summed up as torch and zlib do it."""
    from spp.kernels.native.elementwise import Matrix, scan

    rule, (_, m, n) = get_rule("spp"), SHAPE
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(m, n, generator=generator) * (torch.rand(m, n, generator=generator) < 0.5)
        weight[0] = torch.finfo(dtype).smallest_normal  # scaled by a small factor, these are rescued
        weight = weight.to(dtype)
        params = [torch.randn(5, n, generator=generator), torch.randn(m, 1, generator=generator)]
        params[0][0], params[1][0] = 0.25, 1.0
        params[0][0, :9] = -0.5  # M = 0
        expected = effective_weight(rule, weight, params, 2.0)
        update, out, bits = torch.empty(m, n), torch.empty_like(weight), np.empty((m * n + 7) // 8, np.uint8)
        matrix = Matrix(library, m, n, dtype, dtype, [rule.prepare(params, 2.0, m, torch.float32)])
        found = matrix.merge(weight.data_ptr(), out.data_ptr(), bits, 0, m * n)
        data = as_array(expected.view(torch.uint8)).tobytes()
        if not torch.equal(out.view(torch.uint8), expected.view(torch.uint8)) or found.crc != zlib.crc32(data):
            raise Refused(f"the compiled merge in {dtype} is not torch's on a small weight")
        rule.delta(weight, rule.prepare(params, 2.0, m, torch.float32), WHOLE, WHOLE, update)
        if (found.updated, found.moved) != (int(update.count_nonzero()), int((expected != weight).sum())):
            raise Refused(f"the compiled counts in {dtype} are not torch's on a small weight")
        seen = scan(library, out.data_ptr(), dtype, m * n, np.empty_like(bits))
        if not np.array_equal(bits, pack_bits(weight)) or found.kept != seen.kept or found.rescued != 9:
            raise Refused(f"the compiled mask in {dtype} is not torch's on a small weight")
