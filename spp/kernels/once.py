"""First derivatives only: what a second one is answered with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spp.errors import GradientError


class Once(torch.autograd.Function):
    """The identity on a gradient; differentiating it by what it was computed from is what has no formula here."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        """Return the gradient; `sources` are what it was computed from."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raise a GradientError."""
        raise GradientError(
            "the fast SPP layer has first derivatives only, and a second one was asked for (create_graph=True, a "
            "gradient penalty, a Hessian). Compute those layers with spp.functional.spp_linear_reference, which "
            "autograd can differentiate any number of times"
        )
