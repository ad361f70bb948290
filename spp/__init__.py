"""spp: fine-tune pruned language models without losing their zeros.

    import spp
    spp.prune(model, "wanda", "2:4", calibration=texts, tokenizer=tokenizer)
    spp.wrap(model, r=16)                    # train spp.adapter_parameters(model), or use spp.training.SPPTrainer
    spp.merge(model)                         # the same zeros, asserted
    spp.save_model(model, "out")             # a plain checkpoint, and the certificate of its zeros

Imported by name: spp.training, spp.evaluation, spp.report, spp.bench, spp.integrations.peft, .trl, .transformers, .hub.

A name is imported when it is first used (PEP 562), so that `import spp` and the help of the program load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spp._version import __version__

if TYPE_CHECKING:
    from spp import functional, pruning, pst
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
    from spp.configs.adapter import SPPConfig
    from spp.errors import SPPError, SPPWarning
    from spp.inject import adapter_parameters, disabled, print_trainable_parameters, unwrap, wrap
    from spp.inject_packed import pack, unpack
    from spp.layer import SPPLinear
    from spp.merge_model import merge
    from spp.merge_report import MergeReport
    from spp.semi_structured import SemiStructuredReport, to_semi_structured

_MODULES = ("functional", "pruning", "pst")
# Where each name is defined: the imports above, which type checkers read, are the same (tests/test_root.py).
_HOMES = {
    "spp.adapters": ("adapter_state_dict", "load_adapter", "save_adapter"),
    "spp.calibrate": ("prune",),
    "spp.certificate": ("SparsityReport",),
    "spp.checkpoint": (
        *("certify", "convert_checkpoint", "export_dense", "export_packed", "load_packed"),
        *("merge_checkpoint", "save_model", "sparsity", "verify"),
    ),
    "spp.checkpoint_prune": ("prune_checkpoint",),
    "spp.configs.adapter": ("SPPConfig",),
    "spp.errors": ("SPPError", "SPPWarning"),
    "spp.inject": ("adapter_parameters", "disabled", "print_trainable_parameters", "unwrap", "wrap"),
    "spp.inject_packed": ("pack", "unpack"),
    "spp.layer": ("SPPLinear",),
    "spp.merge_model": ("merge",),
    "spp.merge_report": ("MergeReport",),
    "spp.semi_structured": ("SemiStructuredReport", "to_semi_structured"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, after a check of the versions that it needs.

    Raises:
        AttributeError: there is no such name.
        DependencyError: spp does not work with the torch or transformers that is installed.
    """
    if name not in _HOME_OF and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spp.supported import require_supported

    require_supported()  # first: what follows may fail with other versions
    if name in _MODULES:
        return importlib.import_module(f"spp.{name}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not, and what is loaded."""
    return sorted({*globals(), *__all__})
