"""The adapted linear layer in three matrix products, with nothing of size m × n saved for backward.

    forward    Y  = X W_effᵀ + b                                    one product
    backward   dX = dY W_eff                                        one product
               G  = dYᵀ X, and the rule reduces W ⊙ G into dθ       one product

The first backend that takes the operation computes it: on a GPU a layer at a time (gpu.py); on a CPU, where a C
compiler is at hand, without W's zeros (native/), else by blocks that stay in its cache (cpu.py). With input
dropout it takes five products.

What backward needs (X, W, θ, the dropout bits) is saved by an identity that X passes first, not by the function that
computes the product. Under activation checkpointing the recomputation stops at the last tensor that was saved, so the
product behind it is not computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spp.kernels.autograd import Once, check_saved_activations, draw_dropout, kept_for_backward, no_autocast
from spp.kernels.backend import Backend, Needs, Operation
from spp.kernels.cpu import Blockwise, Idle
from spp.kernels.frozen import as_rows, operands, shaped_like_inputs
from spp.kernels.gpu import Whole
from spp.kernels.native import Native
from spp.masks.patterns import unpack_mask
from spp.rules.adapter import Adapter
from spp.weights.base import Weight, as_weight

BACKENDS: tuple[Backend, ...] = (Whole(), Idle(), Native(), Blockwise())  # the first that takes an operation


class Run(NamedTuple):
    """How a layer is run: a choice of the run, not of the adapter.

    Attributes:
        saved_activations: what is saved of X for backward: "full", or "bfloat16" as in spp.kernels.autograd.
        tap: is called in backward with dY (T, m) and X (T, n), as saved: of what G = dYᵀ X is the product.
    """

    saved_activations: str = "full"
    tap: Callable[[Tensor, Tensor], None] | None = None


class _Call(NamedTuple):
    """The facts that forward hands to backward, without tensors.

    Attributes:
        adapter: without its parameters, which are saved.
        make_weight: W again, from the tensors of it that were saved.
        dtype: of X and Y.
    """

    backend: Backend
    adapter: Adapter
    make_weight: Callable[..., Weight]
    dtype: torch.dtype
    needs_x: bool
    tap: Callable[[Tensor, Tensor], None] | None


def linear(x: Tensor, weight: Tensor | Weight, bias: Tensor | None, adapter: Adapter, run: Run | None = None) -> Tensor:
    """Compute the adapted layer; differentiable once in x, bias and the rule's parameters, never in the frozen weight.

    Args:
        x: (…, n) in the dtype of `weight`, or anything that autocast converts.
        weight: (m, n), frozen: it gets no gradient; a tensor, or held in another form.
        bias: (m,) or None.
        adapter: of this call. Its dropout drops entries of X in the residual branch: one mask a call, drawn from
            torch's generator, the one that torch.nn.Dropout would draw.
        run: how.

    Returns:
        (…, m) in the dtype of x, under autocast in autocast's.
    """
    run = run or Run()
    check_saved_activations(run.saved_activations)
    weight, params = as_weight(weight), adapter.params
    x, bias = operands(x, weight, bias)
    with no_autocast(x.device.type):
        differentiable = [x, *params] if bias is None else [x, bias, *params]
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
        kept = kept_for_backward(x, run.saved_activations) if trains and any(p.requires_grad for p in params) else x
        dropped, bits = draw_dropout(x, adapter.dropout) if adapter.dropout else (None, None)
        with torch.no_grad():
            operation = _operation(adapter, weight, x.dtype)
            backend = next(backend for backend in BACKENDS if backend.takes(operation, as_rows(x)))
        if not trains:
            return _forward(backend, operation, x, dropped, bias)[0]
        bare = Adapter(adapter.rule, (), adapter.scaling, adapter.dropout)
        call = _Call(backend, bare, weight.maker(), x.dtype, x.requires_grad, run.tap)
        x = _Keep.apply(x, kept, weight.tensors(), bits, *params)
        result: Tensor = _Linear.apply(x, dropped, bias, operation, call, x.grad_fn, *params)
        return result


class _Keep(torch.autograd.Function):
    """The identity on X; it saves all that the backward of the product needs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor, weight: tuple[Tensor, ...], bits: Tensor | None, *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(kept, bits, *params, *weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None, *(None for _ in ctx.needs_input_grad[4:])


class _Linear(torch.autograd.Function):
    """The products; it saves no tensor itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bias: Tensor | None,
        operation: Operation,
        call: _Call,
        keep: Any,
        *params: Tensor,
    ) -> Tensor:
        y, ctx.told = _forward(call.backend, operation, x, dropped, bias)
        ctx.call, ctx.keep = call, keep
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call: _Call = ctx.call
        dy, needs_params = grads[0], ctx.needs_input_grad[6:]
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), no_autocast(dy.device.type):
            d_bias = as_rows(dy).sum(0) if ctx.needs_input_grad[2] else None
            d_x, sources = None, [dy]
            d_params: list[Tensor | None] = [None] * len(needs_params)
            if call.needs_x or any(needs_params):
                x, bits, *saved = ctx.keep.saved_tensors
                params, weight = saved[: len(needs_params)], call.make_weight(*saved[len(needs_params) :])
                operation = _operation(call.adapter._replace(params=tuple(params)), weight, call.dtype)
                rows, needs = as_rows(x), Needs(call.needs_x, needs_params)
                kept = None if bits is None else unpack_mask(bits, rows.shape)
                d_x, totals = call.backend.backward(operation, ctx.told, as_rows(dy), rows, kept, needs)
                d_x = d_x if d_x is None else d_x.to(call.dtype).view(x.shape)
                d_params = [t if t is None else t.to(p.dtype) for t, p in zip(totals, params, strict=True)]
                if call.tap is not None:
                    call.tap(as_rows(dy), rows)
                sources = [dy, x, *params]
        results = (d_x, None, d_bias, None, None, None, *d_params)
        if not torch.is_grad_enabled():
            return results
        return tuple(r if r is None else Once.apply(r, *sources) for r in results)  # create_graph=True


def _operation(adapter: Adapter, weight: Weight, dtype: torch.dtype) -> Operation:
    factors = adapter.factors(weight.shape[0], weight.dtype)
    return Operation(weight, adapter.rule, factors, dtype, adapter.dropout)


def _forward(
    backend: Backend, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Any]:
    y, told = backend.forward(operation, as_rows(x), None if dropped is None else as_rows(dropped), bias)
    return shaped_like_inputs(y.to(x.dtype), x), told
