"""The share of weights that a layer keeps, counted once a weight."""

from __future__ import annotations

import torch

from spp.kernels.blocks import row_step, slices
from spp.kernels.facts import remembered
from spp.kernels.packed import PackedSource
from spp.kernels.sources import WeightSource
from spp.packed import PackedWeight


def density(weight: WeightSource) -> float:
    """Return how many of W's entries are kept, relative to all of them; 1 for a weight without entries."""
    m, n = weight.shape
    if not m * n:
        return 1.0
    if isinstance(weight, PackedSource) and not isinstance(weight.packed, PackedWeight):
        # A quantized weight holds no values to count: its blocks are decoded, once.
        count = remembered("kept", weight.packed.codes, lambda _: _count(weight))
    else:
        count = remembered("kept", weight.kept(), lambda kept: int(torch.count_nonzero(kept)))
    return count / (m * n)


def _count(weight: WeightSource) -> int:
    m, n = weight.shape
    return sum(int(torch.count_nonzero(weight.block(rows, slice(None)))) for rows in slices(m, row_step(m, n, 1)))
