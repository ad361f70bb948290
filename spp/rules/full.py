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

from spp.masks.patterns import nonzero_mask
from spp.rules.base import Grads, Params, Rule, mask_as


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
        self.delta(weight, factors, rows, cols, out)
        out.add_(weight)

    def delta(self, weight: Tensor, factors: FullFactors, rows: slice, cols: slice, out: Tensor) -> None:
        torch.mul(factors.d[rows, cols], factors.scaling, out=out)
        out.mul_(mask_as(weight, out.dtype))

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
        gradient.mul_(mask_as(weight, gradient.dtype)).mul_(factors.scaling)
        if accumulate:
            d_d[rows, cols].add_(gradient)
        else:
            d_d[rows, cols].copy_(gradient)

    def largest_factor(self, factors: FullFactors) -> float:
        return math.inf  # relative to a W that can be as small as it likes

    def bound(self, factors: FullFactors) -> float:
        """Return an upper bound of |W_eff − W|: s·max |D|."""
        return abs(factors.scaling) * float(factors.d.abs().amax()) if factors.d.numel() else 0.0

    def is_idle(self, params: Params, scaling: float) -> bool:
        return not scaling or not bool(params[0].any())

    def change(self, weight: Tensor, params: Params) -> Tensor:
        return params[0] * nonzero_mask(weight)
