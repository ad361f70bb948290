"""The adapted linear layer in three matrix products, with nothing of size m × n saved for backward.

    forward    Y  = X W_effᵀ + b                                    one product; W_eff a block of rows at a time
    backward   dX = dY W_eff                                        one product; W_eff a block of columns at a time
               G  = dYᵀ X, and the rule reduces W ⊙ G into dθ       one product; G a block of columns at a time

Input dropout in training, with X̃ the dropped X and W′ = W_eff − W:

    forward    Y  = X Wᵀ + b + X̃ W′ᵀ                                two products
    backward   dX = dY W + mask ⊙ (dY W′),   G = dYᵀ X̃              three products

What backward needs (X, W, θ, the dropout bits) is saved by an identity that X passes first, not by the function that
computes the product. Under activation checkpointing the recomputation stops at the last tensor that was saved, so the
product behind it is not computed a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from spp.kernels import whole
from spp.kernels.autocast import autocast_dtype, no_autocast
from spp.kernels.blocks import col_step, product_dtype, row_step, slices
from spp.kernels.dropout import draw_dropout, unpack_bits
from spp.kernels.frozen import WHOLE, frozen_linear, frozen_product
from spp.kernels.once import Once
from spp.kernels.products import input_product, linear_product
from spp.kernels.sources import WeightSource, source_of
from spp.kernels.vanishing import may_vanish
from spp.kernels.work import work_for
from spp.kernels.workspace import workspace
from spp.rules.base import Rule
from spp.rules.canonical import arithmetic_dtype, effective_block


class Call:
    """One call of the layer: what its two autograd functions tell each other."""

    def __init__(self, rule: Rule, scaling: float, dropout: float, needs_x: bool) -> None:
        self.rule = rule
        self.scaling = scaling
        self.dropout = dropout
        self.needs_x = needs_x
        self.whole = False  # whether spp.kernels.whole computes it
        self.vanish = True  # whether the rescue has to be looked for; found in forward
        self.dropped: Tensor | None = None  # X̃, between the draw and the forward product only
        self.saved: Any = None  # the identity's context, which holds what backward needs
        self.make_source: Callable[..., WeightSource] | None = None  # from the tensors of W that were saved


def linear(
    x: Tensor,
    weight: Tensor | WeightSource,
    bias: Tensor | None,
    rule: Rule,
    params: Sequence[Tensor],
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the adapted layer; differentiable once in x, bias and the rule's parameters, never in the frozen weight.

    Args:
        x: (…, n) in the dtype of `weight`, or anything that autocast converts.
        weight: (m, n), frozen: it gets no gradient; a tensor, or a source of its blocks.
        bias: (m,) or None.
        params: the rule's parameters; converted to the arithmetic's dtype.
        scaling: s.
        dropout: probability of dropping an entry of X in the residual branch; drawn from torch's generator, one mask
            a call, the one that torch.nn.Dropout would draw.

    Returns:
        (…, m) in the dtype of x, under autocast in autocast's.
    """
    device_type = x.device.type
    source = source_of(weight)
    dtype = source.dtype
    if cast := autocast_dtype(device_type, dtype, x.dtype):
        x, dtype = x.to(cast), cast
    if x.dtype != dtype:
        raise TypeError(
            f"the input is {x.dtype} and the weight {source.dtype}: convert one, or run the model under torch.autocast"
        )
    if x.ndim == 0 or x.shape[-1] != source.shape[1]:
        raise ValueError(f"the input has shape {tuple(x.shape)}; its last dimension must be {source.shape[1]}")
    bias = bias if bias is None else bias.to(dtype)
    with no_autocast(device_type):
        differentiable = [x, *params] if bias is None else [x, bias, *params]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in differentiable):
            call = Call(rule, scaling, dropout, False)
            if dropout:
                call.dropped, _ = draw_dropout(x, dropout)
            return _forward(x, source, bias, call, params)
        call = Call(rule, scaling, dropout, x.requires_grad)
        bits = None
        if dropout:
            call.dropped, bits = draw_dropout(x, dropout)
        call.make_source = source.maker()
        x = _Keep.apply(x, source.tensors(), bits, call, *params)
        result: Tensor = _Linear.apply(x, source, bias, call, *params)
        return result


class _Keep(torch.autograd.Function):
    """The identity on X; it saves all that the backward of the product needs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: tuple[Tensor, ...], bits: Tensor | None, call: Call, *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, bits, *params, *weight)
        call.saved = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None, *(None for _ in ctx.needs_input_grad[4:])


class _Linear(torch.autograd.Function):
    """The products; it saves nothing itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: WeightSource, bias: Tensor | None, call: Call, *params: Tensor) -> Tensor:
        ctx.call = call
        return _forward(x, weight, bias, call, params)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call: Call = ctx.call
        dy, needs_params = grads[0], ctx.needs_input_grad[4:]
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), no_autocast(dy.device.type):
            d_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
            d_x, d_params, sources = None, [None] * len(needs_params), [dy]
            if call.needs_x or any(needs_params):
                x, bits, *saved = call.saved.saved_tensors
                params = saved[: len(needs_params)]
                assert call.make_source is not None
                weight = call.make_source(*saved[len(needs_params) :])
                d_x, d_params = _backward(dy, x, weight, bits, call, params, needs_params)
                sources = [dy, x, *params]
        results = (d_x, None, d_bias, None, *d_params)
        if not torch.is_grad_enabled():
            return results
        return tuple(r if r is None else Once.apply(r, *sources) for r in results)  # create_graph=True


def _forward(x: Tensor, weight: WeightSource, bias: Tensor | None, call: Call, params: Sequence[Tensor]) -> Tensor:
    rule, m = call.rule, weight.shape[0]
    factors = rule.prepare(params, call.scaling, m, arithmetic_dtype(weight.dtype))
    rows_2d = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (T, n)
    call.whole = whole.takes_whole_layers(x.device)
    if call.whole:
        dropped, call.dropped = call.dropped, None
        dropped = dropped if dropped is None else dropped.reshape(rows_2d.shape)
        return whole.forward(rows_2d, dropped, bias, work_for(rule, weight, factors)).view(*x.shape[:-1], m)
    # Reading a bound back would stall a device; there, W_eff is built whatever the factors are.
    largest = rule.largest_factor(factors) if x.device.type == "cpu" else math.nan
    call.vanish = may_vanish(weight.kept(), largest)
    if largest == 0:  # an untrained adapter: exactly the pruned layer, in the same call
        call.dropped = None
        return frozen_linear(x, weight, bias)
    dtype = product_dtype(x.dtype, x.device)
    step = row_step(m, weight.shape[1], rule.row_alignment(factors))
    if call.dropped is not None:
        dropped, call.dropped = call.dropped.reshape(rows_2d.shape), None
        y = frozen_product(rows_2d, weight, bias, dtype, step)
        dropped = dropped.to(dtype)
        for rows in slices(m, step):
            block = _delta(rule, weight.block(rows, WHOLE), factors, rows, WHOLE, dtype)
            y[:, rows].addmm_(dropped, block.t())
    else:
        operand = rows_2d.to(dtype)
        if step >= m:
            frozen = weight.block(WHOLE, WHOLE)
            block = _effective(rule, frozen, factors, WHOLE, WHOLE, x.dtype, dtype, call.vanish)
            y = linear_product(operand, block, bias if bias is None else bias.to(dtype))
        else:
            y = torch.empty(rows_2d.shape[0], m, dtype=dtype, device=x.device)
            for rows in slices(m, step):
                frozen = weight.block(rows, WHOLE)
                block = _effective(rule, frozen, factors, rows, WHOLE, x.dtype, dtype, call.vanish)
                torch.mm(operand, block.t(), out=y[:, rows])
            if bias is not None:
                y += bias
    return y.to(x.dtype).view(*x.shape[:-1], m)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: WeightSource,
    bits: Tensor | None,
    call: Call,
    params: Sequence[Tensor],
    needs_params: Sequence[bool],
) -> tuple[Tensor | None, list[Any]]:
    m, n = weight.shape
    factors = call.rule.prepare(params, call.scaling, m, arithmetic_dtype(weight.dtype))
    dtype = x.dtype if call.whole else product_dtype(x.dtype, x.device)
    dy_2d = dy.reshape(-1, m).to(dtype)  # (T, m)
    x_2d = x.reshape(dy_2d.shape[0], n)
    mask = None if bits is None else unpack_bits(bits, x.shape).view(-1, n)
    if call.whole:
        work, keep_scale = work_for(call.rule, weight, factors), 1.0 / (1.0 - call.dropout)
        d_x = whole.input_gradient(dy_2d, mask, keep_scale, work) if call.needs_x else None
        totals = whole.parameter_gradients(dy_2d, x_2d, mask, keep_scale, work, needs_params)
    else:
        d_x, totals = _blocks_backward(dy_2d, x_2d, weight, mask, call, factors, needs_params)
    d_params = [t if t is None else t.to(p.dtype) for t, p in zip(totals, params, strict=True)]
    return d_x if d_x is None else d_x.to(x.dtype).view(x.shape), d_params


def _blocks_backward(
    dy_2d: Tensor,
    x_2d: Tensor,
    weight: WeightSource,
    mask: Tensor | None,
    call: Call,
    factors: Any,
    needs_params: Sequence[bool],
) -> tuple[Tensor | None, list[Any]]:
    """Return dX (T, n) in the dtype of the product and dθ in the arithmetic's, a block of W's columns at a time."""
    rule, (m, n), dtype, device = call.rule, weight.shape, dy_2d.dtype, dy_2d.device
    arithmetic, given = arithmetic_dtype(weight.dtype), x_2d.dtype
    keep_scale = 1.0 / (1.0 - call.dropout)
    step = col_step(m, n)
    one_block = 0 < n <= step
    d_x = None
    if call.needs_x and not (one_block and mask is None):
        d_x = torch.empty(dy_2d.shape[0], n, dtype=dtype, device=device)
    totals = rule.empty_grads(factors, needs_params)
    if not one_block:  # a single one writes its sums at once
        for total in totals:
            if total is not None:
                total.zero_()
    for cols in slices(n, step):
        block = weight.block(WHOLE, cols)
        if call.needs_x and mask is None:
            effective = _effective(rule, block, factors, WHOLE, cols, given, dtype, call.vanish)
            if d_x is None:
                d_x = input_product(dy_2d, effective)
            else:
                torch.mm(dy_2d, effective, out=d_x[:, cols])
        elif d_x is not None and mask is not None:
            part = d_x[:, cols]
            branch = dy_2d @ _delta(rule, block, factors, WHOLE, cols, dtype)
            torch.mm(dy_2d, block.to(dtype), out=part)
            part.addcmul_(branch, mask[:, cols].to(dtype), value=keep_scale)
        if any(needs_params):
            operand = x_2d[:, cols].to(dtype)
            if mask is not None:
                operand = operand * mask[:, cols] * keep_scale
            gradient = workspace("gradient", (m, operand.shape[1]), dtype, device)
            torch.mm(dy_2d.t(), operand, out=gradient)
            if dtype != arithmetic:
                gradient = workspace("gradient", gradient.shape, arithmetic, device).copy_(gradient)
            rule.reduce(block, factors, WHOLE, cols, gradient, totals, accumulate=not one_block)
    return d_x, totals


def _effective(
    rule: Rule,
    block: Tensor,
    factors: Any,
    rows: slice,
    cols: slice,
    stored_as: torch.dtype,
    dtype: torch.dtype,
    vanish: bool,
) -> Tensor:
    """Return W_eff[rows, cols] for a product in `dtype`: rounded to the base's dtype, then to the input's.

    Args:
        block: W[rows, cols].
    """
    device = block.device
    scratch = workspace("effective", tuple(block.shape), arithmetic_dtype(block.dtype), device)
    same = scratch.dtype == block.dtype
    rounded = None if same else workspace("rounded", tuple(block.shape), block.dtype, device)
    result = effective_block(rule, block, factors, rows, cols, scratch, rounded=rounded, may_vanish=vanish)
    if stored_as != result.dtype:  # autocast
        result = workspace("autocast", tuple(block.shape), stored_as, device).copy_(result)
    return result if result.dtype == dtype else scratch.copy_(result)


def _delta(rule: Rule, block: Tensor, factors: Any, rows: slice, cols: slice, dtype: torch.dtype) -> Tensor:
    """Return (W_eff − W)[rows, cols], rounded once to the dtype of the product; `block` is W[rows, cols]."""
    scratch = workspace("effective", tuple(block.shape), arithmetic_dtype(block.dtype), block.device)
    rule.delta(block, factors, rows, cols, scratch)
    if scratch.dtype == dtype:
        return scratch
    return workspace("rounded", tuple(block.shape), dtype, block.device).copy_(scratch)
