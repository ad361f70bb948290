"""Training: `tune` runs a whole recipe from files; `SPPTrainer` is transformers' Trainer for wrapped models."""

from __future__ import annotations

from spp.training.config import RECIPES, TuneConfig
from spp.training.data import Collator, TrainingData, load_data
from spp.training.interrupt import TrainingInterrupted
from spp.training.trainer import SPPTrainer
from spp.training.tuning import TuneResult, tune

__all__ = [
    "RECIPES",
    "Collator",
    "SPPTrainer",
    "TrainingData",
    "TrainingInterrupted",
    "TuneConfig",
    "TuneResult",
    "load_data",
    "tune",
]
