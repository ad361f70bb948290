"""What of X is kept for backward: X itself, or X rounded to bfloat16 at half the memory.

Only G = dYᵀ X, and so dα and dβ, see the rounding: each entry of X is off by at most 2⁻⁸ of it, at random, so that the
sums over tokens that G's entries are lose less. Y and dX are what they are without it; bfloat16 has float32's range, so
nothing overflows. Layers that share their input (query, key and value; gate and up) share the copy.

An input that is a view is kept as it is: attention hands its output on as a view of what it keeps for its own backward,
where a copy would only add to that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from spp.configs.adapter import ACTIVATIONS
from spp.configs.checks import check_choice

_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # X -> (its version, its copy), while X lives


def check_saved_activations(choice: str) -> None:
    """Raise a ConfigError unless `choice` is "full" or "bfloat16"."""
    check_choice("saved_activations", choice, ACTIVATIONS)


def kept_for_backward(x: Tensor, choice: str) -> Tensor:
    """Return what a layer saves of its input.

    Args:
        x: X, in the dtype of the products; only float32 is rounded.
        choice: one of ACTIVATIONS.
    """
    if choice == "full" or x.dtype != torch.float32 or x._is_view():
        return x
    known = _copies.get(x)
    if known is None or known[0] != x._version:
        known = x._version, x.detach().to(torch.bfloat16)
        _copies[x] = known
    copy: Tensor = known[1]
    return copy
