"""The share of weights that a layer keeps, counted once a weight."""

from __future__ import annotations

import torch

from spp.kernels.facts import remembered
from spp.kernels.sources import WeightSource


def density(weight: WeightSource) -> float:
    """Return how many of W's entries are kept, relative to all of them; 1 for a weight without entries."""
    entries = weight.shape[0] * weight.shape[1]
    if not entries:
        return 1.0
    return remembered("kept", weight.kept(), lambda kept: int(torch.count_nonzero(kept))) / entries
