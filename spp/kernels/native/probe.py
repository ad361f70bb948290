"""A small run of each compiled function against torch: a library that fails it is not used."""

from __future__ import annotations

from typing import Any

import torch

from spp.kernels.native.compiler import Refused
from spp.kernels.native.products import FROZEN, KEYS, Products, block_of

SHAPE = (19, 37, 75)  # T, m, n: nothing a multiple of a vector or of KEYS


def probe(library: Any) -> None:
    """Raise Refused unless the products and the reduction are what torch computes."""
    tokens, m, n = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (
        torch.randint(-3, 4, size, generator=generator).float() for size in ((tokens, n), (tokens, m), (m, n))
    )
    alpha, scaled_beta = torch.ones(1, n), torch.ones(m, 1)
    y, d_x = torch.empty(tokens, m), torch.empty(tokens, n)
    d_alpha, parts = torch.zeros(1, n), torch.zeros(-(-n // KEYS), m)
    products = Products(library)
    x_tiles, dy_tiles = products.tiles("x", x), products.tiles("dy", dy)
    block = block_of(weight, 0, m, alpha, scaled_beta, FROZEN, torch.float32)
    products.product(x_tiles, block, y, transposed=False, add=False)
    products.product(dy_tiles, block, d_x, transposed=True, add=False)
    products.reduce(x_tiles, dy_tiles, block, d_alpha, parts)
    h = weight * (dy.T @ x)
    expected = (x @ weight.T, dy @ weight, h.sum(0), h.sum(1))  # whole numbers: every order of summation gives the same
    for name, found, wanted in zip(
        ("X Wᵀ", "dY W", "dα", "dβ"), (y, d_x, d_alpha[0], parts.sum(0)), expected, strict=True
    ):
        if not torch.equal(found, wanted):
            raise Refused(f"the compiled {name} is not torch's on a small layer")
