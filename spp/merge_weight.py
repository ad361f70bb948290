"""Merge one weight: the canonical effective weight, by blocks of rows, checked, and what rounding left of it.

On a CPU with a C compiler the pass is compiled (spp.kernels.native.elementwise); plain torch does what it does not, and
says what is wrong where a check fails. The weights are the same bits either way; the sums of the report agree to 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp.errors import MaskError, NonFiniteError
from spp.kernels.native.elementwise import Found, merge_matrix
from spp.patterns import all_finite, nonzero_mask
from spp.rules import Rule, rescue_
from spp.rules.canonical import arithmetic_dtype

BLOCK_ELEMENTS = 2**22  # part of the format: a stochastic merge draws a block of rows after the other


@dataclass(frozen=True)
class LayerMerge:
    """What a merge did to one layer.

    Counts are exact. Sums are of float32 products: of updates below 1e-19, whose squares are no float32, they tell
    nothing, nor does `max_relative_change` of denormal weights in a process that flushes those to zero.

    Attributes:
        kept: weights that are not zero, before and after.
        rescued: of these, how many rounded to zero and were stored as the smallest magnitude that stays one.
        survived: ⟨W_merged − W, ΔW⟩ / ⟨ΔW, ΔW⟩, the share of the update that rounding left; 1 where ΔW is 0.
        max_relative_change: the largest |W_merged − W| / |W| over the kept weights.
        update_norm: ‖ΔW‖, Frobenius.
        lost: kept weights that quantizing the result again rounded to zero.
    """

    kept: int
    rescued: int
    survived: float
    max_relative_change: float
    update_norm: float
    lost: int = 0


def merge_tensor(
    rule: Rule,
    weight: Tensor,
    params: Sequence[Tensor],
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    where: str = "weight",
) -> tuple[Tensor, LayerMerge]:
    """Merge one weight: the canonical effective weight, checked, in a new tensor.

    Args:
        rule, params, scaling: the adapter; parameters on the device of `weight` or convertible to it.
        weight: W (m, n).
        dtype: of the result; None for that of `weight`.
        rounding: "nearest" or "stochastic"; the latter needs `generator`, a CPU generator.
        where: the layer's name in messages.

    Returns:
        (W_merged (m, n), what was done).

    Raises:
        NonFiniteError, MaskError: as for `merge`.
    """
    dtype = dtype or weight.dtype
    params = [p.detach().to(weight.device) for p in params]
    for name, parameter in zip(rule.attribute_names(), params, strict=True):
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"{where}.{name} holds NaN or infinity; nothing was merged")
    arithmetic = arithmetic_dtype(weight.dtype)
    factors = rule.prepare(params, scaling, weight.shape[0], arithmetic)
    by_chance = rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16)
    compiled = None if by_chance else merge_matrix(rule, weight, factors, dtype)
    if compiled is not None and compiled[1].finite_after and not compiled[1].changed:
        return compiled[0], layer_merge(compiled[1])
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    totals = _Totals()
    step = max(1, BLOCK_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        block = weight.detach()[rows]
        exact = torch.empty(block.shape, dtype=arithmetic, device=weight.device)
        rule.build(block, factors, rows, slice(None), exact)
        if by_chance:
            assert generator is not None
            merged[rows] = round_stochastically(exact, dtype, generator)
        else:
            merged[rows] = exact
        rescued = rescue_(merged[rows], block)
        kept = _check_block(block, merged[rows], start, where)
        rule.delta(block, factors, rows, slice(None), exact)
        totals.add(block, merged[rows], exact, kept, int(torch.count_nonzero(rescued)))
    return merged, totals.result()


def layer_merge(found: Found) -> LayerMerge:
    """Return what a compiled merge of a whole matrix did."""
    survived = found.inner / found.square if found.square else 1.0
    return LayerMerge(found.kept, found.rescued, survived, found.largest, math.sqrt(found.square))


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to a 16-bit dtype, up or down with the probabilities that make the mean exact.

    Args:
        exact: float32 or float64; dtype: bfloat16 or float16; generator: on the CPU.
    """
    bits = exact.to(dtype).view(torch.int16)
    past = bits.view(dtype).to(exact.dtype).abs() > exact.abs()
    low = bits - past.to(torch.int16)  # toward zero: one magnitude step less, sign kept
    low_value = low.view(dtype).to(exact.dtype).abs()
    high_value = (low + 1).view(dtype).to(exact.dtype).abs()
    share = (exact.abs() - low_value) / (high_value - low_value)
    draw = torch.rand(exact.shape, generator=generator, dtype=torch.float32).to(exact.device)
    rounded = (low + (draw < share).to(torch.int16)).view(dtype)
    nearest = bits.view(dtype)
    return torch.where(torch.isinf(nearest), nearest, rounded)  # too large for the dtype: the caller raises


def merge_experts(
    rule: Rule,
    matrices: Iterable[Tensor],
    params: Sequence[Sequence[Tensor]],
    scaling: float,
    *,
    transposed: bool,
    where: str,
    **options: Any,
) -> tuple[Tensor, LayerMerge]:
    """Merge a fused weight: `merge_tensor` for each expert's matrix (m, n), in order, from one generator.

    Args:
        matrices: of the experts, each asked for when it is merged; params: of each.
        transposed: whether the result is to be (E, n, m) instead of (E, m, n).
        options: of `merge_tensor`.
    """
    whole = torch.empty(0)
    totals: list[LayerMerge] = []
    for number, (matrix, of_expert) in enumerate(zip(matrices, params, strict=True)):
        merged, found = merge_tensor(rule, matrix, of_expert, scaling, where=f"{where}[{number}]", **options)
        merged = merged.T if transposed else merged
        if not totals:
            whole = merged.new_empty((len(params), *merged.shape))
        whole[number] = merged
        totals.append(found)
    return whole, sum_experts(totals)


def sum_experts(layers: Sequence[LayerMerge]) -> LayerMerge:
    """Return what was done to a fused weight from what was done to each expert's."""
    square = sum(layer.update_norm**2 for layer in layers)
    return LayerMerge(
        kept=sum(layer.kept for layer in layers),
        rescued=sum(layer.rescued for layer in layers),
        survived=sum(layer.survived * layer.update_norm**2 for layer in layers) / square if square else 1.0,
        max_relative_change=max(layer.max_relative_change for layer in layers),
        update_norm=math.sqrt(square),
    )


class _Totals:
    """Sums over the blocks of one layer: rows in the arithmetic's dtype, over the rows in float64."""

    def __init__(self) -> None:
        self.kept = self.rescued = 0
        self.inner = self.square = self.largest = 0.0

    def add(self, weight: Tensor, merged: Tensor, update: Tensor, kept: int, rescued: int) -> None:
        before = weight.to(update.dtype)
        change = merged.to(update.dtype) - before
        self.kept += kept
        self.rescued += rescued
        self.inner += _sum(change * update)
        self.square += _sum(update * update)
        relative = change.div_(before).abs_().nan_to_num_(nan=0.0)  # 0 / 0 where pruned
        self.largest = max(self.largest, float(relative.amax()) if relative.numel() else 0.0)

    def result(self) -> LayerMerge:
        survived = self.inner / self.square if self.square else 1.0
        return LayerMerge(self.kept, self.rescued, survived, self.largest, math.sqrt(self.square))


def _sum(products: Tensor) -> float:
    return float(products.sum(-1).double().sum())


def _check_block(weight: Tensor, merged: Tensor, start: int, where: str) -> int:
    """Return how many weights are kept; raise unless `merged` is finite and zero exactly where the weight is."""
    if not all_finite(merged):
        row, col = (int(i) for i in (~torch.isfinite(merged)).nonzero()[0])
        raise NonFiniteError(
            f"{where}: the merged weight at [{start + row}, {col}] is {float(merged[row, col])} in {merged.dtype} (the "
            f"pruned one is {float(weight[row, col])}); nothing was written. Merge to a wider dtype or take an "
            f"earlier adapter"
        )
    kept = nonzero_mask(weight)
    differing = kept ^ nonzero_mask(merged)
    if bool(differing.any()):
        row, col = (int(i) for i in differing.nonzero()[0])
        raise MaskError(
            f"{where}: the merge would change the zero pattern in {int(differing.sum())} places, first at "
            f"[{start + row}, {col}]; nothing was written"
        )
    return int(torch.count_nonzero(kept))
