"""PST, parameter-efficient sparse training (Li et al., IJCAI 2022, arXiv 2205.11005): learn which weights to prune.

    spp.pst.wrap(model)                      # dense; W is frozen, a low-rank update and the importance train
    spp.training.PSTTrainer(model, …)        # follows sparsity_schedule
    spp.pst.convert(model)                   # plain masked linears
    spp.save_model(model, "sparse")          # a plain checkpoint, and the certificate of its zeros

The maths is in spp.pst.function.
"""

from __future__ import annotations

from spp.supported import require_supported

require_supported()  # first: what follows may fail with other versions

from spp.configs.pst import PSTConfig
from spp.pst.files import load, save
from spp.pst.function import sparsity_schedule
from spp.pst.layer import PSTLinear
from spp.pst.model import convert, is_wrapped, pst_layers, set_sparsity, unwrap, wrap

__all__ = [
    "PSTConfig",
    "PSTLinear",
    "convert",
    "is_wrapped",
    "load",
    "pst_layers",
    "save",
    "set_sparsity",
    "sparsity_schedule",
    "unwrap",
    "wrap",
]
