"""The products on a GPU: W_eff whole, G a chunk of columns at a time, small enough to stay in the L2 cache.

    forward    W_eff built (one pass over W)           Y  = X W_effᵀ + b
    backward   W_eff built again                       dX = dY W_eff
               for each chunk: G = dYᵀ X[:, chunk], and W ⊙ G reduced into dθ before G leaves the cache

Beside the three products, Triton's kernels read W twice and write W_eff twice, and read W and G once more, G from the
cache; a packed W is read at its own size. Plain torch takes about four passes in float32 for each of these.

With input dropout, X̃ the dropped X: Y = X Wᵀ + b + X̃ W′ᵀ, dX = dY W + mask ⊙ (dY W′) / (1 − p), G = dYᵀ X̃.

Memory beyond what the layer saves, shared by all layers, once for the thread that runs forward and once for
autograd's: one W_eff of the largest layer in the dtype of the products (2 · m · n bytes in 16 bits), and one chunk of
G of at most half the L2 cache with partial sums of about a twentieth of that. Plain torch needs in addition 4 to 6
bytes for each of up to 2²⁴ weights, and G once more in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.kernels.backend import Backend, Gradients, Needs, Operation, slices
from spp.kernels.choice import by_triton, kernels
from spp.rules.adapter import WHOLE, arithmetic_dtype, effective_block
from spp.rules.base import Rule
from spp.weights import PackedWeight
from spp.weights.base import Weight, workspace

COLUMN_UNIT = 256  # chunks are multiples of it: whole tiles of a product, whole tiles of the reduction
USUAL_CACHE = 32 * 2**20  # bytes of L2, where the device does not tell


class Whole(Backend):
    """The products of a whole layer; it tells backward nothing."""

    def takes(self, operation: Operation, x: Tensor) -> bool:
        """Return whether X is on a device; on a CPU only where Triton is asked for by name."""
        where = x.device.type
        return where not in ("cpu", "meta") or (where == "cpu" and kernels() == "triton")

    def forward(
        self, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, None]:
        work = work_for(operation.rule, operation.weight, operation.factors)
        if dropped is None:
            return F.linear(x, work.effective(x.dtype), bias), None
        y = F.linear(x, work.frozen(x.dtype), bias)
        return y.addmm_(dropped, work.delta(x.dtype).t()), None

    def backward(
        self, operation: Operation, told: Any, dy: Tensor, x: Tensor, kept: Tensor | None, needs: Needs
    ) -> Gradients:
        work = work_for(operation.rule, operation.weight, operation.factors)
        dy, x, scale = dy.to(operation.dtype), x.to(operation.dtype), operation.keep_scale
        d_x = None
        if needs.x and kept is None:
            d_x = torch.mm(dy, work.effective(dy.dtype))
        elif needs.x and kept is not None:
            d_x = torch.mm(dy, work.delta(dy.dtype)).mul_(kept)
            d_x.addmm_(dy, work.frozen(dy.dtype), beta=scale)
        grads = work.rule.empty_grads(work.factors, needs.params)
        if any(needs.params):
            _reduce(work, dy, x if kept is None else x * kept, grads)
        if kept is not None:
            grads = [grad if grad is None else grad.mul_(scale) for grad in grads]
        return d_x, grads


def _reduce(work: Work, dy: Tensor, x: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Write dθ into `grads`: G a chunk of columns at a time, in the dtype of x (T, n)."""
    m, n = work.weight.shape
    step = gradient_step(m, n, x.dtype.itemsize, x.device)
    several = not 0 < n <= step
    for grad in grads:
        if several and grad is not None:
            grad.zero_()
    for cols in slices(n, step):
        gradient = workspace("gradient", (m, cols.stop - cols.start), x.dtype, x.device)
        torch.mm(dy.t(), x[:, cols], out=gradient)
        work.reduce(cols, gradient, grads, accumulate=several)


def gradient_step(m: int, n: int, itemsize: int, device: torch.device) -> int:
    """Return how many columns a chunk of G has: even chunks of at most half the L2 cache, in whole units."""
    if m * n == 0:
        return max(n, 1)
    chunks = -(-m * n * itemsize // (cache_bytes(device) // 2))
    return min(n, -(-n // chunks // COLUMN_UNIT) * COLUMN_UNIT)


@cache
def cache_bytes(device: torch.device) -> int:
    """Return the size of a device's L2 cache."""
    if device.type != "cuda":
        return USUAL_CACHE
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or USUAL_CACHE


# ---- The element-wise work around the products, for a whole layer: W_eff or W′ from W, and what G does to the
# gradients.
#
# Work is plain torch and knows every rule. TritonWork does the same for SPP in one pass each; Work is its twin, which
# the tests compare it with.

SCRATCH_ELEMENTS = 2**24  # of a block of rows: 64 MB of float32, and few enough launches a layer


class Work:
    """The work of one call of one layer, a block of rows at a time; `factors` are from the rule's `prepare`."""

    def __init__(self, rule: Rule, weight: Weight, factors: Any) -> None:
        self.rule, self.weight, self.factors = rule, weight, factors

    def frozen(self, dtype: torch.dtype) -> Tensor:
        """Return W (m, n) in `dtype`, where it has another in the workspace "effective"."""
        block = self.weight.block(WHOLE, WHOLE)
        return block if block.dtype == dtype else self._out(dtype).copy_(block)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """Return W_eff (m, n), rounded to W's dtype and then to `dtype`, in the workspace "effective"."""
        out = self._out(dtype)
        for rows, scratch in self._blocks():
            block = self.weight.block(rows, WHOLE)
            rounded = None if scratch.dtype == block.dtype else self._scratch("rounded", scratch.shape, block.dtype)
            out[rows] = effective_block(self.rule, block, self.factors, rows, WHOLE, scratch, rounded=rounded)
        return out

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return W′ = W_eff − W (m, n), rounded once to `dtype`, in the workspace "effective"."""
        out = self._out(dtype)
        for rows, scratch in self._blocks():
            self.rule.delta(self.weight.block(rows, WHOLE), self.factors, rows, WHOLE, scratch)
            out[rows] = scratch
        return out

    def reduce(self, cols: slice, gradient: Tensor, grads: Sequence[Tensor | None], *, accumulate: bool) -> None:
        """Write what G[:, cols] adds to the parameters' gradients into `grads`.

        Args:
            gradient: G[:, cols] contiguous, in the dtype of the product; it may be overwritten.
            grads: from the rule's `empty_grads`; zeroed before, if `accumulate`.
        """
        arithmetic = arithmetic_dtype(self.weight.dtype)
        if gradient.dtype != arithmetic:
            gradient = self._scratch("gradient", gradient.shape, arithmetic).copy_(gradient)
        weight = self.weight.block(WHOLE, cols)
        self.rule.reduce(weight, self.factors, WHOLE, cols, gradient, grads, accumulate=accumulate)

    def _blocks(self) -> Sequence[tuple[slice, Tensor]]:
        m, n = self.weight.shape
        alignment = self.rule.row_alignment(self.factors)
        step = max(1, SCRATCH_ELEMENTS // max(n, 1))
        step = step - step % alignment if step >= alignment else step
        arithmetic = arithmetic_dtype(self.weight.dtype)
        return [(rows, self._scratch("scratch", (rows.stop - rows.start, n), arithmetic)) for rows in slices(m, step)]

    def _scratch(self, tag: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return workspace(tag, tuple(shape), dtype, self.weight.device)

    def _out(self, dtype: torch.dtype) -> Tensor:
        return self._scratch("effective", self.weight.shape, dtype)


class TritonWork(Work):
    """Triton's kernels, for SPP in float32 arithmetic; a packed W is decoded inside of them."""

    def effective(self, dtype: torch.dtype) -> Tensor:
        from spp.kernels.triton import build

        out = self._out(dtype)
        build(self._weight(), self.factors, out)
        return out

    def delta(self, dtype: torch.dtype) -> Tensor:
        from spp.kernels.triton import delta

        out = self._out(dtype)
        delta(self._weight(), self.factors, out)
        return out

    def reduce(self, cols: slice, gradient: Tensor, grads: Sequence[Tensor | None], *, accumulate: bool) -> None:
        from spp.kernels.triton import reduce

        reduce(self._weight(), self.factors, cols, gradient, grads, accumulate=accumulate)

    def _weight(self) -> Tensor | PackedWeight:
        return self.weight if isinstance(self.weight, PackedWeight) else self.weight.block(WHOLE, WHOLE)


def work_for(rule: Rule, weight: Weight, factors: Any) -> Work:
    """Return who does the work for a layer; see spp.kernels.choice."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in weight.tensors())  # no stand-in, no shard
    kind = TritonWork if plain and by_triton(weight.device, weight.dtype, rule.name) else Work
    return kind(rule, weight, factors)
