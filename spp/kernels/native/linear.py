"""The adapted layer by the compiled products: what blockwise.py computes, without the zeros of W."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.kernels.blocks import row_step, slices
from spp.kernels.choice import VARIABLE, kernels
from spp.kernels.density import density
from spp.kernels.native.compiler import DTYPES, Block, library, why_not
from spp.kernels.native.products import (
    DELTA,
    EFFECTIVE,
    FROZEN,
    Products,
    Update,
    block_of,
    empty_sums,
    packed_block,
)
from spp.kernels.packed import PackedSource
from spp.kernels.sources import WeightSource
from spp.kernels.workspace import workspace
from spp.packed import PackedWeight
from spp.rules.base import Rule
from spp.rules.low_rank import LowRankFactors
from spp.rules.spp import Factors

WHOLE = slice(None)
RULES = ("spp", "hira", "masked_lora")
FEWEST_TOKENS = 33  # below, passes over W cost more than the products; and evaluation keeps W_eff (layer_adapted.py)
MOST_KEPT = 0.6  # of the weights; measured: at 50 % the products take 0.7 of the dense ones' time, at 60 % about 0.85


def suits(rule: Rule, weight: WeightSource, x: Tensor, stored_as: torch.dtype) -> bool:
    """Whether the layer is computed here; SPP_KERNELS=native means wherever that can be.

    Args:
        x: X (T, n) in the dtype of the products. stored_as: that of the layer's input.

    Raises:
        ConfigError: SPP_KERNELS=native asks for it, and there is no library; the message says why.
    """
    choice = kernels()
    if choice not in ("auto", "native") or weight.device.type != "cpu":
        return False
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, *weight.tensors()))  # no stand-in, no shard
    possible = (
        rule.name in RULES
        and plain
        and x.dtype == torch.float32
        and weight.dtype in DTYPES
        and stored_as in DTYPES
        and min(weight.shape) > 0
    )
    if choice == "native":
        if possible and why_not():
            raise ConfigError(f"{VARIABLE}=native: {why_not()}; use auto or torch")
        return possible
    worth_it = possible and len(x) >= FEWEST_TOKENS and density(weight) <= MOST_KEPT
    return worth_it and library() is not None


def forward(
    x: Tensor, weight: WeightSource, bias: Tensor | None, rule: Rule, factors: Any, stored_as: torch.dtype
) -> Tensor:
    """Return Y (T, m) from X (T, n), both float32; arguments as in blockwise.forward."""
    y = torch.empty(len(x), weight.shape[0])
    if not len(x):
        return y
    products, update = Products(library()), _update(rule, factors)
    tiles = products.tiles("x", x)
    for first, block in _blocks(weight, update, EFFECTIVE, stored_as):
        products.product(tiles, block, y[:, first:], transposed=False, add=False)
    return y if bias is None else y.add_(bias)


def forward_dropout(
    x: Tensor, dropped: Tensor, weight: WeightSource, bias: Tensor | None, rule: Rule, factors: Any
) -> Tensor:
    """Return Y (T, m) = X Wᵀ + b + X̃ W′ᵀ, W′ = W_eff − W, from X and X̃ (T, n), all float32: two products."""
    y = torch.empty(len(x), weight.shape[0])
    if not len(x):
        return y
    products, update = Products(library()), _update(rule, factors)
    for form, operand in ((FROZEN, x), (DELTA, dropped)):
        tiles = products.tiles("x", operand)
        for first, block in _blocks(weight, update, form, weight.dtype):
            products.product(tiles, block, y[:, first:], transposed=False, add=form == DELTA)
    return y if bias is None else y.add_(bias)


def backward_dropout(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    scale: float,
    weight: WeightSource,
    rule: Rule,
    factors: Any,
    needs_x: bool,
    needs_params: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dX (T, n) = dY W + mask ⊙ (dY W′), where it is needed, and dθ, of which H has X̃ for X.

    Args:
        kept (T, n): 0 or 1. scale: 1 / (1 − p); mask is their product. The rest as in `backward`.
    """
    d_x = None
    if needs_x:
        d_x = torch.zeros(x.shape)
        if len(x):
            products, update = Products(library()), _update(rule, factors)
            tiles, spread = products.tiles("dy", dy), torch.zeros(x.shape)
            for form, out in ((FROZEN, d_x), (DELTA, spread)):
                for first, block in _blocks(weight, update, form, weight.dtype):
                    products.product(tiles, block, out, transposed=True, add=first > 0)
            d_x.addcmul_(spread, kept, value=scale)
    dropped = (x * kept).mul_(scale) if any(needs_params) else x
    return d_x, backward(dy, dropped, weight, rule, factors, weight.dtype, False, needs_params)[1]


def backward(
    dy: Tensor,
    x: Tensor,
    weight: WeightSource,
    rule: Rule,
    factors: Any,
    stored_as: torch.dtype,
    needs_x: bool,
    needs_params: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dX (T, n), where it is needed, and dθ; arguments as in blockwise.backward, all float32."""
    update = _update(rule, factors)
    d_right, d_left = torch.zeros_like(update.right), empty_sums(update)
    d_x = torch.zeros(x.shape) if needs_x else None
    if len(x):
        products = Products(library())
        dy_tiles = products.tiles("dy", dy)
        if d_x is not None:
            for first, block in _blocks(weight, update, EFFECTIVE, stored_as):
                products.product(dy_tiles, block, d_x, transposed=True, add=first > 0)
        if any(needs_params):
            x_tiles = products.tiles("x", x)
            for _, block in _blocks(weight, update, FROZEN, weight.dtype):
                products.reduce(x_tiles, dy_tiles, block, d_right, d_left)
    grads = (d_right, d_left.sum(0).mul_(factors.scaling))
    return d_x, [grad if needed else None for grad, needed in zip(grads, needs_params, strict=True)]


def _update(rule: Rule, factors: Factors | LowRankFactors) -> Update:
    """Return U of a rule of RULES, whose parameters are its right and its left factor, the latter without s."""
    if isinstance(factors, Factors):
        left, right = factors.scaled_beta, factors.alpha
    else:
        left, right = factors.scaled_b, factors.a
    return Update(left.contiguous(), right.contiguous(), adds=not rule.multiplies)


def _blocks(weight: WeightSource, update: Update, form: int, rounded_to: torch.dtype) -> Iterator[tuple[int, Block]]:
    """Yield (first row, block): all of what is stored by rows, else rows decoded or copied, a block each."""
    m, n = weight.shape
    if isinstance(weight, PackedSource) and isinstance(weight.packed, PackedWeight):
        whole = packed_block(weight.packed, update, form, rounded_to)
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
