"""HiRA's form: a frozen sparse weight, scaled element-wise by a low-rank matrix (HiRA, ICLR 2025, §3).

    W_eff = W · (1 + U),  U = s·B A                  A (r, n), B (m, r): r·(n + m) parameters, SPP's are r·n + m
    H     = W ⊙ G

A zero of W is a zero of W_eff. PEFT's HiRA is the same formula with s = 1 and its branches kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from spp.rules.low_rank import LowRankFactors, LowRankRule


class HiRARule(LowRankRule):
    """W scaled by 1 + s·B A."""

    name: ClassVar[str] = "hira"

    def build(self, weight: Tensor, factors: LowRankFactors, rows: slice, cols: slice, out: Tensor) -> None:
        self.update(factors, rows, cols, out)
        out.add_(1.0)
        out.mul_(weight)

    def delta(self, weight: Tensor, factors: LowRankFactors, rows: slice, cols: slice, out: Tensor) -> None:
        self.update(factors, rows, cols, out)
        out.mul_(weight)

    def gate(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.mul_(weight)

    def largest_factor(self, factors: LowRankFactors) -> float:
        return self.bound(factors)

    def oracle(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        params: Sequence[Tensor],
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        a, b = params
        branch = x if mask is None else x * mask
        return F.linear(x, weight, bias) + scaling * F.linear(branch, weight * (b @ a))
