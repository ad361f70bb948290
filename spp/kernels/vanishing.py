"""Whether a kept weight can come out of the canonical arithmetic as zero; nearly always not, and that is cheap to show.

|W_eff| ≥ min |W kept| · (1 − max |s·β| · max |α|). Where that bound is a normal number of the base's dtype, no weight
of the layer needs the rescue, and the pass over the block that looks for one is skipped. min |W kept| is found once a
weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spp.kernels.facts import remembered
from spp.patterns import nonzero_mask
from spp.rules.canonical import smallest_kept

_ROUNDING = 1e-3  # far above what the roundings of the canonical order can take off the bound


def may_vanish(weight: Tensor, largest_factor: float) -> bool:
    """Return False only if no kept weight of the layer can come out as zero.

    Args:
        weight: W.
        largest_factor: upper bound of |W_eff / W − 1|.
    """
    if weight.device.type != "cpu" or type(weight) not in (Tensor, torch.nn.Parameter):
        return True  # reading the bound back would stall the device; there the rescue is always looked for
    bound = remembered("smallest kept", weight, _smallest_kept_weight) * (1 - largest_factor - _ROUNDING)
    return not bound >= smallest_kept(weight.dtype)


def _smallest_kept_weight(weight: Tensor) -> float:
    kept = weight.detach().abs().masked_fill_(~nonzero_mask(weight), math.inf)
    return float(kept.amin()) if kept.numel() else math.inf
