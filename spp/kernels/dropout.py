"""Input dropout's mask: drawn once a call, kept for backward as one bit an entry."""

from __future__ import annotations

import torch
from torch import Tensor

from spp.kernels.bits import pack_bits


def draw_dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return (x with entries dropped with probability p and the rest divided by 1 − p, the kept entries as bits).

    The mask comes from torch's global generator of the device, the same draw as torch.nn.functional.dropout's.
    """
    with torch.no_grad():
        dropped, kept = torch.native_dropout(x, p, True)
        return dropped, pack_bits(kept.to(torch.bool))  # an empty mask comes in the dtype of x
