"""One adapter of one weight: a rule, its parameters, and how they are scaled and dropped.

W_eff = rule(W, θ, s)        for SPP  W ⊙ (1 + s·β·A)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.rules.base import Rule
from spp.rules.canonical import WHOLE, arithmetic_dtype, effective_block


class Adapter(NamedTuple):
    """A rule with its parameters, scaling and dropout: the change of W.

    Attributes:
        rule: how.
        params: θ, in the rule's order; those of E experts have a leading dimension.
        scaling: s.
        dropout: probability of dropping an entry, in training.
        dropout_mode: "input" drops entries of X in the residual branch, "alpha" entries of the rule's first factor.
    """

    rule: Rule
    params: Sequence[Tensor]
    scaling: float
    dropout: float = 0.0
    dropout_mode: str = "input"

    def for_call(self, training: bool) -> Adapter:
        """Return the adapter of one forward: alpha dropout is drawn here, input dropout is left to the products.

        Args:
            training: whether the layer trains; elsewhere nothing is dropped.
        """
        if not self.dropout:
            return self
        if not training:
            return self._replace(dropout=0.0)
        if self.dropout_mode == "input":
            return self
        dropped = self.rule.dropped_params(len(self.params))
        params = tuple(F.dropout(p, self.dropout) if i in dropped else p for i, p in enumerate(self.params))
        return self._replace(params=params, dropout=0.0)

    def experts(self) -> list[Adapter]:
        """Return the adapter of each expert, whose parameters are views."""
        return [self._replace(params=params) for params in zip(*(p.unbind(0) for p in self.params), strict=True)]

    def is_idle(self) -> bool:
        """Return whether W_eff is W."""
        return self.rule.is_idle(self.params, self.scaling)

    def factors(self, out_features: int, dtype: torch.dtype) -> Any:
        """Return what the rule shares between the blocks of a weight of `dtype` with `out_features` rows."""
        return self.rule.prepare(self.params, self.scaling, out_features, arithmetic_dtype(dtype))

    def on(self, device: torch.device | None) -> Adapter:
        """Return the adapter with its parameters detached, on a device; None leaves them where they are."""
        return self._replace(params=tuple(p.detach().to(device or p.device) for p in self.params))


@torch.no_grad()
def effective_weight(weight: Tensor, adapter: Adapter) -> Tensor:
    """Return W_eff (m, n) in the dtype of `weight`, as a new tensor: what the forward multiplies by and a merge stores.

    Args:
        weight: W (m, n).
        adapter: of one matrix; its dropout drops nothing here.
    """
    factors = adapter.factors(weight.shape[0], weight.dtype)
    scratch = torch.empty(weight.shape, dtype=arithmetic_dtype(weight.dtype), device=weight.device)
    return effective_block(adapter.rule, weight, factors, WHOLE, WHOLE, scratch)
