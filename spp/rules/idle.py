"""Adapters that change nothing: those that learned nothing, and those whose update rounding takes away.

nothing learned      ΔW = 0: a factor of the update is zero, as β or B is before the first step
nothing is left      ΔW ≠ 0, but W_eff = W in the dtype of W: in bfloat16, every |s·β·α| < 2⁻⁹
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from spp.rules.adapter import Adapter
from spp.rules.canonical import WHOLE, arithmetic_dtype, effective_block

_SYMBOLS = {"alpha": "α", "beta": "β"}
_BLOCK_ELEMENTS = 1 << 20  # a trained adapter is told by the first block


def idle_reason(adapters: Iterable[Adapter]) -> str | None:
    """Return why the update of every layer is zero, by the parameters alone; None where one's is not.

    Args:
        adapters: of the layers.
    """
    common: set[str] | None = None
    no_scaling = True
    for adapter in adapters:
        if any(parameter.is_meta for parameter in adapter.params) or not adapter.is_idle():
            return None
        names = [name.partition("[")[0] for name in adapter.rule.parameter_names]  # those of a sum are numbered
        zero = set(names) - {name for name, p in zip(names, adapter.params, strict=True) if bool(p.any())}
        no_scaling = no_scaling and not adapter.scaling
        common = zero if common is None else common & zero
    if common is None:
        return None
    if no_scaling:
        return "its scaling is zero"
    symbols = sorted((_SYMBOLS.get(name, name) for name in common), reverse=True)  # β before α
    return f"{symbols[0]} is zero everywhere" if symbols else "the product of its parameters is zero everywhere"


class Effect(NamedTuple):
    """Whether any ΔW is not zero, and whether any W_eff differs from W in the dtype of W."""

    updated: bool
    moved: bool


def effect_of(weight: Tensor, adapter: Adapter) -> Effect:
    """Return what an adapter does to W (m, n); blocks of rows are looked at until a weight differs."""
    rule, arithmetic, (m, n) = adapter.rule, arithmetic_dtype(weight.dtype), weight.shape
    factors = adapter.on(weight.device).factors(m, weight.dtype)
    updated, step = False, max(1, _BLOCK_ELEMENTS // max(n, 1))
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        block = weight.detach()[rows]
        scratch = torch.empty(block.shape, dtype=arithmetic, device=weight.device)
        if not torch.equal(effective_block(rule, block, factors, rows, WHOLE, scratch), block):
            return Effect(True, True)
        if not updated:
            rule.delta(block, factors, rows, WHOLE, scratch)
            updated = bool(scratch.any())
    return Effect(updated, False)


def no_update_text(reason: str | None = None) -> str:
    """Return what is said of an adapter that learned nothing.

    Args:
        reason: from `idle_reason`; None where only the update itself was seen.
    """
    return f"the adapter changes no weight: {reason or 'its update is zero everywhere'}; was it trained?"


def rounded_away_text() -> str:
    """Return what is said of an adapter whose update rounding takes away, without a full stop."""
    return (
        "the adapter changes no weight: it learned an update, but each change is smaller than the steps in which the "
        "weights are stored, so none of it survived"
    )
