"""PST by its plain formula, differentiated by autograd: the oracle, written without spp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, pruned: int, pattern: tuple[int, int] | None) -> Tensor:
        """Take the lowest one after the other, leaving out those of a group that has lost all it may."""
        flat = scores.flatten().tolist()
        kept, group = pattern or (0, len(flat))
        lost = [0] * (len(flat) // group if flat else 0)
        mask = torch.ones(len(flat), dtype=scores.dtype)
        for index in sorted(range(len(flat)), key=lambda i: (flat[i], -i)):  # of equals the later index goes first
            if pruned and lost[index // group] < group - kept:
                lost[index // group] += 1
                mask[index] = 0.0
                pruned -= 1
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def plain_weight(
    w: Tensor,
    factors: list[Tensor],
    scales: tuple[float, float, float],
    pruned: int,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    u, v, a, b, r, c = factors
    updated = w + scales[0] * u @ v
    scores = updated.abs() + scales[1] * a @ b + scales[2] * (r.unsqueeze(1) + c.unsqueeze(0))
    mask: Any = StraightThrough.apply(scores, pruned, pattern)
    return mask * updated
