"""All kept weights: an update of W that has a value of its own for every weight that is not zero.

    W_eff = W + s·(M ⊙ D)        D (m, n) zeros, M = [W ≠ 0]
    dD    = s·(M ⊙ G)

D is zero wherever W is: its gradient there is zero, so AdamW leaves it there, and M keeps out what a file may hold.
This is the masked full fine-tuning that low-rank updates are measured against, as an adapter: it trains the most, costs
a gradient and two moments for each weight, and its file is as large as the weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spp.masks.patterns import BITS, nonzero_mask
from spp.rules.base import Grads, Params, Rule

_PASS_ELEMENTS = 1 << 16  # of W, D and W_eff at a time: with the scratch they stay in a cache


@dataclass
class FullFactors:
    """The operands of one call: D (m, n) and s."""

    d: Tensor
    scaling: float


class FullRule(Rule):
    """W plus s·D where W is not zero."""

    name: ClassVar[str] = "full"
    parameter_names: ClassVar[tuple[str, ...]] = ("D",)
    multiplies: ClassVar[bool] = False

    def shapes(self, out_features: int, in_features: int, r: int) -> tuple[tuple[int, int], ...]:
        return ((out_features, in_features),)

    def rank(self, params: Params) -> int:
        return 1  # there is none: SPPConfig writes 1

    def largest_rank(self, out_features: int, in_features: int) -> int:
        return 1

    def init_(self, params: Params, generator: torch.Generator | None) -> None:
        torch.nn.init.zeros_(params[0])

    def prepare(self, params: Params, scaling: float, out_features: int, dtype: torch.dtype) -> FullFactors:
        return FullFactors(params[0].detach().to(dtype), scaling)

    def build(self, weight: Tensor, factors: FullFactors, rows: slice, cols: slice, out: Tensor) -> None:
        torch.addcmul(weight, factors.d[rows, cols], _mask(weight, out), value=factors.scaling, out=out)

    def delta(self, weight: Tensor, factors: FullFactors, rows: slice, cols: slice, out: Tensor) -> None:
        torch.mul(factors.d[rows, cols], factors.scaling, out=out)
        out.mul_(_mask(weight, out))

    def empty_grads(self, factors: FullFactors, needed: Sequence[bool]) -> list[Tensor | None]:
        return [torch.empty_like(factors.d) if needed[0] else None]

    def reduce(
        self,
        weight: Tensor,
        factors: FullFactors,
        rows: slice,
        cols: slice,
        gradient: Tensor,
        grads: Grads,
        *,
        accumulate: bool,
    ) -> None:
        (d_d,) = grads
        if d_d is None:
            return
        into, step = d_d[rows, cols], self.rows_at_once(weight)
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            found = gradient[part].mul_(_mask(weight[part], gradient))
            if accumulate:
                into[part].add_(found, alpha=factors.scaling)
            else:
                torch.mul(found, factors.scaling, out=into[part])

    def largest_factor(self, factors: FullFactors) -> float:
        return math.inf  # relative to a W that can be as small as it likes

    def bound(self, factors: FullFactors) -> float:
        """Return an upper bound of |W_eff − W|: s·max |D|."""
        return abs(factors.scaling) * float(factors.d.abs().amax()) if factors.d.numel() else 0.0

    def is_idle(self, params: Params, scaling: float) -> bool:
        return not scaling or not bool(params[0].any())

    def rows_at_once(self, block: Tensor) -> int:
        return max(1, _PASS_ELEMENTS // max(1, block.shape[1])) if block.device.type == "cpu" else max(1, len(block))

    def keeps_all(self, weight: Tensor, result: Tensor) -> bool:
        bits = BITS.get(weight.dtype)
        if bits is None or weight.device.type != "cpu":
            return False
        # The first count is never too high, whatever mode flushes subnormals, and the second never too low.
        left = _mask(result, result.new_empty((), dtype=torch.float32)).sum(dtype=torch.float64)
        return bool(left == torch.count_nonzero(weight.detach().view(bits)))

    def change(self, weight: Tensor, params: Params) -> Tensor:
        return params[0] * nonzero_mask(weight)


def _mask(weight: Tensor, like: Tensor) -> Tensor:
    """Return 1 where W is not zero, in the dtype of `like`; −0 is zero, and so is a subnormal that a mode flushes.

    On a CPU a comparison that writes floats takes a sixth of one that writes bools, and a product by them a fortieth of
    torch.where.
    """
    out = torch.empty(weight.shape, dtype=like.dtype, device=weight.device)
    return torch.ne(weight, 0, out=out)
