"""Products with W itself, without an adapter, a block of it at a time where W is no tensor.

    forward    Y  = X Wᵀ + b        a block of rows at a time
    backward   dX = dY W            a block of rows at a time, in 16 bits of columns

On a GPU the whole W is decoded into the workspace that all layers share.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.kernels.autograd import Once, autocast_dtype, no_autocast
from spp.kernels.backend import col_step, plain, row_step, slices
from spp.rules.adapter import WHOLE, arithmetic_dtype
from spp.weights.base import Weight


def base_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Compute X Wᵀ + b (…, m) for x (…, n) in the dtype of W, or anything that autocast converts.

    With a weight that autograd cannot hold as a tensor, it is differentiable once in x and bias.
    """
    if weight.is_tensor and weight.tensors():
        return F.linear(x, weight.matrix(), bias)
    x, bias = operands(x, weight, bias)
    with no_autocast(x.device.type):
        result: Tensor = _Frozen.apply(x, weight, bias)
        return result


def operands(x: Tensor, weight: Weight, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x and the bias in the dtype of the product: autocast's, or that of W, which x must have then.

    Raises:
        TypeError: x is of another dtype than W, and autocast is off.
        ValueError: the last dimension of x is not W's.
    """
    dtype = weight.dtype
    if cast := autocast_dtype(x.device.type, dtype, x.dtype):
        x, dtype = x.to(cast), cast
    if x.dtype != dtype:
        raise TypeError(
            f"the input is {x.dtype} and the weight {weight.dtype}: convert one, or run the model under torch.autocast"
        )
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"the input has shape {tuple(x.shape)}; its last dimension must be {weight.shape[1]}")
    return x, bias if bias is None else bias.to(dtype)


class _Frozen(torch.autograd.Function):
    """Saves what W is made of, which the module holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*weight.tensors())
        ctx.make_source = weight.maker()
        return shaped_like_inputs(frozen_linear(x, weight, bias), x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy = grads[0]
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), no_autocast(dy.device.type):
            d_bias = as_rows(dy).sum(0) if ctx.needs_input_grad[2] else None
            d_x = _input_gradient(dy, ctx.make_source(*ctx.saved_tensors)) if ctx.needs_input_grad[0] else None
        if not torch.is_grad_enabled():
            return d_x, None, d_bias
        return tuple(r if r is None else Once.apply(r, dy) for r in (d_x, None, d_bias))  # create_graph=True


def shaped_like_inputs(y: Tensor, x: Tensor) -> Tensor:
    """Return y (T, m), or of the right shape already, as (…, m) for x (…, n), and not as a view.

    Autograd forbids to write into a view that a function of its own returned, as some models do (`out.add_(…)`).
    """
    result: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return result


def _input_gradient(dy: Tensor, weight: Weight) -> Tensor:
    """Return dY W (…, n), by rows of W as it is stored, unless adding up would round to 16 bits."""
    m, n = weight.shape
    dy_2d = as_rows(dy)
    if dy.device.type != "cpu" or m * n == 0:
        return torch.mm(dy_2d, weight.block(WHOLE, WHOLE).to(dy.dtype)).view(*dy.shape[:-1], n)
    d_x = torch.empty(dy_2d.shape[0], n, dtype=dy.dtype, device=dy.device)
    if dy.dtype == arithmetic_dtype(weight.dtype):
        for rows in slices(m, row_step(m, n, 1)):
            block = weight.block(rows, WHOLE).to(dy.dtype)
            d_x.addmm_(dy_2d[:, rows], block, beta=float(rows.start > 0))
    else:
        for cols in slices(n, col_step(m, n)):
            torch.mm(dy_2d, weight.block(WHOLE, cols).to(dy.dtype), out=d_x[:, cols])
    return d_x.view(*dy.shape[:-1], n)


def as_rows(t: Tensor) -> Tensor:
    """Return t (…, k) as (T, k); unlike with −1, a side of length 0 is no riddle."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return X Wᵀ + b (…, m) in the dtype of x, as torch's linear computes it."""
    m, n = weight.shape
    step = m if weight.is_tensor or x.device.type != "cpu" else row_step(m, n, 1)
    if step >= m:
        return F.linear(x, weight.block(WHOLE, WHOLE).to(x.dtype), bias)
    y = torch.empty(*x.shape[:-1], m, dtype=x.dtype, device=x.device)
    for rows in slices(m, step):
        y[..., rows] = F.linear(x, weight.block(rows, WHOLE).to(x.dtype), bias if bias is None else bias[rows])
    return y


def frozen_product(x: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype, step: int) -> Tensor:
    """Return X Wᵀ + b (T, m) for x (T, n) in `dtype`, converting W a block at a time where it has another."""
    bias = bias if bias is None else bias.to(dtype)
    x = x.to(dtype)
    if weight.dtype == dtype:
        return frozen_linear(x, weight, bias)
    m = weight.shape[0]
    y = torch.empty(x.shape[0], m, dtype=dtype, device=x.device)
    for rows in slices(m, step):
        torch.mm(x, plain(weight.block(rows, WHOLE), dtype).t(), out=y[:, rows])
    return y if bias is None else y.add_(bias)
