"""The layer with input dropout: X̃, the dropped X, goes through W′ = W_eff − W, and X itself through W.

    five products    forward    Y  = X Wᵀ + b + X̃ W′ᵀ
                     backward   dX = dY W + mask ⊙ (dY W′),   G = dYᵀ X̃, which the rule reduces

    four products    where W′ = W ⊙ (a ⊗ c_k) within each of few blocks of rows k (a rule's `outer`)
                     forward    V  = X̃ (W ⊙ c)ᵀ,   Y = X Wᵀ + b + V ⊙ a;   V (T, m) is saved
                     backward   U_k = (dY_k ⊙ a_k) W_k,   dX = dY W + mask ⊙ Σ_k U_k ⊙ c_k
                                da  = Σ_t dY ⊙ V,         dc_k = Σ_t X̃ ⊙ U_k

`mask` is 0 or 1 / (1 − p). The second form passes a few times over T × n for every block of rows, so it is taken where
these have many rows, and only in the dtype that the sums are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spp.kernels import blocks
from spp.kernels.blocks import col_step, row_step, slices
from spp.kernels.build import WHOLE, delta, plain
from spp.kernels.frozen import frozen_product
from spp.kernels.sources import WeightSource
from spp.kernels.workspace import workspace
from spp.rules.base import Outer, Rule
from spp.rules.canonical import arithmetic_dtype

GROUP_ROWS = 128  # measured on CPUs: with fewer rows in a block the passes over T × n cost more than a fifth product


def forward(
    x: Tensor, dropped: Tensor, weight: WeightSource, bias: Tensor | None, rule: Rule, factors: Any
) -> tuple[Tensor, Tensor | None]:
    """Return (Y, V) both (T, m) from X and X̃ (T, n), all in the dtype of the products; V is None with five products."""
    (m, n), dtype = weight.shape, x.dtype
    outer = rule.outer(factors) if dtype == arithmetic_dtype(weight.dtype) else None
    step = row_step(m, n, rule.row_alignment(factors))
    y = frozen_product(x, weight, bias, dtype, step)
    if outer is None or len(outer.parts) * GROUP_ROWS > m:
        for rows in slices(m, step):
            y[:, rows].addmm_(dropped, delta(rule, weight.block(rows, WHOLE), factors, rows, WHOLE, dtype).t())
        return y, None
    branch = torch.empty_like(y)  # V
    for rows in slices(m, step):
        block = weight.block(rows, WHOLE)
        scaled = workspace("effective", tuple(block.shape), dtype, x.device)  # W ⊙ c
        for k, part in outer.within(rows):
            torch.mul(block[part], outer.cols[k], out=scaled[part])
        torch.mm(dropped, scaled.t(), out=branch[:, rows])
    return y.addcmul_(branch, outer.rows.view(1, m)), branch


def backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    scale: float,
    branch: Tensor | None,
    weight: WeightSource,
    rule: Rule,
    factors: Any,
    needs_x: bool,
    needs_params: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dX (T, n), where it is needed, and the gradients of the rule's parameters.

    Args:
        dy (T, m), x (T, n), kept (T, n), which is 0 or 1: in the dtype of the products.
        scale: 1 / (1 − p).
        branch: V (T, m) from the forward, or None where it took the form with five products.
    """
    dropped = (x * kept).mul_(scale) if any(needs_params) else x
    d_x = torch.empty_like(x) if needs_x else None
    if branch is not None:
        outer = rule.outer(factors)
        assert outer is not None
        d_rows = (dy * branch).sum(0).view(-1, 1)
        spread, d_cols = _through_groups(dy, dropped, weight, outer, row_step(*weight.shape, 1), d_x)
        grads = rule.outer_grads(factors, d_rows, d_cols, needs_params)
    else:
        grads = rule.empty_grads(factors, needs_params)
        spread = _through_gradient(dy, dropped, weight, rule, factors, grads, d_x)
    if d_x is not None and spread is not None:
        d_x.addcmul_(spread, kept, value=scale)
    return d_x, grads


def _through_gradient(
    dy: Tensor,
    dropped: Tensor,
    weight: WeightSource,
    rule: Rule,
    factors: Any,
    grads: Sequence[Tensor | None],
    d_x: Tensor | None,
) -> Tensor | None:
    """Write dY W into `d_x` and the gradients into `grads`; return dY W′ (T, n) where `d_x` is wanted."""
    (m, n), dtype = weight.shape, dy.dtype
    arithmetic = arithmetic_dtype(weight.dtype)
    spread = None if d_x is None else torch.empty_like(d_x)
    step = col_step(m, n)
    wanted = [grad for grad in grads if grad is not None]
    for grad in wanted:
        grad.zero_()
    for cols in slices(n, step):
        block = weight.block(WHOLE, cols)
        if d_x is not None and spread is not None:
            torch.mm(dy, delta(rule, block, factors, WHOLE, cols, dtype), out=spread[:, cols])
            frozen = plain(block, dtype)
            if len(dy) == 1:  # for one token MKL's order of summation depends on how far rows of W lie apart
                frozen = frozen.contiguous()
            torch.mm(dy, frozen, out=d_x[:, cols])
        if wanted:
            gradient = workspace("gradient", tuple(block.shape), dtype, dy.device)
            torch.mm(dy.t(), dropped[:, cols], out=gradient)
            if dtype != arithmetic:
                gradient = workspace("gradient", tuple(block.shape), arithmetic, dy.device).copy_(gradient)
            rule.reduce(block, factors, WHOLE, cols, gradient, grads, accumulate=True)
    return spread


def _through_groups(
    dy: Tensor, dropped: Tensor, weight: WeightSource, outer: Outer, step: int, d_x: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Write dY W into `d_x`; return Σ_k U_k ⊙ c_k (T, n), where `d_x` is wanted, and dc (r, n)."""
    (m, n), (tokens, device) = weight.shape, (len(dy), dy.device)
    d_cols = torch.zeros_like(outer.cols)
    spread = None if d_x is None else torch.zeros_like(d_x)
    across = max(1, blocks.BLOCK_ELEMENTS // max(1, tokens))  # columns of U_k at a time
    for rows in slices(m, step):
        block = plain(weight.block(rows, WHOLE), dy.dtype)
        if d_x is not None:
            d_x.addmm_(dy[:, rows], block, beta=float(rows.start > 0))
        for k, part in outer.within(rows):
            here = slice(rows.start + part.start, rows.start + part.stop)
            scaled = dy[:, here] * outer.rows[here].view(1, -1)  # (T, rows of the group in this block)
            for cols in slices(n, across):
                share = block[part, cols]
                shape = (tokens, share.shape[1])
                u = torch.mm(scaled, share, out=workspace("gradient", shape, dy.dtype, device))
                product = workspace("effective", shape, dy.dtype, device)
                d_cols[k, cols] += torch.mul(u, dropped[:, cols], out=product).sum(0)
                if spread is not None:
                    spread[:, cols].addcmul_(u, outer.cols[k, cols])
    return spread, d_cols
