"""The adapted linear layer in three matrix products, with nothing of size m × n saved for backward.

    forward    Y  = X W_effᵀ + b                                    one product
    backward   dX = dY W_eff                                        one product
               G  = dYᵀ X, and the rule reduces W ⊙ G into dθ       one product

On a CPU by blocks that stay in its cache (blockwise.py), where a C compiler is at hand without W's zeros (native/),
with input dropout in four or five products (input_dropout.py); on a GPU a layer at a time (whole.py).

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

from spp.kernels import blockwise, input_dropout, native, whole
from spp.kernels.autocast import no_autocast
from spp.kernels.bits import unpack_bits
from spp.kernels.blocks import product_dtype
from spp.kernels.dropout import draw_dropout
from spp.kernels.frozen import frozen_linear, operands, shaped_like_inputs
from spp.kernels.keep import check_saved_activations, kept_for_backward
from spp.kernels.once import Once
from spp.kernels.sources import WeightSource, source_of
from spp.kernels.vanishing import may_vanish
from spp.kernels.work import work_for
from spp.rules.base import Rule
from spp.rules.canonical import arithmetic_dtype

Tap = Callable[[Tensor, Tensor], None]


class Call:
    """One call of the layer: what its two autograd functions tell each other."""

    def __init__(self, rule: Rule, scaling: float, dropout: float, needs_x: bool, dtype: torch.dtype) -> None:
        self.rule = rule
        self.scaling = scaling
        self.dropout = dropout
        self.needs_x = needs_x
        self.dtype = dtype  # of X and Y
        self.whole = False  # whether spp.kernels.whole computes it
        self.native = False  # whether spp.kernels.native does
        self.products = dtype  # the dtype of the operands of both directions
        self.vanish = True  # whether the rescue has to be looked for; found in forward
        self.dropped: Tensor | None = None  # X̃, between the draw and the forward product only
        self.branch: Tensor | None = None  # V of input_dropout.py, between the product and its saving only
        self.saved: Any = None  # the identity's context, which holds what backward needs
        self.make_source: Callable[..., WeightSource] | None = None  # from the tensors of W that were saved
        self.tap: Tap | None = None


def linear(
    x: Tensor,
    weight: Tensor | WeightSource,
    bias: Tensor | None,
    rule: Rule,
    params: Sequence[Tensor],
    scaling: float,
    dropout: float = 0.0,
    saved_activations: str = "full",
    tap: Tap | None = None,
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
        saved_activations: what is kept of x for backward: "full", or "bfloat16" as in spp.kernels.keep.
        tap: is called in backward with dY (T, m) and X (T, n), as kept: of what G = dYᵀ X is the product.

    Returns:
        (…, m) in the dtype of x, under autocast in autocast's.
    """
    check_saved_activations(saved_activations)
    source = source_of(weight)
    x, bias = operands(x, source, bias)
    with no_autocast(x.device.type):
        differentiable = [x, *params] if bias is None else [x, bias, *params]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in differentiable):
            call = Call(rule, scaling, dropout, False, x.dtype)
            if dropout:
                call.dropped, _ = draw_dropout(x, dropout)
            return _forward(x, source, bias, call, params)
        call = Call(rule, scaling, dropout, x.requires_grad, x.dtype)
        kept = kept_for_backward(x, saved_activations) if any(p.requires_grad for p in params) else x
        bits = None
        if dropout:
            call.dropped, bits = draw_dropout(x, dropout)
        call.make_source, call.tap = source.maker(), tap
        x = _Keep.apply(x, kept, source.tensors(), bits, call, *params)
        result: Tensor = _Linear.apply(x, source, bias, call, *params)
        return result


class _Keep(torch.autograd.Function):
    """The identity on X; it saves all that the backward of the product needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        weight: tuple[Tensor, ...],
        bits: Tensor | None,
        call: Call,
        *params: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(kept, bits, *params, *weight)
        call.saved = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None, None, *(None for _ in ctx.needs_input_grad[5:])


class _Linear(torch.autograd.Function):
    """The products; it saves nothing itself, but for V where input dropout takes four of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: WeightSource, bias: Tensor | None, call: Call, *params: Tensor) -> Tensor:
        ctx.call = call
        y = _forward(x, weight, bias, call, params)
        ctx.save_for_backward(call.branch)
        call.branch = None
        return y

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
                (branch,) = ctx.saved_tensors
                d_x, d_params = _backward(dy, x, weight, bits, branch, call, params, needs_params)
                if call.tap is not None:
                    call.tap(dy.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1]))
                sources = [dy, x, *params]
        results = (d_x, None, d_bias, None, *d_params)
        if not torch.is_grad_enabled():
            return results
        return tuple(r if r is None else Once.apply(r, *sources) for r in results)  # create_graph=True


def _forward(x: Tensor, weight: WeightSource, bias: Tensor | None, call: Call, params: Sequence[Tensor]) -> Tensor:
    rule, m = call.rule, weight.shape[0]
    factors = rule.prepare(params, call.scaling, m, arithmetic_dtype(weight.dtype))
    rows_2d = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (T, n)
    dropped, call.dropped = call.dropped, None
    dropped = dropped if dropped is None else dropped.reshape(rows_2d.shape)
    call.whole = whole.takes_whole_layers(x.device)
    if call.whole:
        y = whole.forward(rows_2d, dropped, bias, work_for(rule, weight, factors))
        return shaped_like_inputs(y, x)
    call.products = product_dtype(x.dtype, x.device)
    # Reading a bound back would stall a device; there, W_eff is built whatever the factors are.
    largest = rule.largest_factor(factors) if x.device.type == "cpu" else math.nan
    if largest == 0:  # an untrained adapter: exactly the pruned layer, in the same call
        return shaped_like_inputs(frozen_linear(x, weight, bias), x)
    dtype = call.products
    operand, bias = rows_2d.to(dtype), bias if bias is None else bias.to(dtype)
    call.native = native.suits(rule, weight, operand, x.dtype)
    if call.native and dropped is not None:
        y = native.forward_dropout(operand, dropped.to(dtype), weight, bias, rule, factors)
    elif call.native:
        y = native.forward(operand, weight, bias, rule, factors, x.dtype)
    elif dropped is None:
        call.vanish = may_vanish(weight.kept(), largest)
        y = blockwise.forward(operand, weight, bias, rule, factors, x.dtype, call.vanish)
    else:
        y, branch = input_dropout.forward(operand, dropped.to(dtype), weight, bias, rule, factors)
        call.branch = branch if branch is None else branch.to(x.dtype)
    return shaped_like_inputs(y.to(x.dtype), x)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: WeightSource,
    bits: Tensor | None,
    branch: Tensor | None,
    call: Call,
    params: Sequence[Tensor],
    needs_params: Sequence[bool],
) -> tuple[Tensor | None, list[Any]]:
    rule, (m, n) = call.rule, weight.shape
    factors = rule.prepare(params, call.scaling, m, arithmetic_dtype(weight.dtype))
    dtype = call.products
    dy_2d = dy.reshape(-1, m).to(dtype)  # (T, m)
    x_2d = x.reshape(dy_2d.shape[0], n).to(dtype)
    mask = None if bits is None else unpack_bits(bits, x_2d.shape)
    keep_scale = 1.0 / (1.0 - call.dropout)
    d_x: Tensor | None
    if call.whole:
        work = work_for(rule, weight, factors)
        d_x = whole.input_gradient(dy_2d, mask, keep_scale, work) if call.needs_x else None
        totals = whole.parameter_gradients(dy_2d, x_2d, mask, keep_scale, work, needs_params)
    elif call.native and mask is not None:
        d_x, totals = native.backward_dropout(
            dy_2d, x_2d, mask.to(dtype), keep_scale, weight, rule, factors, call.needs_x, needs_params
        )
    elif call.native:
        d_x, totals = native.backward(dy_2d, x_2d, weight, rule, factors, call.dtype, call.needs_x, needs_params)
    elif mask is None:
        d_x, totals = blockwise.backward(
            dy_2d, x_2d, weight, rule, factors, call.dtype, call.vanish, call.needs_x, needs_params
        )
    else:
        kept, branch = mask.to(dtype), branch if branch is None else branch.to(dtype)
        d_x, totals = input_dropout.backward(
            dy_2d, x_2d, kept, keep_scale, branch, weight, rule, factors, call.needs_x, needs_params
        )
    d_params = [t if t is None else t.to(p.dtype) for t, p in zip(totals, params, strict=True)]
    return d_x if d_x is None else d_x.to(call.dtype).view(x.shape), d_params
