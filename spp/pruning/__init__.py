"""Pruning methods as pure functions on tensors: each says which weights stay, or what they become."""

from spp.configs.pruning import OWL
from spp.pruning.dsnot import dsnot
from spp.pruning.magnitude import magnitude_mask
from spp.pruning.sparsegpt import sparsegpt
from spp.pruning.stats import InputStats
from spp.pruning.wanda import wanda_mask

__all__ = ["OWL", "InputStats", "dsnot", "magnitude_mask", "sparsegpt", "wanda_mask"]
