"""Pruning a whole model block by block, with calibration data."""

from spp.calibrate.model import prune
from spp.calibrate.report import LayerReport, PruneReport

__all__ = ["LayerReport", "PruneReport", "prune"]
