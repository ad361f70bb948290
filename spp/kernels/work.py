"""The element-wise work around the products, for a whole layer: W_eff or W′ from W, and what G does to the gradients.

TorchWork is plain torch and knows every rule. TritonWork does the same for SPP in one pass each; it is its twin that
the tests compare with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spp.kernels.blocks import slices
from spp.kernels.choice import by_triton
from spp.kernels.packed import PackedSource
from spp.kernels.sources import WeightSource
from spp.kernels.workspace import workspace
from spp.packed import PackedWeight
from spp.rules.base import Rule
from spp.rules.canonical import arithmetic_dtype, effective_block

WHOLE = slice(None)
SCRATCH_ELEMENTS = 2**24  # of a block of rows: 64 MB of float32, and few enough launches a layer


class Work(ABC):
    """What is done for one call of one layer.

    Args:
        rule, source: of the layer; factors: from the rule's `prepare`.
    """

    def __init__(self, rule: Rule, source: WeightSource, factors: Any) -> None:
        self.rule = rule
        self.source = source
        self.factors = factors

    @abstractmethod
    def effective(self, dtype: torch.dtype) -> Tensor:
        """Return W_eff (m, n), rounded to W's dtype and then to `dtype`, in the workspace "effective"."""

    @abstractmethod
    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return W′ = W_eff − W (m, n), rounded once to `dtype`, in the workspace "effective"."""

    @abstractmethod
    def reduce(self, cols: slice, gradient: Tensor, grads: Sequence[Tensor | None], *, accumulate: bool) -> None:
        """Write what G[:, cols] adds to the parameters' gradients into `grads`.

        Args:
            gradient: G[:, cols] contiguous, in the dtype of the product; it may be overwritten.
            grads: from the rule's `empty_grads`; zeroed before, if `accumulate`.
        """

    def _out(self, dtype: torch.dtype) -> Tensor:
        return workspace("effective", self.source.shape, dtype, self.source.device)


class TorchWork(Work):
    """Plain torch, a block of rows at a time."""

    def effective(self, dtype: torch.dtype) -> Tensor:
        """Return W_eff."""
        out = self._out(dtype)
        for rows, scratch in self._blocks():
            block = self.source.block(rows, WHOLE)
            rounded = None if scratch.dtype == block.dtype else self._scratch("rounded", scratch.shape, block.dtype)
            out[rows] = effective_block(self.rule, block, self.factors, rows, WHOLE, scratch, rounded=rounded)
        return out

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return W′."""
        out = self._out(dtype)
        for rows, scratch in self._blocks():
            self.rule.delta(self.source.block(rows, WHOLE), self.factors, rows, WHOLE, scratch)
            out[rows] = scratch
        return out

    def reduce(self, cols: slice, gradient: Tensor, grads: Sequence[Tensor | None], *, accumulate: bool) -> None:
        """Reduce W ⊙ G in the arithmetic's dtype."""
        arithmetic = arithmetic_dtype(self.source.dtype)
        if gradient.dtype != arithmetic:
            gradient = self._scratch("gradient", gradient.shape, arithmetic).copy_(gradient)
        weight = self.source.block(WHOLE, cols)
        self.rule.reduce(weight, self.factors, WHOLE, cols, gradient, grads, accumulate=accumulate)

    def _blocks(self) -> Sequence[tuple[slice, Tensor]]:
        m, n = self.source.shape
        alignment = self.rule.row_alignment(self.factors)
        step = max(1, SCRATCH_ELEMENTS // max(n, 1))
        step = step - step % alignment if step >= alignment else step
        arithmetic = arithmetic_dtype(self.source.dtype)
        return [(rows, self._scratch("scratch", (rows.stop - rows.start, n), arithmetic)) for rows in slices(m, step)]

    def _scratch(self, tag: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return workspace(tag, tuple(shape), dtype, self.source.device)


class TritonWork(Work):
    """Triton's kernels, for SPP in float32 arithmetic; a packed W is decoded inside of them."""

    def effective(self, dtype: torch.dtype) -> Tensor:
        """Return W_eff."""
        from spp.kernels.triton import build

        out = self._out(dtype)
        build(self._weight(), self.factors, out)
        return out

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return W′."""
        from spp.kernels.triton import delta

        out = self._out(dtype)
        delta(self._weight(), self.factors, out)
        return out

    def reduce(self, cols: slice, gradient: Tensor, grads: Sequence[Tensor | None], *, accumulate: bool) -> None:
        """Reduce W ⊙ G in float32."""
        from spp.kernels.triton import reduce

        reduce(self._weight(), self.factors, cols, gradient, grads, accumulate=accumulate)

    def _weight(self) -> Tensor | PackedWeight:
        packed = self.source.packed if isinstance(self.source, PackedSource) else None
        return packed if isinstance(packed, PackedWeight) else self.source.block(WHOLE, WHOLE)


def work_for(rule: Rule, source: WeightSource, factors: Any) -> Work:
    """Return who does the work for a layer; see spp.kernels.choice."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in source.tensors())  # no stand-in, no shard
    return (TritonWork if plain and by_triton(source.device, source.dtype, rule.name) else TorchWork)(
        rule, source, factors
    )
