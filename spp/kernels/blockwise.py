"""The products on a CPU: a block of W_eff and of G at a time, small enough to stay in the last cache.

    forward    for each block of rows: W_eff[rows] built, Y[:, rows] = X W_eff[rows]ᵀ + b
    backward   for each block of rows: W_eff[rows] built again, dX += dY[:, rows] W_eff[rows]
                                       G[rows] = dY[:, rows]ᵀ X, and W ⊙ G reduced into dθ

Rows are read in the order in which W is stored. In 16 bits, where adding up dX over the blocks would round it at every
one, backward takes blocks of columns. Input dropout is in input_dropout.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spp.kernels.blocks import col_step, row_step, slices
from spp.kernels.build import WHOLE, effective
from spp.kernels.products import input_product, linear_product
from spp.kernels.sources import WeightSource
from spp.kernels.workspace import workspace
from spp.rules.base import Rule
from spp.rules.canonical import arithmetic_dtype


def forward(
    x: Tensor,
    weight: WeightSource,
    bias: Tensor | None,
    rule: Rule,
    factors: Any,
    stored_as: torch.dtype,
    vanish: bool,
) -> Tensor:
    """Return Y (T, m) from X (T, n).

    Args:
        x, bias: in the dtype of the products.
        factors: from the rule's `prepare`.
        stored_as: what W_eff is rounded to before that: the input's dtype.
        vanish: whether a kept weight can come out as zero.
    """
    (m, n), dtype = weight.shape, x.dtype
    step = row_step(m, n, rule.row_alignment(factors))
    if step >= m:
        frozen = weight.block(WHOLE, WHOLE)
        return linear_product(x, effective(rule, frozen, factors, WHOLE, WHOLE, stored_as, dtype, vanish), bias)
    y = torch.empty(x.shape[0], m, dtype=dtype, device=x.device)
    for rows in slices(m, step):
        block = effective(rule, weight.block(rows, WHOLE), factors, rows, WHOLE, stored_as, dtype, vanish)
        torch.mm(x, block.t(), out=y[:, rows])
    return y if bias is None else y.add_(bias)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: WeightSource,
    rule: Rule,
    factors: Any,
    stored_as: torch.dtype,
    vanish: bool,
    needs_x: bool,
    needs_params: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dX (T, n), where it is needed, and dθ in the arithmetic's dtype, None where it is not needed.

    Args:
        dy (T, m), x (T, n): in the dtype of the products; the rest as in `forward`.
    """
    (m, n), dtype, arithmetic = weight.shape, dy.dtype, arithmetic_dtype(weight.dtype)
    by_rows = dtype == arithmetic
    step = row_step(m, n, rule.row_alignment(factors)) if by_rows else col_step(m, n)
    one_block = step >= (m if by_rows else n) > 0
    grads = rule.empty_grads(factors, needs_params)
    if not one_block:  # a single one writes its sums at once
        for grad in grads:
            if grad is not None:
                grad.zero_()
    d_x = torch.empty(len(dy), n, dtype=dtype, device=dy.device) if needs_x and not one_block else None
    for part in slices(m if by_rows else n, step):
        rows, cols = (part, WHOLE) if by_rows else (WHOLE, part)
        block = weight.block(rows, cols)
        if needs_x:
            built = effective(rule, block, factors, rows, cols, stored_as, dtype, vanish)
            if d_x is None:
                d_x = input_product(dy, built)
            elif by_rows:
                d_x.addmm_(dy[:, rows], built, beta=float(part.start > 0))
            else:
                torch.mm(dy, built, out=d_x[:, cols])
        if any(needs_params):
            gradient = workspace("gradient", tuple(block.shape), dtype, dy.device)
            torch.mm(dy[:, rows].t(), x[:, cols], out=gradient)
            if dtype != arithmetic:
                gradient = workspace("gradient", gradient.shape, arithmetic, dy.device).copy_(gradient)
            rule.reduce(block, factors, rows, cols, gradient, grads, accumulate=not one_block)
    return d_x, grads
