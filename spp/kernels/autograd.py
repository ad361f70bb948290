"""Shared by the autograd functions: their derivatives, what they keep of X, dropout, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from spp.configs.adapter import ACTIVATIONS
from spp.configs.checks import check_choice
from spp.errors import GradientError
from spp.masks.patterns import pack_mask

# ---- First derivatives only: what a second one is answered with.


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


# ---- What of X is kept for backward: X itself, or X rounded to bfloat16 at half the memory.
#
# Only G = dYᵀ X, and so dα and dβ, see the rounding: each entry of X is off by at most 2⁻⁸ of it, at random, so that
# the sums over tokens that G's entries are lose less. Y and dX are what they are without it; bfloat16 has float32's
# range, so nothing overflows. Layers that share their input (query, key and value; gate and up) share the copy.
#
# An input that is a view is kept as it is: attention hands its output on as a view of what it keeps for its own
# backward, where a copy would only add to that.

_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # X -> (its version, its copy), while X lives


def check_saved_activations(choice: str) -> None:
    """Raise a ConfigError unless `choice` is "full" or "bfloat16"."""
    check_choice("saved_activations", choice, ACTIVATIONS)


def kept_for_backward(x: Tensor, choice: str) -> Tensor:
    """Return what a layer saves of its input X, which is in the dtype of the products: only float32 is rounded."""
    if choice == "full" or x.dtype != torch.float32 or x._is_view():
        return x
    known = _copies.get(x)
    if known is None or known[0] != x._version:
        known = x._version, x.detach().to(torch.bfloat16)
        _copies[x] = known
    copy: Tensor = known[1]
    return copy


# ---- Input dropout's mask: drawn once a call, kept for backward as one bit an entry.


def draw_dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return (x with entries dropped with probability p and the rest divided by 1 − p, the kept entries as bits).

    The mask comes from torch's global generator of the device, the same draw as torch.nn.functional.dropout's.
    """
    with torch.no_grad():
        dropped, kept = torch.native_dropout(x, p, True)
        return dropped, pack_mask(kept.to(torch.bool))  # an empty mask comes in the dtype of x


# ---- What autocast means for one call of the layer.

_NOTHING: AbstractContextManager[object] = nullcontext()


def autocast_dtype(device_type: str, *dtypes: torch.dtype) -> torch.dtype | None:
    """Return the dtype that autocast converts operands to; None where it is off, and for float64, as in torch."""
    if not _enabled(device_type) or torch.float64 in dtypes:
        return None
    return torch.get_autocast_dtype(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which operations run in the dtypes of their operands; free where autocast is off."""
    return torch.autocast(device_type, enabled=False) if _enabled(device_type) else _NOTHING


def _enabled(device_type: str) -> bool:
    return _available(device_type) and torch.is_autocast_enabled(device_type)


@cache
def _available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
