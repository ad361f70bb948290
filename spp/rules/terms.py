"""Several adapters on one weight: the sum of their terms, in one effective weight.

    W_eff = W · (1 + Σ_t u_t),    u_t what the t-th adapter alone multiplies W by, less 1: for SPP (s_t·β_t) · A_t
    W_eff = W + Σ_t d_t           for a rule that does not multiply W (masked LoRA), d_t what the t-th one adds to it

Each u_t or d_t is rounded as it is in the adapter's own rule, and they are added in order; one term gives the bits of
that rule. A zero of W is a zero of W_eff, whatever the terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spp.errors import ConfigError, arg
from spp.rules.base import Grads, Params, Rule


@dataclass(frozen=True)
class TermFactors:
    """One call's factors of each term."""

    terms: tuple[object, ...]
    one: Tensor  # 1 in the arithmetic's dtype: a rule applied to it gives 1 + u, or u


@dataclass(frozen=True)
class TermsRule(Rule):
    """A sum of terms of one rule, whose parameters are concatenated, term after term.

    A call's scaling multiplies those of all terms.
    """

    name: ClassVar[str] = "terms"
    rule: Rule
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]

    @property
    def parameter_names(self) -> tuple[str, ...]:  # type: ignore[override]  # an instance's, by the number of terms
        """Names such as "alpha[0]", "beta[0]", "alpha[1]", …"""
        return tuple(f"{name}[{t}]" for t in range(len(self.ranks)) for name in self.rule.parameter_names)

    def split(self, params: Params) -> list[Params]:
        """Return the parameters of each term."""
        count = len(self.rule.parameter_names)
        return [params[t * count : (t + 1) * count] for t in range(len(self.ranks))]

    def shapes(self, out_features: int, in_features: int, r: int) -> tuple[tuple[int, int], ...]:
        if r != sum(self.ranks):
            raise ConfigError(f"r = {r} for terms of ranks {self.ranks}: it must be their sum, {sum(self.ranks)}")
        return tuple(shape for rank in self.ranks for shape in self.rule.shapes(out_features, in_features, rank))

    def rank(self, params: Params) -> int:
        return sum(self.rule.rank(part) for part in self.split(params))

    def largest_rank(self, out_features: int, in_features: int) -> int:
        return len(self.ranks) * self.rule.largest_rank(out_features, in_features)

    def check_rank(
        self, out_features: int, in_features: int, r: int, where: str, remedy: str = f"lower {arg('r')}"
    ) -> None:
        for rank in self.ranks:
            self.rule.check_rank(out_features, in_features, rank, where, remedy)

    def init_(self, params: Params, generator: torch.Generator | None) -> None:
        for part in self.split(params):
            self.rule.init_(part, generator)

    def prepare(self, params: Params, scaling: float, out_features: int, dtype: torch.dtype) -> TermFactors:
        terms = tuple(
            self.rule.prepare(part, scaling * s, out_features, dtype)
            for part, s in zip(self.split(params), self.scalings, strict=True)
        )
        return TermFactors(terms, torch.ones((), dtype=dtype, device=params[0].device))

    def build(self, weight: Tensor, factors: TermFactors, rows: slice, cols: slice, out: Tensor) -> None:
        if self.rule.multiplies:
            self._sum(factors.one, factors, rows, cols, out)
            out.add_(1.0)
            out.mul_(weight)
        else:
            self._sum(weight, factors, rows, cols, out)
            out.add_(weight)

    def delta(self, weight: Tensor, factors: TermFactors, rows: slice, cols: slice, out: Tensor) -> None:
        if self.rule.multiplies:
            self._sum(factors.one, factors, rows, cols, out)
            out.mul_(weight)
        else:
            self._sum(weight, factors, rows, cols, out)

    def empty_grads(self, factors: TermFactors, needed: Sequence[bool]) -> list[Tensor | None]:
        count = len(self.rule.parameter_names)
        return [
            grad
            for t, term in enumerate(factors.terms)
            for grad in self.rule.empty_grads(term, needed[t * count : (t + 1) * count])
        ]

    def reduce(
        self,
        weight: Tensor,
        factors: TermFactors,
        rows: slice,
        cols: slice,
        gradient: Tensor,
        grads: Grads,
        *,
        accumulate: bool,
    ) -> None:
        count = len(self.rule.parameter_names)
        if self.rule.multiplies:
            gradient, weight = gradient.mul_(weight), factors.one  # each term reduces it against a weight of 1
        for t, term in enumerate(factors.terms):
            part = grads[t * count : (t + 1) * count]
            own = gradient if self.rule.multiplies else gradient.clone()  # (rows, cols)
            self.rule.reduce(weight, term, rows, cols, own, part, accumulate=accumulate)

    def largest_factor(self, factors: TermFactors) -> float:
        return sum(self.rule.largest_factor(term) for term in factors.terms)

    def is_idle(self, params: Params, scaling: float) -> bool:
        parts = zip(self.split(params), self.scalings, strict=True)
        return all(self.rule.is_idle(part, scaling * s) for part, s in parts)

    def dropped_params(self, count: int) -> Sequence[int]:
        return range(0, count, len(self.rule.parameter_names))

    def row_alignment(self, factors: TermFactors) -> int:
        return max(self.rule.row_alignment(term) for term in factors.terms)

    def change(self, weight: Tensor, params: Params) -> Tensor:
        parts = zip(self.split(params), self.scalings, strict=True)
        return torch.stack([s * self.rule.change(weight, part) for part, s in parts]).sum(0)

    def _sum(self, weight: Tensor, factors: TermFactors, rows: slice, cols: slice, out: Tensor) -> None:
        """Write the sum of what each term adds to `weight` into `out`."""
        first, *others = factors.terms
        self.rule.delta(weight, first, rows, cols, out)
        for term in others:
            update = torch.empty_like(out)
            self.rule.delta(weight, term, rows, cols, update)
            out.add_(update)
