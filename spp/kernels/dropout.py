"""Input dropout's mask: drawn once a call, kept for backward as one bit an entry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import spp.patterns as patterns

_SHIFTS = (7, 6, 5, 4, 3, 2, 1, 0)  # the first entry in the highest bit


def draw_dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return (x with entries dropped with probability p and the rest divided by 1 − p, the kept entries as bits).

    The mask comes from torch's global generator of the device, the same draw as torch.nn.functional.dropout's.
    """
    with torch.no_grad():
        dropped, kept = torch.native_dropout(x, p, True)
        return dropped, pack_bits(kept.to(torch.bool))  # an empty mask comes in the dtype of x


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool tensor of any shape as the bits of `patterns.pack_bits`, uint8 (⌈numel / 8⌉,), on its device."""
    if mask.device.type == "cpu":
        return torch.from_numpy(patterns.pack_bits(mask))
    flat = mask.reshape(-1)
    bytes_ = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=mask.device)
    return (bytes_ << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool tensor of `shape` that `pack_bits` packed."""
    if bits.device.type == "cpu":
        return patterns.unpack_bits(bits.numpy(), shape)
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> shifts & 1).view(-1)[: math.prod(shape)].to(torch.bool).view(*shape)
