"""A mask as one bit an entry, on the device where it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import spp.masks.patterns as patterns

_SHIFTS = (7, 6, 5, 4, 3, 2, 1, 0)  # the first entry in the highest bit


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
        return patterns.unpack_bits(patterns.as_array(bits), shape)
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> shifts & 1).view(-1)[: math.prod(shape)].to(torch.bool).view(*shape)
