"""Merge one weight: the canonical effective weight, by blocks of rows, checked, and what rounding left of it.

On a CPU with a C compiler the pass is compiled (spp.kernels.native.elementwise); plain torch does what it does not, and
says what is wrong where a check fails. The weights are the same bits either way; the sums of the report agree to 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spp.configs.checkpoints import ROUNDINGS
from spp.configs.checks import check_choice
from spp.errors import ConfigError, MaskError, NonFiniteError, arg
from spp.kernels.native.elementwise import Found, merge_matrix
from spp.masks.patterns import all_finite, nonzero_mask
from spp.merging.report import LayerMerge, sum_layers, survived_share
from spp.rules import Adapter, rescue_
from spp.rules.adapter import arithmetic_dtype
from spp.weights import FLOATS, QuantizedWeight
from spp.wrapping.state import layer_generator

_MARGIN = 0.99  # of the largest value: what rounding each step, and up to the next value by chance, adds is less
BLOCK_ELEMENTS = 2**22  # part of the format: a stochastic merge draws a block of rows after the other


def check_rounding(dtype: torch.dtype | None, rounding: str) -> None:
    """Raise a ConfigError unless the options of a merge make sense."""
    check_choice("rounding", rounding, ROUNDINGS)
    if dtype is not None and dtype not in FLOATS.values():
        raise ConfigError(f"{arg('dtype')} is {dtype}; a merge stores {', '.join(str(d) for d in FLOATS.values())}")


def draw_seed(rounding: str, seed: int | None) -> int:
    """Return the seed of a merge: `seed`, or for stochastic rounding without one a draw from torch's generator."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"{arg('seed')} is {seed!r}; expected an integer, or None")
    if seed is None and rounding == "stochastic":
        return int(torch.randint(2**62, (1,)))
    return seed or 0


def merge_tensor(
    weight: Tensor,
    adapter: Adapter,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    where: str = "weight",
) -> tuple[Tensor, LayerMerge]:
    """Merge one weight: the canonical effective weight, checked, in a new tensor.

    Args:
        weight: W (m, n).
        adapter: of W; its parameters are moved to the device of `weight`.
        dtype: of the result; None for that of `weight`.
        rounding: "nearest" or "stochastic"; the latter needs `generator`, a CPU generator.
        where: the layer's name in messages.

    Returns:
        (W_merged (m, n), what was done).

    Raises:
        NonFiniteError, MaskError: as for `merge`.
    """
    dtype = dtype or weight.dtype
    adapter, rule = adapter.on(weight.device), adapter.rule
    require_finite(adapter, where)
    arithmetic, factors = arithmetic_dtype(weight.dtype), adapter.factors(weight.shape[0], weight.dtype)
    by_chance = rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16)
    compiled = None if by_chance else merge_matrix(rule, weight, factors, dtype)
    if compiled is not None and compiled[1].finite_after and not compiled[1].changed and _has_sums(compiled[1]):
        return compiled[0], layer_merge(compiled[1])
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    totals = _Totals()
    for rows in _blocks(weight):
        block = weight.detach()[rows]
        exact = torch.empty(block.shape, dtype=arithmetic, device=weight.device)
        rule.build(block, factors, rows, slice(None), exact)
        if by_chance:
            assert generator is not None
            merged[rows] = round_stochastically(exact, dtype, generator)
        else:
            merged[rows] = exact
        rescued = rescue_(merged[rows], block)
        kept = _check_block(block, merged[rows], rows.start, where)
        rule.delta(block, factors, rows, slice(None), exact)
        alone = block
        if dtype != block.dtype:
            rescue_(alone := block.to(dtype), block)
        totals.add(block, alone, merged[rows], exact, kept, int(torch.count_nonzero(rescued)))
    return merged, layer_merge(totals)


def require_finite(adapter: Adapter, where: str) -> None:
    """Raise a NonFiniteError where a parameter of an adapter, of the layer `where`, holds NaN or infinity."""
    for name, parameter in zip(adapter.rule.attribute_names(), adapter.params, strict=True):
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"{where}.{name} holds NaN or infinity; nothing was merged")


def merge_cannot_fail(
    weights: Iterable[Tensor], adapters: Iterable[Adapter], out_features: int, dtype: torch.dtype | None
) -> bool:
    """Whether a bound shows, without a merge, that `merge_tensor` raises nothing for any of these weights.

    The canonical function keeps every zero and every kept weight where all values are finite, and they are where
    |W_eff| ≤ max|W| · (1 + max|u|), or max|W| + max|U|, is below the largest value of the dtypes.

    Args:
        weights: W, or values of it: those that are left out are zeros.
        adapters: of one matrix, or of each expert.
        out_features: m.
        dtype: of the result; None for that of W.
    """
    largest, limit, arithmetic = 0.0, math.inf, torch.float32
    for weight in weights:
        arithmetic = arithmetic_dtype(weight.dtype)
        limit = min(limit, *(torch.finfo(d).max for d in (arithmetic, dtype or weight.dtype)))
        if weight.numel():
            ends = [abs(float(end)) for end in torch.aminmax(weight.detach())]
            if not all(map(math.isfinite, ends)):
                return False
            largest = max(largest, *ends)
    for adapter in adapters:
        rule = adapter.rule
        if not all(all_finite(p.detach()) for p in adapter.params):
            return False
        factors = adapter.on(None).factors(out_features, arithmetic)
        if rule.multiplies:
            bound = max(largest, 1.0) * (1 + rule.largest_factor(factors))  # 1 + u is a value of its own
        else:
            bound = largest + rule.bound(factors)
        if not bound < _MARGIN * limit:
            return False
    return True


def requantized(
    weight: Tensor, adapter: Adapter, merged: Tensor, stored: QuantizedWeight, done: LayerMerge
) -> LayerMerge:
    """Return what was done to a weight whose merged form was quantized again, counted of what is stored.

    Args:
        weight, adapter: as for `merge_tensor`; W is the base, dequantized.
        merged: W_merged (m, n).
        stored: what `merged` was quantized to; it is decoded a block at a time.
        done: what `merge_tensor` said.
    """
    rule, arithmetic = adapter.rule, arithmetic_dtype(weight.dtype)
    factors = adapter.on(weight.device).factors(weight.shape[0], weight.dtype)
    totals, square, lost = _Totals(), 0.0, 0
    for rows in _blocks(weight):
        block, before = weight.detach()[rows], merged[rows]
        exact = torch.empty(block.shape, dtype=arithmetic, device=weight.device)
        now = stored.decode(rows, slice(None), torch.empty(block.shape, dtype=stored.dtype, device=weight.device))
        nonzero = nonzero_mask(now)
        lost += int(torch.count_nonzero(nonzero_mask(before) & ~nonzero))
        rescued = 0
        if done.rescued:  # which of them, the merge did not say
            rule.build(block, factors, rows, slice(None), exact)
            rescued = int(torch.count_nonzero(rescue_(exact.to(merged.dtype), block) & nonzero))
        rule.delta(block, factors, rows, slice(None), exact)
        totals.add(block, block, now, exact, int(torch.count_nonzero(nonzero)), rescued)
        error = now.to(arithmetic) - before.to(arithmetic)
        square += _dot(error, error)
    found = layer_merge(totals)
    share = math.sqrt(square) / found.update_norm if found.update_norm else None
    return replace(found, lost=lost, requantize_error=share)


def layer_merge(found: Found | _Totals) -> LayerMerge:
    """Return what a merge of a whole matrix did, compiled or by torch."""
    survived = survived_share(found.inner, found.square, found.updated, found.moved)
    norm = math.sqrt(found.square)
    return LayerMerge(found.kept, found.rescued, survived, found.largest, norm, found.updated, found.moved)


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
    draw = torch.rand(exact.shape, generator=generator, dtype=torch.float32, device="cpu").to(exact.device)
    rounded = (low + (draw < share).to(torch.int16)).view(dtype)
    nearest = bits.view(dtype)
    return torch.where(torch.isinf(nearest), nearest, rounded)  # too large for the dtype: the caller raises


def merge_also(
    terms: Sequence[tuple[Tensor, float]],
    base: Tensor,
    *,
    where: str,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Merge a parameter that trained as a whole: p₀ + Σ w_t (p_t − p₀), rounded once; of one with weight 1, p itself.

    Args:
        terms: p_t as trained, with their weights. base: p₀.
        where: name of the parameter; others as for `merge_weight`.

    Returns:
        (what is stored, the largest |stored − p₀|).

    Raises:
        NonFiniteError: NaN or infinity, in a term or in the result.
    """
    dtype = dtype or base.dtype
    exact = terms[0][0].detach()
    if len(terms) > 1 or terms[0][1] != 1:
        exact = start = base.detach().double()
        for trained, weight in terms:
            exact = exact + weight * (trained.detach().to(start.device).double() - start)
    generator = layer_generator(seed, where) if rounding == "stochastic" else None
    if generator is not None and dtype in (torch.bfloat16, torch.float16):
        stored = round_stochastically(exact if exact.dtype == torch.float64 else exact.float(), dtype, generator)
    else:
        stored = exact.to(dtype)
    if not all(all_finite(t.detach()) for t, _ in terms) or not all_finite(stored):
        raise NonFiniteError(f"{where} holds NaN or infinity, or overflows in {dtype}; nothing was merged")
    change = (stored.double() - base.detach().to(stored.device).double()).abs()
    return stored, float(change.max()) if change.numel() else 0.0


def merge_weight(
    matrices: Iterable[Tensor],
    adapter: Adapter,
    *,
    transposed: bool,
    where: str,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> tuple[Tensor, LayerMerge]:
    """Merge the weight of a layer, in memory or on disk, in the layout in which it is stored.

    Args:
        matrices: W (m, n), one, or one an expert, each asked for when it is merged.
        adapter: of fused experts its parameters have a leading dimension; they are merged in order, from one generator.
        transposed: whether it is stored (n, m), or (E, n, m).
        where: the layer's module path.
        dtype, rounding: as for `merge_tensor`.
        seed: of stochastic rounding; a layer draws by its name.
    """
    generator = layer_generator(seed, where) if rounding == "stochastic" else None
    options: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "generator": generator}
    if adapter.params[0].dim() == 2:
        merged, done = merge_tensor(next(iter(matrices)), adapter, where=where, **options)
        return merged.T.contiguous() if transposed else merged, done
    whole, found, adapters = torch.empty(0, device="cpu"), list[LayerMerge](), adapter.experts()
    for number, (matrix, of_expert) in enumerate(zip(matrices, adapters, strict=True)):
        merged, done = merge_tensor(matrix, of_expert, where=f"{where}[{number}]", **options)
        merged = merged.T if transposed else merged
        if not found:
            whole = merged.new_empty((len(adapters), *merged.shape))
        whole[number] = merged
        found.append(done)
    return whole, sum_layers(found)


class _Totals:
    """Sums over the blocks of one layer: rows in the arithmetic's dtype, over the rows in float64."""

    def __init__(self) -> None:
        self.kept = self.rescued = self.updated = self.moved = 0
        self.inner = self.square = self.largest = 0.0

    def add(self, weight: Tensor, alone: Tensor, stored: Tensor, update: Tensor, kept: int, rescued: int) -> None:
        """Add a block.

        Args:
            weight: W; alone: what is stored of it without an update; stored: with it.
            update: ΔW in the arithmetic's dtype.
        """
        before, updated = weight.to(update.dtype), update != 0
        change = stored.to(update.dtype) - before
        self.kept += kept
        self.rescued += rescued
        self.updated += int(torch.count_nonzero(updated))
        self.moved += int(torch.count_nonzero(updated.logical_and_(stored != alone)))
        self.inner += _dot(change, update)
        self.square += _dot(update, update)
        relative = change.div_(before).abs_().nan_to_num_(nan=0.0)  # 0 / 0 where pruned
        self.largest = max(self.largest, float(relative.amax()) if relative.numel() else 0.0)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Yield the blocks of rows that are taken together."""
    step = max(1, BLOCK_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _dot(one: Tensor, other: Tensor) -> float:
    """Return ⟨one, other⟩, also where products are too large for float32."""
    found = float((one * other).sum(-1).double().sum())
    return found if math.isfinite(found) else float((one.double() * other.double()).sum())


def _has_sums(found: Found) -> bool:
    """Whether no sum of a compiled merge was too large for float32."""
    return all(map(math.isfinite, (found.inner, found.square, found.largest)))


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
