"""PST as its formula stands, left to autograd: scores and mask in full, a sort, an m × n gradient for each of them.

    W' = W + b·U V        S = |W'| + a₁·A B + a₂·(R ⊕ C)        Y = X (mask(S) ⊙ W')ᵀ + bias

It takes the parameters of PST layers, and gives their outputs and gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp.inject_guards import replace_modules
from spp.pst import PSTLinear, pst_layers


class PlainPST(nn.Module):
    """A PST layer by the plain formula.

    Args:
        layer: whose parameters are used, and whose sparsity holds; with a pattern, at the pattern's own sparsity.
    """

    def __init__(self, layer: PSTLinear) -> None:
        super().__init__()
        self._parameters["weight"] = layer._parameters["weight"]
        self.register_parameter("bias", layer.bias)
        self.factors = nn.ParameterList(layer.factors())
        self.scales = layer.weight_scale, layer.low_rank_scale, layer.structured_scale
        self.group = None if layer.pattern is None else layer.pattern.group
        rows = 1 if self.group is None else layer.weight.numel() // self.group
        self.pruned = layer.pruned // rows

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, m) for (…, n)."""
        u, v, a, b, r, c = self.factors
        updated = self.weight + self.scales[0] * u @ v
        scores = updated.abs() + self.scales[1] * a @ b + self.scales[2] * (r.unsqueeze(1) + c.unsqueeze(0))
        mask: Any = _StraightThrough.apply(scores, self.pruned, self.group)
        return F.linear(x, mask * updated, self._parameters["bias"])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, pruned: int, group: int | None) -> Tensor:
        rows = scores.reshape(1, -1) if group is None else scores.reshape(-1, group)
        return torch.ones_like(rows).scatter_(1, rows.argsort(dim=1)[:, :pruned], 0.0).view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def use_plain_formula(model: nn.Module) -> nn.Module:
    """Replace the PST layers of a wrapped model by the plain formula, in place."""
    replace_modules(model, {id(layer): PlainPST(layer) for layer in pst_layers(model).values()})
    return model
