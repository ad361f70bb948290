"""Training: `tune` runs a whole recipe from files; `SPPTrainer` is transformers' Trainer for wrapped models.

`PSTTrainer` is the same for models wrapped by spp.pst; `MaskUpdates` has SPPTrainer prune and regrow.
"""

from __future__ import annotations

from spp.supported import require_supported

require_supported()  # first: what follows may fail with other versions

from spp.configs.methods import RECIPES
from spp.configs.tuning import TuneConfig
from spp.training.callbacks import TrainingInterrupted
from spp.training.causal_loss import causal_lm_loss, chunked_cross_entropy
from spp.training.data import Collator, TrainingData, load_data
from spp.training.mask_updates import MaskUpdates
from spp.training.pst_trainer import PSTTrainer, SparsitySchedule
from spp.training.trainer import SPPTrainer
from spp.training.tuning import TuneResult, tune
from spp.wrapping.wrap import set_saved_activations

__all__ = [
    "RECIPES",
    "Collator",
    "MaskUpdates",
    "PSTTrainer",
    "SPPTrainer",
    "SparsitySchedule",
    "TrainingData",
    "TrainingInterrupted",
    "TuneConfig",
    "TuneResult",
    "causal_lm_loss",
    "chunked_cross_entropy",
    "load_data",
    "set_saved_activations",
    "tune",
]
