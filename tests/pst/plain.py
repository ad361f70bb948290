"""PST by its plain formula, differentiated by autograd: the oracle, written without spp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, pruned: int, group: int | None) -> Tensor:
        rows = scores.reshape(1, -1) if group is None else scores.reshape(-1, group)
        order = torch.argsort(rows.flip(1), dim=1, stable=True)[:, :pruned]  # of equals the later index goes first
        mask = torch.ones_like(rows).flip(1).scatter(1, order, 0.0).flip(1)
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def plain_weight(
    w: Tensor, factors: list[Tensor], scales: tuple[float, float, float], pruned: int, group: int | None = None
) -> Tensor:
    u, v, a, b, r, c = factors
    updated = w + scales[0] * u @ v
    scores = updated.abs() + scales[1] * a @ b + scales[2] * (r.unsqueeze(1) + c.unsqueeze(0))
    mask: Any = StraightThrough.apply(scores, pruned, group)
    return mask * updated
