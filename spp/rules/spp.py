"""SPP: a frozen sparse weight, scaled element-wise by two small matrices (Lu et al. 2024, arXiv 2405.16057, §3.2).

    W (m, n) frozen, W_α (r, n), W_β (m, 1), s the scaling
    Y     = X Wᵀ + b + s · Dropout(X) (W ⊙ A ⊙ β)ᵀ,   A[i, :] = W_α[g(i), :]
    g(i)  = the k with ⌊k·m/r⌋ ≤ i < ⌊(k+1)·m/r⌋ = ⌊((i+1)·r − 1) / m⌋       r contiguous blocks of rows
    W_eff = W · (1 + (s·β) · A)                                               in this order, each step rounded
    H     = W ⊙ G, G = dYᵀ X:    dβ_g = s · H_g α_gᵀ (m_g,)    dα_g = s · β_gᵀ H_g (n,)

A zero of W is a zero of W_eff for every finite α and β: that is the method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.errors import ConfigError
from spp.rules.base import Rule

KAIMING_A = math.sqrt(5)  # U(−1/√n, 1/√n), as nn.Linear and the paper initialise


def row_groups(out_features: int, r: int, device: torch.device | str | None = None) -> Tensor:
    """Return g(i) for each of the m rows, int64 (m,): which row of W_α scales it."""
    i = torch.arange(out_features, device=device)
    return ((i + 1) * r - 1) // out_features


@dataclass
class Factors:
    """What one call needs: α (r, n), t = s·β (m, 1), β (m, 1), and g (m,) where the row blocks are not all equal."""

    alpha: Tensor
    scaled_beta: Tensor
    beta: Tensor
    scaling: float
    group_rows: int  # m / r where r divides m, else 0
    groups: Tensor | None


class SPPRule(Rule):
    """The rule of the SPP paper."""

    name: ClassVar[str] = "spp"
    parameter_names: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def shapes(self, out_features: int, in_features: int, r: int) -> tuple[tuple[int, int], ...]:
        return (r, in_features), (out_features, 1)

    def rank(self, params: Sequence[Tensor]) -> int:
        return params[0].shape[0]

    def check_rank(self, out_features: int, in_features: int, r: int, where: str) -> None:
        if not 1 <= r <= out_features:
            raise ConfigError(
                f"{where}: r = {r} does not fit a weight of shape ({out_features}, {in_features}): r must be between "
                f"1 and its {out_features} rows; lower r, or give this module its own in rank_pattern"
            )

    def init_(self, params: Sequence[Tensor], init: str, generator: torch.Generator | None) -> None:
        alpha, beta = params
        torch.nn.init.kaiming_uniform_(alpha, a=KAIMING_A, generator=generator)
        torch.nn.init.zeros_(beta)

    def prepare(self, params: Sequence[Tensor], scaling: float, out_features: int, dtype: torch.dtype) -> Factors:
        alpha, beta = (p.detach().to(dtype) for p in params)
        r = alpha.shape[0]
        even = out_features % r == 0
        return Factors(
            alpha=alpha,
            scaled_beta=beta * scaling,
            beta=beta,
            scaling=scaling,
            group_rows=out_features // r if even else 0,
            groups=None if even else row_groups(out_features, r, alpha.device),
        )

    def build(self, weight: Tensor, factors: Factors, rows: slice, cols: slice, out: Tensor) -> None:
        _write_update(factors, rows, cols, out)
        out.add_(1.0)
        out.mul_(weight)

    def delta(self, weight: Tensor, factors: Factors, rows: slice, cols: slice, out: Tensor) -> None:
        _write_update(factors, rows, cols, out)
        out.mul_(weight)

    def empty_grads(self, factors: Factors, needed: Sequence[bool]) -> list[Tensor | None]:
        pairs = zip((factors.alpha, factors.beta), needed, strict=True)
        return [torch.empty_like(like) if wanted else None for like, wanted in pairs]

    def reduce(
        self,
        weight: Tensor,
        factors: Factors,
        rows: slice,
        cols: slice,
        gradient: Tensor,
        grads: Sequence[Tensor | None],
        *,
        accumulate: bool,
    ) -> None:
        d_alpha, d_beta = grads
        h = gradient.mul_(weight)  # (rows, cols)
        groups, size = _block_groups(factors, rows, h.shape[0])
        scaled, old = factors.scaled_beta[rows], 1.0 if accumulate else 0.0
        if groups is None:  # the block is a whole number of equal groups, or lies inside one
            k0, k1 = _group_range(factors, rows, h.shape[0])
            count = k1 - k0
            h3 = h.view(count, size, h.shape[1])
            if d_alpha is not None:
                target = d_alpha[k0:k1, cols].unsqueeze(1)  # (groups, 1, cols)
                target.baddbmm_(scaled.view(count, 1, size), h3, beta=old)
            if d_beta is not None:
                target = d_beta[rows].view(count, size, 1)
                target.baddbmm_(h3, factors.alpha[k0:k1, cols].unsqueeze(2), beta=old, alpha=factors.scaling)
        else:
            if d_alpha is not None:
                spread = torch.zeros(h.shape[0], d_alpha.shape[0], dtype=h.dtype, device=h.device)
                spread.scatter_(1, groups.unsqueeze(1), scaled)  # (rows, r): s·β in its group's column
                d_alpha[:, cols].addmm_(spread.t(), h, beta=old)
            if d_beta is not None:
                products = h @ factors.alpha[:, cols].t()  # (rows, r)
                part = products.gather(1, groups.unsqueeze(1)).mul_(factors.scaling)
                d_beta[rows] = d_beta[rows] + part if accumulate else part

    def largest_factor(self, factors: Factors) -> float:
        largest = (float(torch.linalg.vector_norm(t, math.inf)) for t in (factors.scaled_beta, factors.alpha))
        return math.prod(largest)

    def row_alignment(self, factors: Factors) -> int:
        return max(1, factors.group_rows)

    def oracle(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        params: Sequence[Tensor],
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        alpha, beta = params
        m, r = weight.shape[0], alpha.shape[0]
        spread = alpha[row_groups(m, r, alpha.device)]  # (m, n)
        branch = x if mask is None else x * mask
        return F.linear(x, weight, bias) + scaling * F.linear(branch, weight * spread * beta)


def _write_update(factors: Factors, rows: slice, cols: slice, out: Tensor) -> None:
    """Write u = (s·β) · A for a block into `out`: the relative change of each weight."""
    groups, size = _block_groups(factors, rows, out.shape[0])
    scaled = factors.scaled_beta[rows]
    alpha = factors.alpha[:, cols]
    if groups is None:
        k0, k1 = _group_range(factors, rows, out.shape[0])
        view = out.view(k1 - k0, size, out.shape[1])
        torch.mul(scaled.view(k1 - k0, size, 1), alpha[k0:k1].unsqueeze(1), out=view)
    else:
        torch.mul(alpha.index_select(0, groups), scaled, out=out)


def _block_groups(factors: Factors, rows: slice, count: int) -> tuple[Tensor | None, int]:
    """Return (None, rows in a group of this block), or (g(i) of the block's rows, 0) where its groups are uneven."""
    size, start = factors.group_rows, rows.start or 0
    if size and start % size == 0 and count % size == 0:
        return None, size
    if size and start // size == (start + count - 1) // size:
        return None, count
    if factors.groups is not None:
        return factors.groups[rows], 0
    return torch.arange(start, start + count, device=factors.alpha.device) // size, 0


def _group_range(factors: Factors, rows: slice, count: int) -> tuple[int, int]:
    """Return [k0, k1): the rows of W_α that a block with even groups needs."""
    start = rows.start or 0
    return start // factors.group_rows, (start + count - 1) // factors.group_rows + 1
