"""spp: fine-tune pruned language models without losing their zeros.

    import spp
    spp.prune(model, "wanda", "2:4", calibration=texts, tokenizer=tokenizer)
    spp.wrap(model, r=16)                    # train spp.adapter_parameters(model), or use spp.training.SPPTrainer
    spp.merge(model)                         # the same zeros, asserted
    spp.save_model(model, "out")             # a plain checkpoint, and the certificate of its zeros

Imported by name: spp.training, spp.evaluation, spp.report, spp.integrations.peft, .trl, .transformers, .hub.

A name is imported when it is first used (PEP 562), so that `import spp` and the help of the program load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spp._version import __version__

if TYPE_CHECKING:
    from spp import functional, pruning, pst
    from spp.certifying.certificate import SparsityReport
    from spp.certifying.save import certify, save_model
    from spp.certifying.verify import sparsity, verify
    from spp.configs.adapter import SPPConfig
    from spp.configs.reconstruction import Reconstruction
    from spp.converting.checkpoint import convert
    from spp.errors import SPPError, SPPWarning
    from spp.files.places import follow_links
    from spp.layers.linear import SPPLinear
    from spp.merging.disk import merge_checkpoint
    from spp.merging.model import merge
    from spp.merging.report import MergeReport
    from spp.packing.export import export_dense, export_packed
    from spp.packing.model import load_packed, pack, unpack
    from spp.packing.semi_structured import SemiStructuredReport, to_semi_structured
    from spp.pruning import prune, reconstruct
    from spp.pruning.disk import prune_checkpoint
    from spp.pruning.reconstruction import reconstruct_checkpoint
    from spp.pruning.report import ReconstructionReport
    from spp.pst.files import convert_checkpoint
    from spp.wrapping.adapters import adapter_state_dict, load_adapter, save_adapter
    from spp.wrapping.wrap import adapter_parameters, disabled, print_trainable_parameters, unwrap, wrap

_MODULES = ("functional", "pruning", "pst")
# Where each name is defined: the imports above, which type checkers read, are the same (tests/test_root.py).
_HOMES = {
    "spp.certifying.certificate": ("SparsityReport",),
    "spp.certifying.save": ("certify", "save_model"),
    "spp.certifying.verify": ("sparsity", "verify"),
    "spp.configs.adapter": ("SPPConfig",),
    "spp.converting.checkpoint": ("convert",),
    "spp.errors": ("SPPError", "SPPWarning"),
    "spp.files.places": ("follow_links",),
    "spp.layers.linear": ("SPPLinear",),
    "spp.merging.disk": ("merge_checkpoint",),
    "spp.merging.model": ("merge",),
    "spp.merging.report": ("MergeReport",),
    "spp.packing.export": ("export_dense", "export_packed"),
    "spp.packing.model": ("load_packed", "pack", "unpack"),
    "spp.packing.semi_structured": ("SemiStructuredReport", "to_semi_structured"),
    "spp.configs.reconstruction": ("Reconstruction",),
    "spp.pruning": ("prune", "reconstruct"),
    "spp.pruning.disk": ("prune_checkpoint",),
    "spp.pruning.reconstruction": ("reconstruct_checkpoint",),
    "spp.pruning.report": ("ReconstructionReport",),
    "spp.pst.files": ("convert_checkpoint",),
    "spp.wrapping.adapters": ("adapter_state_dict", "load_adapter", "save_adapter"),
    "spp.wrapping.wrap": ("adapter_parameters", "disabled", "print_trainable_parameters", "unwrap", "wrap"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MergeReport",
    "Reconstruction",
    "ReconstructionReport",
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
    "convert",
    "convert_checkpoint",
    "disabled",
    "export_dense",
    "export_packed",
    "follow_links",
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
    "reconstruct",
    "reconstruct_checkpoint",
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
