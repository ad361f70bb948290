"""spp: fine-tune pruned language models without losing their zeros.

    import spp
    spp.prune(model, "wanda", "2:4", calibration=texts, tokenizer=tokenizer)
    spp.wrap(model, r=16)                    # train spp.adapter_parameters(model), or use spp.training.SPPTrainer
    spp.merge(model)                         # the same zeros, asserted
    spp.save_model(model, "out")             # a plain checkpoint, and the certificate of its zeros

Imported by name: spp.training, spp.evaluation, spp.report, spp.bench, spp.integrations.peft, .trl, .transformers, .hub.
"""

from __future__ import annotations

from spp.supported import require_supported

require_supported()  # first: what follows may fail with other versions

from spp import functional, pruning, pst
from spp._version import __version__
from spp.adapters import adapter_state_dict, load_adapter, save_adapter
from spp.calibrate import prune
from spp.certificate import SparsityReport
from spp.checkpoint import (
    certify,
    convert_checkpoint,
    export_dense,
    export_packed,
    load_packed,
    merge_checkpoint,
    save_model,
    sparsity,
    verify,
)
from spp.checkpoint_prune import prune_checkpoint
from spp.config import SPPConfig
from spp.errors import SPPError, SPPWarning
from spp.inject import adapter_parameters, disabled, print_trainable_parameters, unwrap, wrap
from spp.inject_packed import pack, unpack
from spp.layer import SPPLinear
from spp.merge import merge
from spp.merge_report import MergeReport
from spp.semi_structured import SemiStructuredReport, to_semi_structured

__all__ = [
    "MergeReport",
    "SPPConfig",
    "SPPError",
    "SPPLinear",
    "SPPWarning",
    "SemiStructuredReport",
    "SparsityReport",
    "__version__",
    "adapter_parameters",
    "adapter_state_dict",
    "certify",
    "convert_checkpoint",
    "disabled",
    "export_dense",
    "export_packed",
    "functional",
    "load_adapter",
    "load_packed",
    "merge",
    "merge_checkpoint",
    "pack",
    "print_trainable_parameters",
    "prune",
    "prune_checkpoint",
    "pruning",
    "pst",
    "save_adapter",
    "save_model",
    "sparsity",
    "to_semi_structured",
    "unpack",
    "unwrap",
    "verify",
    "wrap",
]
