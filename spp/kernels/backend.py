"""A backend: one way to compute the products of an adapted layer.

`spp.kernels.linear.linear` asks the backends in their order and takes the first that takes the operation; what it saved
in forward comes back to it in backward. A new backend is one class here and one entry there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spp.rules.base import Rule
from spp.weights.base import Weight

Gradients = tuple[Tensor | None, list[Tensor | None]]


class Needs(NamedTuple):
    """Which gradients a backward is asked for: dX, and each dθ."""

    x: bool
    params: Sequence[bool]


@dataclass(frozen=True)
class Operation:
    """The operation of one call of a layer: X W_effᵀ, and with input dropout X Wᵀ + X̃ (W_eff − W)ᵀ.

    Attributes:
        weight: W (m, n).
        rule: makes W_eff from W.
        factors: from the rule's `prepare`.
        dtype: of X and Y: W_eff is rounded to W's dtype, then to this one.
        dropout: p, with which entries of X are dropped from X̃; the others are divided by 1 − p.
    """

    weight: Weight
    rule: Rule
    factors: Any
    dtype: torch.dtype
    dropout: float

    @cached_property
    def largest_factor(self) -> float:
        """Return an upper bound of |W_eff / W − 1|; NaN but on a CPU, since reading it back would stall a device."""
        return self.rule.largest_factor(self.factors) if self.weight.device.type == "cpu" else math.nan

    @property
    def keep_scale(self) -> float:
        """Return 1 / (1 − p)."""
        return 1.0 / (1.0 - self.dropout)


class Backend(ABC):
    """One way to compute an operation, forward and backward; stateless."""

    @abstractmethod
    def takes(self, operation: Operation, x: Tensor) -> bool:
        """Return whether this backend computes the operation.

        Args:
            x: X (T, n).

        Raises:
            ConfigError: SPP_KERNELS asks for this backend by name, and it cannot.
        """

    @abstractmethod
    def forward(
        self, operation: Operation, x: Tensor, dropped: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Return Y (T, m) in any dtype, and what backward is to be told: no tensor.

        Args:
            x: X (T, n).
            dropped: X̃ (T, n), None without input dropout.
            bias: (m,) or None.
        """

    @abstractmethod
    def backward(
        self, operation: Operation, told: Any, dy: Tensor, x: Tensor, kept: Tensor | None, needs: Needs
    ) -> Gradients:
        """Return dX (T, n) in any dtype, None where it is not needed, and dθ in the arithmetic's dtype, likewise.

        Args:
            told: by forward.
            dy: dY (T, m), in the dtype of Y.
            x: X (T, n), as it was saved.
            kept: bool (T, n): the entries that input dropout kept; None without it.
            needs: which gradients are needed.
        """
