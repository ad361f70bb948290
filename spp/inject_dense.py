"""A warning for layers without zeros."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from spp.errors import SPPWarning, arg, call
from spp.packed import PackedHolder, QuantizedWeight
from spp.targets_layout import Projection


def warn_dense(targets: Sequence[Projection], purpose: str) -> None:
    """Warn of target layers without zeros.

    Args:
        targets: what is adapted or packed.
        purpose: "train", or "pack", which saves no memory there.
    """
    dense = [target.path for target in targets if _is_dense(target)]
    if not dense:
        return
    what = (
        f"all {len(dense)} target layers are"
        if len(dense) == len(targets)
        else f"{len(dense)} of {len(targets)} target layers are"
    )
    consequence = {
        "train": "SPP trains them, but there is no mask to preserve",
        "pack": f"packed, they take more memory than they did; name them in {arg('exclude_modules')}",
    }[purpose]
    warnings.warn(
        SPPWarning(
            f"{what} dense (no zeros), such as {dense[0]}: {consequence}. Prune first: "
            f"{call('prune', 'model, method, pattern')}"
        ),
        stacklevel=4,
    )


def _is_dense(target: Projection) -> bool:
    holder = target.packed
    if holder is not None:
        assert isinstance(holder, PackedHolder)
        packed = holder.packed_weight()
        if isinstance(packed, QuantizedWeight):
            return int(torch.count_nonzero(packed.dense())) == packed.numel
        return not packed.layout.is_nm and packed.values.numel() == packed.numel
    weight = target.dense_weight()
    if weight.is_meta or weight.numel() == 0:
        return False
    return int(torch.count_nonzero(weight)) == weight.numel()
