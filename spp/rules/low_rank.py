"""What rules with two low-rank factors share: U = s·B A, in one order of operations that no block changes.

    A (r, n) drawn, B (m, r) zeros, s the scaling
    U     = Σ_k t_k ⊗ A_k,  t = s·B                  k in order, each product and each sum rounded: no matrix product,
                                                     whose order of summation hangs on the shape of the block
    dB    = s · H Aᵀ       dA = s · Bᵀ H             H (m, n), what the rule makes of G: an ordinary matrix product

A rule says how U changes W. It takes 2 r passes over a block, which is why they are taken over a few rows at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.rules.base import Rule
from spp.rules.spp import KAIMING_A

_PASS_ELEMENTS = 1 << 18  # of U at a time: with the scratch of its size it stays in a cache; fewer cost more in calls


@dataclass
class LowRankFactors:
    """What one call needs: A (r, n), t = s·B (m, r), B (m, r)."""

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

    def rank(self, params: Sequence[Tensor]) -> int:
        return params[0].shape[0]

    def check_rank(self, out_features: int, in_features: int, r: int, where: str) -> None:
        if not 1 <= r <= min(out_features, in_features):
            raise ConfigError(
                f"{where}: r = {r} does not fit a weight of shape ({out_features}, {in_features}): r must be between "
                f"1 and {min(out_features, in_features)}; lower r, or give this module its own in rank_pattern"
            )

    def init_(self, params: Sequence[Tensor], init: str, generator: torch.Generator | None) -> None:
        a, b = params
        torch.nn.init.kaiming_uniform_(a, a=KAIMING_A, generator=generator)
        torch.nn.init.zeros_(b)

    def prepare(
        self, params: Sequence[Tensor], scaling: float, out_features: int, dtype: torch.dtype
    ) -> LowRankFactors:
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
        grads: Sequence[Tensor | None],
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

    def is_idle(self, params: Sequence[Tensor], scaling: float) -> bool:
        a, b = params
        if not scaling or not bool(b.any()):
            return True
        return not bool(((b != 0).any(-2) & (a != 0).any(-1)).any())

    def row_alignment(self, factors: LowRankFactors) -> int:
        return 1
