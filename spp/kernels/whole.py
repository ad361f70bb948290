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

from spp.kernels.backend import Backend, Gradients, Operation
from spp.kernels.blocks import slices
from spp.kernels.choice import kernels
from spp.kernels.sources import WeightSource
from spp.kernels.work import WHOLE, Work, work_for
from spp.kernels.workspace import workspace

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
        """Return Y (T, m)."""
        return forward(x, dropped, bias, work_for(operation.rule, operation.weight, operation.factors)), None

    def backward(
        self,
        operation: Operation,
        told: Any,
        dy: Tensor,
        x: Tensor,
        kept: Tensor | None,
        needs_x: bool,
        needs_params: Sequence[bool],
    ) -> Gradients:
        """Return dX (T, n) and dθ."""
        work = work_for(operation.rule, operation.weight, operation.factors)
        dy, x, scale = dy.to(operation.dtype), x.to(operation.dtype), operation.keep_scale
        d_x = input_gradient(dy, kept, scale, work) if needs_x else None
        return d_x, parameter_gradients(dy, x, kept, scale, work, needs_params)


def forward(x: Tensor, dropped: Tensor | None, bias: Tensor | None, work: Work) -> Tensor:
    """Return Y (T, m).

    Args:
        x: X (T, n); dropped: X̃ of the same shape, or None without input dropout.
        bias: (m,) or None, in the dtype of x.
    """
    if dropped is None:
        return F.linear(x, work.effective(x.dtype), bias)
    y = F.linear(x, _frozen(work.source, x.dtype), bias)
    return y.addmm_(dropped, work.delta(x.dtype).t())


def input_gradient(dy: Tensor, mask: Tensor | None, keep_scale: float, work: Work) -> Tensor:
    """Return dX (T, n).

    Args:
        dy: dY (T, m); mask: what input dropout kept, bool (T, n), or None; keep_scale: 1 / (1 − p).
    """
    if mask is None:
        return torch.mm(dy, work.effective(dy.dtype))
    d_x = torch.mm(dy, work.delta(dy.dtype)).mul_(mask)
    return d_x.addmm_(dy, _frozen(work.source, dy.dtype), beta=keep_scale)


def parameter_gradients(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    keep_scale: float,
    work: Work,
    needed: Sequence[bool],
) -> list[Any]:
    """Return dθ in the arithmetic's dtype, None where it is not needed; others of the arguments as above.

    Args:
        x: X (T, n), whose dtype G is multiplied in.
    """
    totals = work.rule.empty_grads(work.factors, needed)
    if not any(needed):
        return totals
    m, n = work.source.shape
    if mask is not None:
        x = x * mask
    step = gradient_step(m, n, x.dtype.itemsize, x.device)
    several = not 0 < n <= step
    for total in totals:
        if several and total is not None:
            total.zero_()
    for cols in slices(n, step):
        gradient = workspace("gradient", (m, cols.stop - cols.start), x.dtype, x.device)
        torch.mm(dy.t(), x[:, cols], out=gradient)
        work.reduce(cols, gradient, totals, accumulate=several)
    if mask is not None:
        totals = [total if total is None else total.mul_(keep_scale) for total in totals]
    return totals


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


def _frozen(source: WeightSource, dtype: torch.dtype) -> Tensor:
    weight = source.block(WHOLE, WHOLE)
    if weight.dtype == dtype:
        return weight
    return workspace("effective", source.shape, dtype, source.device).copy_(weight)
