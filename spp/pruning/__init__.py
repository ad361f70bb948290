"""Pruning: a whole model in memory (`prune`) or on disk, block by block, with calibration data.

The methods themselves are pure functions on tensors: each says which weights stay, or what they become.
"""

from __future__ import annotations

from spp.configs.pruning import OWL
from spp.masks.dsnot import dsnot
from spp.masks.least_squares import least_squares
from spp.masks.magnitude import magnitude_mask
from spp.masks.sparsegpt import sparsegpt
from spp.masks.stats import InputStats
from spp.masks.swaps import swap
from spp.masks.wanda import wanda_mask
from spp.pruning.model import prune
from spp.pruning.own_text import own_windows
from spp.pruning.reconstruction import reconstruct
from spp.pruning.report import LayerReport, PruneReport
from spp.pruning.windows import calibration_windows

__all__ = [
    "OWL",
    "InputStats",
    "LayerReport",
    "PruneReport",
    "calibration_windows",
    "dsnot",
    "least_squares",
    "magnitude_mask",
    "own_windows",
    "prune",
    "reconstruct",
    "sparsegpt",
    "swap",
    "wanda_mask",
]
