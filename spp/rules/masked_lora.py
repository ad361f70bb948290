"""Masked LoRA: a low-rank summand that is held to the mask of the frozen weight (SQFT's SparsePEFT, arXiv 2410.03750).

    W_eff = W + U ⊙ M,  U = s·B A,  M = [W ≠ 0]      A (r, n), B (m, r): LoRA's parameters, LoRA's s = alpha / r
    H     = M ⊙ G

M is read from W's bits. LoRA that is masked only once it is trained deploys another function than it learned; here the
mask is there in every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.patterns import nonzero_mask
from spp.rules.low_rank import LowRankFactors, LowRankRule


class MaskedLoRARule(LowRankRule):
    """W plus s·B A where W is not zero."""

    name: ClassVar[str] = "masked_lora"
    multiplies: ClassVar[bool] = False

    def build(self, weight: Tensor, factors: LowRankFactors, rows: slice, cols: slice, out: Tensor) -> None:
        self.delta(weight, factors, rows, cols, out)
        out.add_(weight)

    def delta(self, weight: Tensor, factors: LowRankFactors, rows: slice, cols: slice, out: Tensor) -> None:
        self.update(factors, rows, cols, out)
        out.mul_(_mask(weight, out.dtype))

    def gate(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.mul_(_mask(weight, gradient.dtype))

    def largest_factor(self, factors: LowRankFactors) -> float:
        largest = self.bound(factors)
        return math.inf if largest > 0 else largest  # relative to a W that can be as small as it likes

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
        return F.linear(x, weight, bias) + scaling * F.linear(branch, (b @ a) * nonzero_mask(weight))


def _mask(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return M in the arithmetic's dtype: a CPU multiplies by floats several times faster than by bools."""
    return nonzero_mask(weight).to(dtype)
