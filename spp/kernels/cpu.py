"""The products on a CPU: a block of W_eff and of G at a time, small enough to stay in the last cache.

    forward    for each block of rows: W_eff[rows] built, Y[:, rows] = X W_eff[rows]ᵀ + b
    backward   for each block of rows: W_eff[rows] built again, dX += dY[:, rows] W_eff[rows]
                                       G[rows] = dY[:, rows]ᵀ X, and W ⊙ G reduced into dθ

Rows are read in the order in which W is stored. In 16 bits, where adding up dX over the blocks would round it at every
one, backward takes blocks of columns.

With input dropout X̃, the dropped X, goes through W′ = W_eff − W, and X itself through W, in five products; `mask` is 0
or 1 / (1 − p):

    forward    Y  = X Wᵀ + b + X̃ W′ᵀ
    backward   dX = dY W + mask ⊙ (dY W′),   G = dYᵀ X̃, which the rule reduces
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.kernels.backend import (
    Backend,
    Gradients,
    Needs,
    Operation,
    col_step,
    delta,
    effective,
    plain,
    product_dtype,
    remembered,
    row_step,
    slices,
)
from spp.kernels.choice import AMD, vendor
from spp.kernels.frozen import frozen_linear, frozen_product
from spp.masks.patterns import nonzero_mask
from spp.rules.adapter import WHOLE, arithmetic_dtype, smallest_kept
from spp.weights.base import workspace


class Blockwise(Backend):
    """Plain torch on a CPU, for any rule; what forward tells backward is whether a kept weight can come out as zero."""

    def takes(self, operation: Operation, x: Tensor) -> bool:
        """Return True: there is nothing else."""
        return True

    def forward(
        self, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, bool]:
        dtype = product_dtype(x.dtype, x.device)
        x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
        if dropped is not None:
            return _forward_dropout(operation, x, dropped.to(dtype), bias), True
        vanish = may_vanish(operation.weight.bounds(), operation.largest_factor)
        return _forward(operation, x, bias, vanish), vanish

    def backward(
        self, operation: Operation, told: Any, dy: Tensor, x: Tensor, kept: Tensor | None, needs: Needs
    ) -> Gradients:
        dtype = product_dtype(operation.dtype, dy.device)
        dy, x = dy.to(dtype), x.to(dtype)
        if kept is None:
            return _backward(operation, dy, x, told, needs)
        return _backward_dropout(operation, dy, x, kept.to(dtype), needs)


class Idle(Blockwise):
    """An untrained adapter on a CPU: exactly the pruned layer, in the same call."""

    def takes(self, operation: Operation, x: Tensor) -> bool:
        """Return whether W_eff is known to be W."""
        return operation.largest_factor == 0

    def forward(
        self, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, bool]:
        """Return X Wᵀ + b."""
        return frozen_linear(x, operation.weight, bias), True


def _forward(operation: Operation, x: Tensor, bias: Tensor | None, vanish: bool) -> Tensor:
    weight, rule, factors, stored_as = operation.weight, operation.rule, operation.factors, operation.dtype
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


def _backward(operation: Operation, dy: Tensor, x: Tensor, vanish: bool, needs: Needs) -> Gradients:
    weight, rule, factors, stored_as = operation.weight, operation.rule, operation.factors, operation.dtype
    (m, n), dtype, arithmetic = weight.shape, dy.dtype, arithmetic_dtype(weight.dtype)
    by_rows = dtype == arithmetic
    step = row_step(m, n, rule.row_alignment(factors)) if by_rows else col_step(m, n)
    one_block = step >= (m if by_rows else n) > 0
    grads = rule.empty_grads(factors, needs.params)
    if not one_block:  # a single one writes its sums at once
        for grad in grads:
            if grad is not None:
                grad.zero_()
    d_x = torch.empty(len(dy), n, dtype=dtype, device=dy.device) if needs.x and not one_block else None
    for part in slices(m if by_rows else n, step):
        rows, cols = (part, WHOLE) if by_rows else (WHOLE, part)
        block = weight.block(rows, cols)
        if needs.x:
            built = effective(rule, block, factors, rows, cols, stored_as, dtype, vanish)
            if d_x is None:
                d_x = input_product(dy, built)
            elif by_rows:
                d_x.addmm_(dy[:, rows], built, beta=float(part.start > 0))
            else:
                torch.mm(dy, built, out=d_x[:, cols])
        if any(needs.params):
            _reduce(operation, block, rows, cols, dy[:, rows], x[:, cols], grads, accumulate=not one_block)
    return d_x, grads


def _reduce(
    operation: Operation,
    block: Tensor,
    rows: slice,
    cols: slice,
    dy: Tensor,
    x: Tensor,
    grads: Sequence[Tensor | None],
    *,
    accumulate: bool,
) -> None:
    """Write what W ⊙ G of a block gives into `grads`; G = dYᵀ X of its rows and columns."""
    arithmetic = arithmetic_dtype(operation.weight.dtype)
    gradient = workspace("gradient", tuple(block.shape), dy.dtype, dy.device)
    torch.mm(dy.t(), x, out=gradient)
    if dy.dtype != arithmetic:
        gradient = workspace("gradient", gradient.shape, arithmetic, dy.device).copy_(gradient)
    operation.rule.reduce(block, operation.factors, rows, cols, gradient, grads, accumulate=accumulate)


def _forward_dropout(operation: Operation, x: Tensor, dropped: Tensor, bias: Tensor | None) -> Tensor:
    weight, rule, factors = operation.weight, operation.rule, operation.factors
    (m, n), dtype = weight.shape, x.dtype
    step = row_step(m, n, rule.row_alignment(factors))
    y = frozen_product(x, weight, bias, dtype, step)
    for rows in slices(m, step):
        y[:, rows].addmm_(dropped, delta(rule, weight.block(rows, WHOLE), factors, rows, WHOLE, dtype).t())
    return y


def _backward_dropout(operation: Operation, dy: Tensor, x: Tensor, kept: Tensor, needs: Needs) -> Gradients:
    """Return dX (T, n), where it is needed, and dθ; `kept` (T, n) is 0 or 1."""
    weight, rule, factors = operation.weight, operation.rule, operation.factors
    (m, n), dtype, scale = weight.shape, dy.dtype, operation.keep_scale
    dropped = (x * kept).mul_(scale) if any(needs.params) else x
    grads = rule.empty_grads(factors, needs.params)
    for grad in grads:
        if grad is not None:
            grad.zero_()
    d_x = torch.empty_like(x) if needs.x else None
    spread = torch.empty_like(x) if needs.x else None  # dY W′
    for cols in slices(n, col_step(m, n)):
        block = weight.block(WHOLE, cols)
        if d_x is not None and spread is not None:
            torch.mm(dy, delta(rule, block, factors, WHOLE, cols, dtype), out=spread[:, cols])
            frozen = plain(block, dtype)
            if len(dy) == 1:  # for one token MKL's order of summation depends on how far rows of W lie apart
                frozen = frozen.contiguous()
            torch.mm(dy, frozen, out=d_x[:, cols])
        if any(needs.params):
            _reduce(operation, block, WHOLE, cols, dy, dropped[:, cols], grads, accumulate=True)
    if d_x is not None and spread is not None:
        d_x.addcmul_(spread, kept, value=scale)
    return d_x, grads


# ---- The two products with the effective weight, by the faster of the vendor libraries that torch carries.
#
# torch hands float32 products on x86 to MKL. On AMD's CPUs oneDNN, which torch ships too, needed 0.77 to 0.98 of MKL's
# time for X Wᵀ and dY W at the shapes of a 135M model (EPYC with AVX-512, 2 threads, 512 and 1024 rows); for dYᵀ X
# neither was better throughout, so that one stays with torch. On an EPYC without AVX-512 MKL was the faster one, by up
# to a third. The choice depends on the machine and the operands, never on a timing, so that a run repeats bit for bit.


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return X Wᵀ + b (T, m) for x (T, n), weight (m, n), bias (m,) or None, all of one dtype."""
    if _by_onednn(x, weight):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def input_product(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dY W (T, n) for dy (T, m) and weight (m, n), both of one dtype."""
    if _by_onednn(dy, weight):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "")
        return result
    return torch.mm(dy, weight)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.numel() > 0
        and x.is_contiguous()
        and weight.is_contiguous()
        and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, and torch's oneDNN product works as expected."""
    if vendor() != AMD or not torch.cpu._is_avx512_supported() or not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(2, 3, device="cpu"), torch.arange(12.0, device="cpu").view(4, 3)
    try:
        with torch.inference_mode():
            found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.equal(found, F.linear(x, weight))


# ---- Whether a kept weight can come out of the canonical arithmetic as zero; nearly always not, and that is cheap to
# show.
#
# |W_eff| ≥ min |W kept| · (1 − max |s·β| · max |α|). Where that bound is a normal number of the base's dtype, no weight
# of the layer needs the rescue, and the pass over the block that looks for one is skipped. min |W kept| is found once a
# weight.

_ROUNDING = 1e-3  # far above what the roundings of the canonical order can take off the bound


def may_vanish(weight: Tensor, largest_factor: float) -> bool:
    """Return False only if no kept weight of W can come out as zero, by an upper bound of |W_eff / W − 1|."""
    if weight.device.type != "cpu" or type(weight) not in (Tensor, torch.nn.Parameter):
        return True  # reading the bound back would stall the device; there the rescue is always looked for
    bound = remembered("smallest kept", weight, _smallest_kept_weight) * (1 - largest_factor - _ROUNDING)
    return not bound >= smallest_kept(weight.dtype)


def _smallest_kept_weight(weight: Tensor) -> float:
    kept = weight.detach().abs().masked_fill_(~nonzero_mask(weight), math.inf)
    return float(kept.amin()) if kept.numel() else math.inf
