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
from torch import Tensor

from spp.rules.base import Grads, Params, Rule

GROUP_ROWS = 16  # on average; blocks of fewer rows are not worth an operation each


def row_groups(out_features: int, r: int, device: torch.device | str | None = None) -> Tensor:
    """Return g(i) for each of the m rows, int64 (m,): which row of W_α scales it."""
    i = torch.arange(out_features, device=device)
    return ((i + 1) * r - 1) // out_features


@dataclass
class Factors:
    """The operands of one call: α (r, n), t = s·β (m, 1), β (m, 1), and m / r where r divides m, else 0."""

    alpha: Tensor
    scaled_beta: Tensor
    beta: Tensor
    scaling: float
    group_rows: int


class SPPRule(Rule):
    """The rule of the SPP paper."""

    name: ClassVar[str] = "spp"
    parameter_names: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def shapes(self, out_features: int, in_features: int, r: int) -> tuple[tuple[int, int], ...]:
        return (r, in_features), (out_features, 1)

    def largest_rank(self, out_features: int, in_features: int) -> int:
        return out_features

    def prepare(self, params: Params, scaling: float, out_features: int, dtype: torch.dtype) -> Factors:
        alpha, beta = (p.detach().to(dtype) for p in params)
        r = alpha.shape[0]
        return Factors(
            alpha=alpha,
            scaled_beta=beta * scaling,
            beta=beta,
            scaling=scaling,
            group_rows=0 if out_features % r else out_features // r,
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
        grads: Grads,
        *,
        accumulate: bool,
    ) -> None:
        d_alpha, d_beta = grads
        h_block = gradient.mul_(weight)  # (rows, cols)
        old = 1.0 if accumulate else 0.0
        for piece in _pieces(factors, rows, len(h_block)):
            h, here = h_block[piece.local], piece.rows
            scaled, size, count = factors.scaled_beta[here], piece.size, piece.stop - piece.start
            if piece.groups is None:
                h3 = h.view(count, size, h.shape[1])
                if d_alpha is not None:
                    target = d_alpha[piece.start : piece.stop, cols].unsqueeze(1)  # (groups, 1, cols)
                    target.baddbmm_(scaled.view(count, 1, size), h3, beta=old if piece.whole else 1.0)
                if d_beta is not None:
                    target = d_beta[here].view(count, size, 1)
                    alpha = factors.alpha[piece.start : piece.stop, cols].unsqueeze(2)
                    target.baddbmm_(h3, alpha, beta=old, alpha=factors.scaling)
                continue
            if d_alpha is not None:
                spread = torch.zeros(len(h), count, dtype=h.dtype, device=h.device)
                spread.scatter_(1, piece.groups.unsqueeze(1), scaled)  # (rows, r): s·β in its group's column
                d_alpha[:, cols].addmm_(spread.t(), h, beta=old)
            if d_beta is not None:
                products = h @ factors.alpha[:, cols].t()  # (rows, r)
                part = products.gather(1, piece.groups.unsqueeze(1)).mul_(factors.scaling)
                d_beta[here] = d_beta[here] + part if accumulate else part

    def largest_factor(self, factors: Factors) -> float:
        if not factors.alpha.numel():  # no inputs
            return 0.0
        largest = (float(torch.linalg.vector_norm(t, math.inf)) for t in (factors.scaled_beta, factors.alpha))
        return math.prod(largest)

    def is_idle(self, params: Params, scaling: float) -> bool:
        alpha, beta = params
        if not scaling or not bool(beta.any()):
            return True
        rows = row_groups(beta.shape[-2], alpha.shape[-2], alpha.device)
        return not bool(((beta != 0).squeeze(-1) & (alpha != 0).any(-1)[..., rows]).any())

    def row_alignment(self, factors: Factors) -> int:
        return max(1, factors.group_rows)

    def change(self, weight: Tensor, params: Params) -> Tensor:
        alpha, beta = params
        return weight * alpha[row_groups(len(weight), len(alpha), alpha.device)] * beta


def _write_update(factors: Factors, rows: slice, cols: slice, out: Tensor) -> None:
    """Write u = (s·β) · A for a block into `out`: the relative change of each weight."""
    alpha = factors.alpha[:, cols]
    for piece in _pieces(factors, rows, len(out)):
        scaled, target = factors.scaled_beta[piece.rows], out[piece.local]
        if piece.groups is None:
            shape = (piece.stop - piece.start, piece.size)
            chosen = alpha[piece.start : piece.stop].unsqueeze(1)  # (groups, 1, cols)
            torch.mul(scaled.view(*shape, 1), chosen, out=target.view(*shape, out.shape[1]))
        else:
            torch.mul(alpha.index_select(0, piece.groups), scaled, out=target)


@dataclass
class _Piece:
    """Rows of a block that one operation covers: those of the groups [start, stop), `size` rows each.

    Attributes:
        local, rows: their places in the block, and in the layer.
        whole: whether they are all rows of their groups.
        groups: g(i) of each, where the groups are small and not of one size; then [start, stop) is [0, r).
    """

    local: slice
    rows: slice
    start: int
    stop: int
    size: int
    whole: bool
    groups: Tensor | None = None


def _pieces(factors: Factors, rows: slice, count: int) -> list[_Piece]:
    """Return a block of `count` rows in as few pieces as can be."""
    first, size = rows.start or 0, factors.group_rows
    everything, last = slice(0, count), first + count
    if size and first % size == 0 and count % size == 0:
        return [_Piece(everything, slice(first, last), first // size, last // size, size, True)]
    m, r = len(factors.beta), len(factors.alpha)
    if m < GROUP_ROWS * r:
        groups = row_groups(m, r, factors.alpha.device)[first:last]
        return [_Piece(everything, slice(first, last), 0, r, 0, False, groups)]
    pieces = []
    for k in range(((first + 1) * r - 1) // m, (last * r - 1) // m + 1 if count else 0):
        begin, end = k * m // r, (k + 1) * m // r
        start, stop = max(begin, first), min(end, last)
        whole = start == begin and stop == end
        pieces.append(_Piece(slice(start - first, stop - first), slice(start, stop), k, k + 1, stop - start, whole))
    return pieces
