"""spp: fine-tune pruned language models without losing their zeros."""

from __future__ import annotations

from spp import functional
from spp.adapters import adapter_state_dict, load_adapter, save_adapter
from spp.config import SPPConfig
from spp.inject import adapter_parameters, disabled, print_trainable_parameters, unwrap, wrap
from spp.layer import SPPLinear
from spp.merge import merge

__all__ = [
    "SPPConfig",
    "SPPLinear",
    "adapter_parameters",
    "adapter_state_dict",
    "disabled",
    "functional",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "save_adapter",
    "unwrap",
    "wrap",
]
