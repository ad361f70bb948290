"""The arithmetic of an adapted layer, for any rule: three products, blocked, in a shared workspace."""

from __future__ import annotations

from spp.kernels.choice import use_kernels
from spp.kernels.fp8 import check_grad_precision
from spp.kernels.frozen import base_linear
from spp.kernels.keep import check_saved_activations
from spp.kernels.packed import PackedSource
from spp.kernels.three_products import linear
from spp.kernels.workspace import release_workspace, workspace_bytes

__all__ = [
    "PackedSource",
    "base_linear",
    "check_grad_precision",
    "check_saved_activations",
    "linear",
    "release_workspace",
    "use_kernels",
    "workspace_bytes",
]
