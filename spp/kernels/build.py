"""One block of W_eff or of W_eff − W in the shared workspace, in the dtype of the product that it is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spp.kernels.workspace import workspace
from spp.rules.base import Rule
from spp.rules.canonical import arithmetic_dtype, effective_block

WHOLE = slice(None)


def effective(
    rule: Rule,
    block: Tensor,
    factors: Any,
    rows: slice,
    cols: slice,
    stored_as: torch.dtype,
    dtype: torch.dtype,
    vanish: bool,
) -> Tensor:
    """Return W_eff[rows, cols] for a product in `dtype`: rounded to the base's dtype, then to the input's.

    Args:
        block: W[rows, cols].
        stored_as: the input's dtype.
        vanish: whether a kept weight can come out as zero.
    """
    device = block.device
    scratch = workspace("effective", tuple(block.shape), arithmetic_dtype(block.dtype), device)
    same = scratch.dtype == block.dtype
    rounded = None if same else workspace("rounded", tuple(block.shape), block.dtype, device)
    result = effective_block(rule, block, factors, rows, cols, scratch, rounded=rounded, may_vanish=vanish)
    if stored_as != result.dtype:  # autocast
        result = workspace("autocast", tuple(block.shape), stored_as, device).copy_(result)
    return result if result.dtype == dtype else scratch.copy_(result)


def delta(rule: Rule, block: Tensor, factors: Any, rows: slice, cols: slice, dtype: torch.dtype) -> Tensor:
    """Return (W_eff − W)[rows, cols], rounded once to the dtype of the product; `block` is W[rows, cols]."""
    scratch = workspace("effective", tuple(block.shape), arithmetic_dtype(block.dtype), block.device)
    rule.delta(block, factors, rows, cols, scratch)
    if scratch.dtype == dtype:
        return scratch
    return workspace("rounded", tuple(block.shape), dtype, block.device).copy_(scratch)


def plain(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a block of W for a product in `dtype`."""
    return block if block.dtype == dtype else workspace("frozen", tuple(block.shape), dtype, block.device).copy_(block)
