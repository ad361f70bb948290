"""The adapted layer by the compiled products: what kernels/cpu.py computes, without the zeros of W."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.kernels.backend import Backend, Gradients, Needs, Operation
from spp.kernels.blocks import density, product_dtype, row_step, slices
from spp.kernels.choice import VARIABLE, kernels
from spp.kernels.native.compiler import DTYPES, Block
from spp.kernels.native.products import (
    DELTA,
    EFFECTIVE,
    FROZEN,
    Products,
    Tiles,
    Update,
    block_of,
    empty_sums,
    library,
    packed_block,
    why_not,
)
from spp.rules.low_rank import LowRankFactors
from spp.rules.spp import Factors
from spp.weights import PackedWeight
from spp.weights.base import Weight, workspace

WHOLE = slice(None)
RULES = ("spp", "hira", "masked_lora")
FEWEST_TOKENS = 33  # below, passes over W cost more than the products; and evaluation keeps W_eff (layers/adapted.py)
MOST_KEPT = 0.6  # of the weights; measured: at 50 % the products take 0.7 of the dense ones' time, at 60 % about 0.85


class Native(Backend):
    """The compiled products, for the rules of RULES in float32; it tells backward nothing."""

    def takes(self, operation: Operation, x: Tensor) -> bool:
        """Return whether the layer is pruned and large enough; SPP_KERNELS=native means wherever it can be computed."""
        choice, weight = kernels(), operation.weight
        if choice not in ("auto", "native") or weight.device.type != "cpu":
            return False
        plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, *weight.tensors()))  # no stand-in, no shard
        possible = (
            operation.rule.name in RULES
            and plain
            and product_dtype(x.dtype, x.device) == torch.float32
            and weight.dtype in DTYPES
            and operation.dtype in DTYPES
            and min(weight.shape) > 0
        )
        if choice == "native":
            if possible and why_not():
                raise ConfigError(f"{VARIABLE}=native: {why_not()}; use auto or torch")
            return possible
        worth_it = possible and len(x) >= FEWEST_TOKENS and density(weight) <= MOST_KEPT
        return worth_it and library() is not None

    def forward(
        self, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, None]:
        """Return Y (T, m); with input dropout two products, of W and of W′ = W_eff − W."""
        y = torch.empty(len(x), operation.weight.shape[0])
        if not len(x):
            return y, None
        products, update = Products(library()), _update(operation)
        if dropped is None:
            terms = [(EFFECTIVE, x, operation.dtype)]
        else:
            terms = [(FROZEN, x, operation.weight.dtype), (DELTA, dropped, operation.weight.dtype)]
        for form, operand, rounded_to in terms:
            tiles = products.tiles("x", operand.float())
            for first, block in _blocks(operation.weight, update, form, rounded_to):
                products.product(tiles, block, y[:, first:], transposed=False, add=form == DELTA)
        return y if bias is None else y.add_(bias), None

    def backward(
        self, operation: Operation, told: Any, dy: Tensor, x: Tensor, kept: Tensor | None, needs: Needs
    ) -> Gradients:
        """Return dX (T, n) and dθ, of which H has X̃ for X."""
        dy, x, update = dy.float(), x.float(), _update(operation)
        products = Products(library())
        dy_tiles = products.tiles("dy", dy) if len(x) else None
        d_x = None
        if needs.x and kept is None:
            d_x = _times_weight(products, dy_tiles, x.shape, operation, update, EFFECTIVE)
        elif needs.x and kept is not None:
            d_x = _times_weight(products, dy_tiles, x.shape, operation, update, FROZEN)
            spread = _times_weight(products, dy_tiles, x.shape, operation, update, DELTA)
            d_x.addcmul_(spread, kept.float(), value=operation.keep_scale)
        if not any(needs.params):
            return d_x, [None] * len(needs.params)
        d_right, d_left = torch.zeros_like(update.right), empty_sums(update)
        if dy_tiles is not None:
            dropped = x if kept is None else (x * kept).mul_(operation.keep_scale)
            x_tiles = products.tiles("x", dropped)
            for _, block in _blocks(operation.weight, update, FROZEN, operation.weight.dtype):
                products.reduce(x_tiles, dy_tiles, block, d_right, d_left)
        grads = (d_right, d_left.sum(0).mul_(operation.factors.scaling))
        return d_x, [grad if needed else None for grad, needed in zip(grads, needs.params, strict=True)]


def _times_weight(
    products: Products, dy: Tiles | None, shape: torch.Size, operation: Operation, update: Update, form: int
) -> Tensor:
    """Return dY times a form of W (T, n)."""
    out = torch.zeros(shape)
    rounded_to = operation.dtype if form == EFFECTIVE else operation.weight.dtype
    if dy is not None:
        for first, block in _blocks(operation.weight, update, form, rounded_to):
            products.product(dy, block, out, transposed=True, add=first > 0)
    return out


def _update(operation: Operation) -> Update:
    """Return U of a rule of RULES, whose parameters are its right and its left factor, the latter without s."""
    factors: Factors | LowRankFactors = operation.factors
    if isinstance(factors, Factors):
        left, right = factors.scaled_beta, factors.alpha
    else:
        left, right = factors.scaled_b, factors.a
    return Update(left.contiguous(), right.contiguous(), adds=not operation.rule.multiplies)


def _blocks(weight: Weight, update: Update, form: int, rounded_to: torch.dtype) -> Iterator[tuple[int, Block]]:
    """Yield (first row, block): all of what is stored by rows, else rows decoded or copied, a block each."""
    m, n = weight.shape
    if isinstance(weight, PackedWeight):
        whole = packed_block(weight, update, form, rounded_to)
        if whole is not None:
            yield 0, whole
            return
    step = m
    if not weight.is_tensor or weight.block(WHOLE, WHOLE).stride(1) != 1:
        step = row_step(m, n, 1)
    for rows in slices(m, step):
        values = weight.block(rows, WHOLE)
        if values.stride(1) != 1:
            values = workspace("native weight", tuple(values.shape), values.dtype, values.device).copy_(values)
        yield rows.start, block_of(values, rows.start, m, update, form, rounded_to)
