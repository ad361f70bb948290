"""One adapter of one weight: a rule, its parameters, and how they are scaled and dropped; what it makes of W.

    W_eff = rule(W, θ, s)        for SPP  W ⊙ (1 + s·β·A)

The effective weight has one canonical order of operations: what the forward multiplies by, and what a merge stores.

    the rule's build in float32 (float64 for a float64 base)  →  round to the base's dtype  →  rescue

Rescue: a kept weight (its bits, but for the sign, are not all zero) that comes out as zero is stored as the smallest
normal number of float64 / float32 / bfloat16 or the smallest subnormal of float16, with W's sign, so that the set of
zeros never grows. The gradient is as if it had not happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.masks.patterns import nonzero_mask
from spp.rules.base import Rule

FP16_SMALLEST = 2.0**-24
WHOLE = slice(None)  # of the rows, or the columns, of a block


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the canonical arithmetic for a base of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def smallest_kept(dtype: torch.dtype) -> float:
    """Return the magnitude that a rescued weight gets: one that no flush-to-zero mode takes away."""
    return FP16_SMALLEST if dtype == torch.float16 else torch.finfo(dtype).smallest_normal


def rescue_(result: Tensor, weight: Tensor) -> Tensor:
    """Replace zeros of `result`, rounded already, where W has none, in place; return the mask of what was rescued."""
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
    result = arithmetic
    if arithmetic.dtype != weight.dtype:
        result = torch.empty_like(arithmetic, dtype=weight.dtype) if rounded is None else rounded
    first, step = rows.start or 0, rule.rows_at_once(weight)
    for start in range(0, len(weight), step):
        part = slice(start, min(start + step, len(weight)))
        block, exact, stored = weight[part], arithmetic[part], result[part]
        rule.build(block, factors, slice(first + part.start, first + part.stop), cols, exact)
        if stored.dtype != exact.dtype:
            stored.copy_(exact)
        if may_vanish and not rule.keeps_all(block, stored):
            rescue_(stored, block)
    return result


class Adapter(NamedTuple):
    """A rule with its parameters, scaling and dropout: the change of W.

    Attributes:
        rule: how.
        params: θ, in the rule's order; those of E experts have a leading dimension.
        scaling: s.
        dropout: probability of dropping an entry, in training.
        dropout_mode: "input" drops entries of X in the residual branch, "alpha" entries of the rule's first factor.
    """

    rule: Rule
    params: Sequence[Tensor]
    scaling: float
    dropout: float = 0.0
    dropout_mode: str = "input"

    def for_call(self, training: bool) -> Adapter:
        """Return the adapter of one forward: alpha dropout is drawn here, input dropout is left to the products."""
        if not self.dropout:
            return self
        if not training:
            return self._replace(dropout=0.0)
        if self.dropout_mode == "input":
            return self
        dropped = self.rule.dropped_params(len(self.params))
        params = tuple(F.dropout(p, self.dropout) if i in dropped else p for i, p in enumerate(self.params))
        return self._replace(params=params, dropout=0.0)

    def experts(self) -> list[Adapter]:
        """Return the adapter of each expert, whose parameters are views; of a matrix, the adapter itself."""
        if self.params[0].dim() == 2:
            return [self]
        return [self._replace(params=params) for params in zip(*(p.unbind(0) for p in self.params), strict=True)]

    def is_idle(self) -> bool:
        """Return whether W_eff is W."""
        return self.rule.is_idle(self.params, self.scaling)

    def factors(self, out_features: int, dtype: torch.dtype) -> Any:
        """Return what the rule shares between the blocks of a weight of `dtype` with `out_features` rows."""
        return self.rule.prepare(self.params, self.scaling, out_features, arithmetic_dtype(dtype))

    def on(self, device: torch.device | None) -> Adapter:
        """Return the adapter with its parameters detached, on a device; None leaves them where they are."""
        return self._replace(params=tuple(p.detach().to(device or p.device) for p in self.params))


@torch.no_grad()
def effective_weight(weight: Tensor, adapter: Adapter) -> Tensor:
    """Return W_eff (m, n) in the dtype of W, a new tensor: what the forward multiplies by and a merge stores."""
    factors = adapter.factors(weight.shape[0], weight.dtype)
    scratch = torch.empty(weight.shape, dtype=arithmetic_dtype(weight.dtype), device=weight.device)
    return effective_block(adapter.rule, weight, factors, WHOLE, WHOLE, scratch)


# ---- Adapters that change nothing: those that learned nothing, and those whose update rounding takes away.
#
#     nothing learned      ΔW = 0: a factor of the update is zero, as β or B is before the first step
#     nothing is left      ΔW ≠ 0, but W_eff = W in the dtype of W: in bfloat16, every |s·β·α| < 2⁻⁹

_SYMBOLS = {"alpha": "α", "beta": "β"}
_BLOCK_ELEMENTS = 1 << 20  # a trained adapter is told by the first block


def idle_reason(adapters: Iterable[Adapter]) -> str | None:
    """Return why the update of every layer's adapter is zero, by the parameters alone; None where one's is not."""
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
    """Return what is said of an adapter that learned nothing, with the `idle_reason` where that is known."""
    return f"the adapter changes no weight: {reason or 'its update is zero everywhere'}; was it trained?"


def rounded_away_text() -> str:
    """Return what is said of an adapter whose update rounding takes away, without a full stop."""
    return (
        "the adapter changes no weight: it learned an update, but each change is smaller than the steps in which the "
        "weights are stored, so none of it survived"
    )
