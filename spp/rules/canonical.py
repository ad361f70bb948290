"""The effective weight in its one canonical order of operations: what the forward multiplies by and a merge stores.

    the rule's build in float32 (float64 for a float64 base)  →  round to the base's dtype  →  rescue

Rescue: a kept weight (its bits, but for the sign, are not all zero) that comes out as zero is stored as the smallest
normal number of float64 / float32 / bfloat16 or the smallest subnormal of float16, with W's sign, so that the set of
zeros never grows. The gradient is as if it had not happened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spp.masks.patterns import nonzero_mask
from spp.rules.base import Rule

FP16_SMALLEST = 2.0**-24
WHOLE = slice(None)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the canonical arithmetic for a base of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def smallest_kept(dtype: torch.dtype) -> float:
    """Return the magnitude that a rescued weight gets: one that no flush-to-zero mode takes away."""
    return FP16_SMALLEST if dtype == torch.float16 else torch.finfo(dtype).smallest_normal


def rescue_(result: Tensor, weight: Tensor) -> Tensor:
    """Replace zeros of `result` where `weight` is not zero, in place; return the bool mask of what was rescued.

    Args:
        result: (rows, cols) already rounded to the dtype that is stored.
        weight: W of the same shape, in the base's dtype.
    """
    lost = nonzero_mask(weight) & ~nonzero_mask(result)
    if result.device.type != "cpu" or bool(lost.any()):  # elsewhere, asking would stall the device
        smallest = torch.full((), smallest_kept(result.dtype), dtype=result.dtype, device=result.device)
        result.copy_(torch.where(lost, torch.copysign(smallest, weight.to(result.dtype)), result))
    return lost


def effective_block(
    rule: Rule,
    weight: Tensor,
    factors: Any,
    rows: slice,
    cols: slice,
    arithmetic: Tensor,
    *,
    rounded: Tensor | None = None,
    may_vanish: bool = True,
) -> Tensor:
    """Return W_eff[rows, cols] in the dtype of `weight`.

    Args:
        weight: W[rows, cols].
        factors: from `rule.prepare`.
        arithmetic: contiguous scratch of the block's shape in the arithmetic's dtype; the result itself for a base
            of that dtype.
        rounded: scratch of the block's shape in the dtype of `weight`, or None to allocate where it is needed.
        may_vanish: False where the caller has shown that no kept weight can come out as zero.
    """
    rule.build(weight, factors, rows, cols, arithmetic)
    if arithmetic.dtype == weight.dtype:
        result = arithmetic
    else:
        result = arithmetic.to(weight.dtype) if rounded is None else rounded.copy_(arithmetic)
    if may_vanish:
        rescue_(result, weight)
    return result
