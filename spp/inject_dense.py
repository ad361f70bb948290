"""A warning for layers without zeros."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spp.errors import SPPWarning
from spp.layer_packed import PackedHolder


def warn_dense(targets: Sequence[tuple[str, nn.Module]], purpose: str) -> None:
    """Warn of target layers without zeros.

    Args:
        targets: (path, module).
        purpose: "train", or "pack", which saves no memory there.
    """
    dense = [path for path, module in targets if _is_dense(module)]
    if not dense:
        return
    what = (
        f"all {len(dense)} target layers are"
        if len(dense) == len(targets)
        else f"{len(dense)} of {len(targets)} target layers are"
    )
    consequence = {
        "train": "SPP trains them, but there is no mask to preserve",
        "pack": "packed, they take more memory than they did; name them in exclude_modules",
    }[purpose]
    warnings.warn(
        f"{what} dense (no zeros), such as {dense[0]}: {consequence}. Prune first: spp.prune(model, method, pattern)",
        SPPWarning,
        stacklevel=4,
    )


def _is_dense(module: nn.Module) -> bool:
    if isinstance(module, PackedHolder) and module.packed_layout:
        packed = module.packed_weight()
        return not packed.layout.is_nm and packed.values.numel() == packed.numel
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_meta or weight.numel() == 0:
        return False
    return int(torch.count_nonzero(weight)) == weight.numel()
