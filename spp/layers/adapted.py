"""Adapted layers: how a linear one computes and what it keeps between calls, and the adapter that a layer holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp.kernels import PackedSource, Run, WeightSource, base_linear
from spp.kernels.linear import linear
from spp.rules import Adapter, effective_weight

WHOLE = slice(None)
CACHED_TOKENS = 32  # in eval without gradients, calls of at most this many tokens keep W_eff: generation's steps
_opaque_forward: Callable[[AdaptedLinear, Tensor], Tensor] | None = None


class CachedWeight(NamedTuple):
    """W_eff, and what it was computed from.

    A write through `.data` between two calls in evaluation does not show: torch's version counters do not see it.

    Attributes:
        effective: W_eff (m, n).
        adapter: its parameters are held, so that no other tensor gets their addresses.
        kept: the tensor that holds W's values.
        seen: (address, version) of that and of the parameters.
    """

    effective: Tensor
    adapter: Adapter
    kept: Tensor
    seen: list[tuple[int, int]]

    @classmethod
    def of(cls, kept: Tensor, adapter: Adapter, build: Callable[[Adapter], Tensor]) -> CachedWeight | None:
        """Return W_eff as `build` computes it; None for tensors without values or without a version."""
        tensors = (kept, *adapter.params)
        if kept.is_meta or any(t.is_inference() for t in tensors):
            return None
        with torch.inference_mode(False):
            return cls(build(adapter), adapter, kept, [(t.data_ptr(), t._version) for t in tensors])

    def holds(self, kept: Tensor, adapter: Adapter) -> bool:
        """Return whether W_eff computed anew would be the same."""
        if adapter.rule != self.adapter.rule or adapter.scaling != self.adapter.scaling:
            return False
        return self.seen == [(t.data_ptr(), t._version) for t in (kept, *adapter.params)]


class AdaptedLinear(nn.Module):
    """A frozen linear layer that multiplies by W_eff; where W and the adapter are kept is its subclasses' matter.

    Attributes:
        in_features: n.
        cache_effective: whether evaluation without gradients keeps W_eff (m, n) between calls of a few tokens, so that
            generation does not build it for each.
        saved_activations: the form in which the input is saved for backward, "full" or "bfloat16"
            (spp.kernels.autograd): a property of a run, not of the adapter, and stored nowhere.
        tap: is called in each backward with dY (T, m) and X (T, n), whose product is the gradient G of W_eff; None.
    """

    in_features: int
    cache_effective: bool
    saved_activations: str
    tap: Callable[[Tensor, Tensor], None] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache_effective = True
        self.saved_activations = "full"
        self._cached: CachedWeight | None = None
        _prepare_opaque_forward()

    @abstractmethod
    def active(self) -> Adapter | None:
        """Return the adapter to compute with; None computes as the pruned layer does."""

    @abstractmethod
    def frozen(self) -> Tensor | WeightSource:
        """Return W (m, n), as a tensor or where blocks of it come from."""

    @abstractmethod
    def frozen_bias(self) -> Tensor | None:
        """Return b (m,) or None."""

    @abstractmethod
    def kept_weight(self) -> Tensor:
        """Return the tensor that holds W's numbers, in its dtype and on its device: W, or its packed values."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute Y (…, m) from x (…, n)."""
        if torch.compiler.is_compiling():
            assert _opaque_forward is not None
            return _opaque_forward(self, x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        active = self.active()
        if self._may_cache(x) and active is not None:
            kept = self.kept_weight()
            if self._cached is None or not self._cached.holds(kept, active):
                self._cached = CachedWeight.of(kept, active, self._effective_weight)
            if self._cached is not None:
                return F.linear(x, self._cached.effective, self.frozen_bias())
        weight, bias = self.frozen(), self.frozen_bias()
        if active is None:
            return F.linear(x, weight, bias) if isinstance(weight, Tensor) else base_linear(x, weight, bias)
        return linear(x, weight, bias, active.for_call(self.training), Run(self.saved_activations, self.tap))

    def _may_cache(self, x: Tensor) -> bool:
        """Return whether W_eff is kept between calls such as this one; where gradients may be wanted it is dropped."""
        if self.training or torch.is_grad_enabled():
            self._cached = None
            return False
        few = x.numel() <= CACHED_TOKENS * self.in_features
        return few and self.cache_effective and not torch.is_autocast_enabled(x.device.type)

    def _effective_weight(self, active: Adapter) -> Tensor:
        weight = self.frozen()
        if isinstance(weight, WeightSource):
            weight = weight.packed.dense() if isinstance(weight, PackedSource) else weight.block(WHOLE, WHOLE)
        return effective_weight(active.rule, weight, active.params, active.scaling)

    def train(self, mode: bool = True) -> AdaptedLinear:
        """Set the mode; a cached W_eff is dropped."""
        self._cached = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert or move; a cached W_eff is dropped."""
        self._cached = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _prepare_opaque_forward()


def _prepare_opaque_forward() -> None:
    """Make the layer one opaque call for torch.compile, so that its numbers are those of eager mode.

    Not at import time: torch.compiler.disable imports the compiler, which takes seconds.
    """
    global _opaque_forward
    if _opaque_forward is None:
        _opaque_forward = torch.compiler.disable(AdaptedLinear._compute)
