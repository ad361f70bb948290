"""Shared by rules with two low-rank factors: U = s·B A, in one order of operations that no block changes.

    A (r, n) drawn, B (m, r) zeros, s the scaling
    U     = Σ_k t_k ⊗ A_k,  t = s·B                  k in order, each product and each sum rounded: no matrix product,
                                                     whose order of summation hangs on the shape of the block
    dB    = s · H Aᵀ       dA = s · Bᵀ H             H (m, n), what the rule makes of G: an ordinary matrix product

A rule says how U changes W. It takes 2 r passes over a block, which is why they are taken over a few rows at a time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spp.masks.patterns import nonzero_mask
from spp.rules.base import Grads, Params, Rule

_PASS_ELEMENTS = 1 << 18  # of U at a time: with the scratch of its size it stays in a cache; fewer cost more in calls


@dataclass
class LowRankFactors:
    """The operands of one call: A (r, n), t = s·B (m, r), B (m, r)."""

    a: Tensor
    scaled_b: Tensor
    b: Tensor
    scaling: float


class LowRankRule(Rule):
    """The arithmetic of U = s·B A; subclasses say what W_eff is and what H is."""

    parameter_names: ClassVar[tuple[str, ...]] = ("A", "B")

    @abstractmethod
    def gate(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return H from W and G of a block, in place."""

    def shapes(self, out_features: int, in_features: int, r: int) -> tuple[tuple[int, int], ...]:
        return (r, in_features), (out_features, r)

    def largest_rank(self, out_features: int, in_features: int) -> int:
        return min(out_features, in_features)

    def prepare(self, params: Params, scaling: float, out_features: int, dtype: torch.dtype) -> LowRankFactors:
        a, b = (p.detach().to(dtype) for p in params)
        return LowRankFactors(a=a, scaled_b=b * scaling, b=b, scaling=scaling)

    def update(self, factors: LowRankFactors, rows: slice, cols: slice, out: Tensor) -> None:
        """Write U[rows, cols] into `out`."""
        a, t = factors.a[:, cols], factors.scaled_b[rows]  # (r, cols), (rows, r)
        step = max(1, _PASS_ELEMENTS // max(1, out.shape[1]))
        scratch = torch.empty_like(out[:step])
        for start in range(0, len(out), step):
            part, factor = out[start : start + step], t[start : start + step]
            torch.mul(factor[:, :1], a[:1], out=part)
            for k in range(1, len(a)):
                part.add_(torch.mul(factor[:, k : k + 1], a[k : k + 1], out=scratch[: len(part)]))

    def empty_grads(self, factors: LowRankFactors, needed: Sequence[bool]) -> list[Tensor | None]:
        pairs = zip((factors.a, factors.b), needed, strict=True)
        return [torch.empty_like(like) if wanted else None for like, wanted in pairs]

    def reduce(
        self,
        weight: Tensor,
        factors: LowRankFactors,
        rows: slice,
        cols: slice,
        gradient: Tensor,
        grads: Grads,
        *,
        accumulate: bool,
    ) -> None:
        d_a, d_b = grads
        h = self.gate(weight, gradient)  # (rows, cols)
        old = 1.0 if accumulate else 0.0
        if d_a is not None:
            d_a[:, cols].addmm_(factors.scaled_b[rows].t(), h, beta=old)
        if d_b is not None:
            d_b[rows].addmm_(h, factors.a[:, cols].t(), beta=old, alpha=factors.scaling)

    def bound(self, factors: LowRankFactors) -> float:
        """Return an upper bound of |U|: max_i Σ_k |t_ik| · max_j |A_kj|."""
        if not factors.a.numel() or not factors.b.numel():
            return 0.0
        return float((factors.scaled_b.abs() @ factors.a.abs().amax(1)).amax())

    def is_idle(self, params: Params, scaling: float) -> bool:
        a, b = params
        if not scaling or not bool(b.any()):
            return True
        return not bool(((b != 0).any(-2) & (a != 0).any(-1)).any())


# ---- Masked LoRA: a low-rank summand that is held to the mask of the frozen weight (SQFT's SparsePEFT, arXiv
# 2410.03750).
#
#     W_eff = W + U ⊙ M,  U = s·B A,  M = [W ≠ 0]      A (r, n), B (m, r): LoRA's parameters, LoRA's s = alpha / r
#     H     = M ⊙ G
#
# M is read from W's bits. LoRA that is masked only once it is trained deploys another function than it learned; here
# the mask is there in every step.


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

    def change(self, weight: Tensor, params: Params) -> Tensor:
        a, b = params
        return (b @ a) * nonzero_mask(weight)


def _mask(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return M in the arithmetic's dtype: a CPU multiplies by floats several times faster than by bools."""
    return nonzero_mask(weight).to(dtype)


# ---- HiRA's form: a frozen sparse weight, scaled element-wise by a low-rank matrix (HiRA, ICLR 2025, §3).
#
#     W_eff = W · (1 + U),  U = s·B A                  A (r, n), B (m, r): r·(n + m) parameters, SPP's are r·n + m
#     H     = W ⊙ G
#
# A zero of W is a zero of W_eff. PEFT's HiRA is the same formula with s = 1 and its branches kept apart.


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

    def change(self, weight: Tensor, params: Params) -> Tensor:
        a, b = params
        return weight * (b @ a)
