"""A backend: one way to compute the products of an adapted layer.

`spp.kernels.linear.linear` asks the backends in their order and takes the first that takes the operation; what it saved
in forward comes back to it in backward. A new backend is one subclass of `Backend` and one entry there. Shared by them
are the blocks that they work in: how W is cut, a block of W_eff, and what is found out of a weight once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from spp.kernels.choice import has_products, kernels
from spp.rules.adapter import arithmetic_dtype, effective_block
from spp.rules.base import Rule
from spp.weights.base import Weight, workspace

Gradients = tuple[Tensor | None, list[Tensor | None]]


class Needs(NamedTuple):
    """Which gradients a backward is asked for: dX, and each dθ."""

    x: bool
    params: Sequence[bool]


@dataclass(frozen=True)
class Operation:
    """The operation of one call of a layer: X W_effᵀ, and with input dropout X Wᵀ + X̃ (W_eff − W)ᵀ.

    Attributes:
        weight: W (m, n).
        rule: makes W_eff from W.
        factors: from the rule's `prepare`.
        dtype: of X and Y: W_eff is rounded to W's dtype, then to this one.
        dropout: p, with which entries of X are dropped from X̃; the others are divided by 1 − p.
    """

    weight: Weight
    rule: Rule
    factors: Any
    dtype: torch.dtype
    dropout: float

    @cached_property
    def largest_factor(self) -> float:
        """Return an upper bound of |W_eff / W − 1|; NaN but on a CPU, since reading it back would stall a device."""
        return self.rule.largest_factor(self.factors) if self.weight.device.type == "cpu" else math.nan

    @property
    def keep_scale(self) -> float:
        """Return 1 / (1 − p)."""
        return 1.0 / (1.0 - self.dropout)


class Backend(ABC):
    """One way to compute an operation, forward and backward; stateless."""

    @abstractmethod
    def takes(self, operation: Operation, x: Tensor) -> bool:
        """Return whether this backend computes the operation.

        Raises:
            ConfigError: SPP_KERNELS asks for this backend by name, and it cannot.
        """

    @abstractmethod
    def forward(
        self, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Return Y (T, m) in any dtype, and what backward is to be told: no tensor.

        Args:
            x: X (T, n).
            dropped: X̃ (T, n), None without input dropout.
            bias: (m,) or None.
        """

    @abstractmethod
    def backward(
        self, operation: Operation, told: Any, dy: Tensor, x: Tensor, kept: Tensor | None, needs: Needs
    ) -> Gradients:
        """Return dX (T, n) in any dtype, None where it is not needed, and dθ in the arithmetic's dtype, likewise.

        Args:
            told: by forward.
            dy: dY (T, m), in the dtype of Y.
            x: X (T, n), as it was saved.
            kept: bool (T, n): the entries that input dropout kept; None without it.
            needs: which gradients are needed.
        """


# ---- How a product is cut into blocks, and in which dtype it runs.

# Measured on CPUs: matrix products with fewer than 512 rows or columns of W are slower than the whole, and the passes
# over a block that builds W_eff or reduces G are fastest while the block stays in the last cache.
BLOCK_ELEMENTS = 2**22
_THIN = 2**13  # a block has at least BLOCK_ELEMENTS / _THIN = 512 rows or columns, however long they are


def slices(length: int, step: int) -> Iterator[slice]:
    """Yield consecutive slices that cover range(length); none for length 0."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def row_step(rows: int, cols: int, alignment: int) -> int:
    """Return how many rows a block has: about BLOCK_ELEMENTS elements, a multiple of `alignment` where that is near."""
    if rows * cols <= BLOCK_ELEMENTS:
        return max(rows, 1)
    step = _step(cols)
    if alignment <= 2 * step:
        step = max(1, round(step / alignment)) * alignment
    return min(step, rows)


def col_step(rows: int, cols: int) -> int:
    """Return how many columns a block of whole columns has, a multiple of 64 where that fits."""
    if rows * cols <= BLOCK_ELEMENTS:
        return max(cols, 1)
    step = _step(rows)
    return min(step - step % 64 if step >= 64 else step, cols)


def _step(length: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(length, 1), BLOCK_ELEMENTS // _THIN)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of `dtype` operands run on `device`; the compiled ones know float32 alone."""
    if device.type == "cpu" and dtype.itemsize == 2 and (kernels() == "native" or not has_products(dtype)):
        return torch.float32
    return dtype


# ---- One block of W_eff or of W_eff − W in the shared workspace, in the dtype of the product that it is for.


def effective(
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
        stored_as: the input's dtype.
        vanish: whether a kept weight can come out as zero.
    """
    device = block.device
    scratch = workspace("effective", tuple(block.shape), arithmetic_dtype(block.dtype), device)
    same = scratch.dtype == block.dtype
    rounded = None if same else workspace("rounded", tuple(block.shape), block.dtype, device)
    result = effective_block(rule, block, factors, rows, cols, scratch, rounded=rounded, may_vanish=vanish)
    if stored_as != result.dtype:  # autocast
        result = workspace("autocast", tuple(block.shape), stored_as, device).copy_(result)
    return result if result.dtype == dtype else scratch.copy_(result)


def delta(rule: Rule, block: Tensor, factors: Any, rows: slice, cols: slice, dtype: torch.dtype) -> Tensor:
    """Return (W_eff − W)[rows, cols], rounded once to the dtype of the product; `block` is W[rows, cols]."""
    scratch = workspace("effective", tuple(block.shape), arithmetic_dtype(block.dtype), block.device)
    rule.delta(block, factors, rows, cols, scratch)
    if scratch.dtype == dtype:
        return scratch
    return workspace("rounded", tuple(block.shape), dtype, block.device).copy_(scratch)


def plain(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a block of W for a product in `dtype`."""
    return block if block.dtype == dtype else workspace("frozen", tuple(block.shape), dtype, block.device).copy_(block)


# ---- What the kernels find out of a frozen weight once and remember while it stays as it is.

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight or its base -> {(fact, place): (version, value)}


def remembered(fact: str, weight: Tensor, find: Callable[[Tensor], float]) -> float:
    """Return find(weight), computed anew only after the weight changed in place.

    A view, such as one expert of many or the transpose of a Conv1D's weight, is known by its place in its base.
    """
    if weight.is_inference():  # it has no version to tell whether it changed
        return find(weight)
    base = weight if weight._base is None else weight._base
    facts: dict[object, tuple[int, float]] = _known.setdefault(base, {})
    place = (fact, weight.data_ptr(), tuple(weight.shape), weight.stride())
    known = facts.get(place)
    if known is None or known[0] != weight._version:
        known = facts[place] = weight._version, find(weight)
    return known[1]


# ---- The share of weights that a layer keeps, counted once a weight.


def density(weight: Weight) -> float:
    """Return how many of W's entries are kept, relative to all of them; 1 for a weight without entries."""
    m, n = weight.shape
    if not m * n:
        return 1.0
    first = next(iter(weight.tensors()), None)  # none of a weight that is offloaded
    count = weight.count_kept() if first is None else remembered("kept", first, lambda _: weight.count_kept())
    return count / (m * n)
