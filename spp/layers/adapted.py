"""Adapted layers: how a linear one computes and what it keeps between calls, and the adapter that a layer holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.kernels import Run, base_linear
from spp.kernels.linear import linear
from spp.layers.host import Opaque
from spp.rules import Adapter, Rule, effective_weight, get_rule
from spp.rules.adapter import arithmetic_dtype
from spp.weights import HoldsWeight, Weight
from spp.weights.holder import WRAPPED

CACHED_TOKENS = 32  # in eval without gradients, calls of at most this many tokens keep W_eff: generation's steps


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
    def of(cls, kept: Tensor, adapter: Adapter, build: Callable[[], Tensor]) -> CachedWeight | None:
        """Return W_eff as `build` computes it; None for tensors without values or without a version."""
        tensors = (kept, *adapter.params)
        if kept.is_meta or any(t.is_inference() for t in tensors):
            return None
        with torch.inference_mode(False):
            return cls(build(), adapter, kept, [(t.data_ptr(), t._version) for t in tensors])

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
        Opaque.prepare()

    @abstractmethod
    def active(self) -> Adapter | None:
        """Return the adapter to compute with; None computes as the pruned layer does."""

    @abstractmethod
    def frozen(self) -> Weight:
        """Return W (m, n) to compute with."""

    @abstractmethod
    def frozen_bias(self) -> Tensor | None:
        """Return b (m,) or None."""

    @property
    @abstractmethod
    def stored_weight(self) -> Tensor:
        """The tensor that holds W's values, whose address and version tell a write."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute Y (…, m) from x (…, n)."""
        if torch.compiler.is_compiling():
            assert Opaque.call is not None
            y: Tensor = Opaque.call(AdaptedLinear._compute, self, x)
            return y
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        active = self.active()
        if self._may_cache(x) and active is not None:
            kept = self.stored_weight
            if self._cached is None or not self._cached.holds(kept, active):
                self._cached = CachedWeight.of(kept, active, lambda: effective_weight(self.frozen().matrix(), active))
            if self._cached is not None:
                return F.linear(x, self._cached.effective, self.frozen_bias())
        weight, bias = self.frozen(), self.frozen_bias()
        if active is None:
            return base_linear(x, weight, bias)
        return linear(x, weight, bias, active.for_call(self.training), Run(self.saved_activations, self.tap))

    def _may_cache(self, x: Tensor) -> bool:
        """Return whether W_eff is kept between calls such as this one; where gradients may be wanted it is dropped."""
        if self.training or torch.is_grad_enabled():
            self._cached = None
            return False
        few = x.numel() <= CACHED_TOKENS * self.in_features
        return few and self.cache_effective and not torch.is_autocast_enabled(x.device.type)

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
        Opaque.prepare()


class HoldsAdapter(HoldsWeight):
    """A module with a frozen weight and one adapter of it, whose parameters are its own.

    Attributes:
        spp_rule, r, scaling, dropout, dropout_mode: as in SPPConfig.
        spp_name: the layer's name in messages.
        spp_alpha: W_α (r, n), of experts (E, r, n). spp_beta: W_β (m, 1), (E, m, 1). With another rule its own.
        disabled: whether the layer computes as the pruned one does.
    """

    save_refusal = WRAPPED
    spp_alpha: nn.Parameter
    spp_beta: nn.Parameter
    out_features: int
    in_features: int
    _adapter_names: tuple[str, ...] = ()
    experts_shape: tuple[int, ...] = ()  # (E,) of fused experts

    @torch.inference_mode(False)  # what is made inside it could never be trained
    def add_adapter(self, config: SPPConfig, where: str, weight: Weight, generator: torch.Generator | None) -> None:
        """Make the adapter of W, drawn on the CPU, whatever the device, from a generator or torch's global one."""
        self.spp_rule: Rule = get_rule(config.rule)
        self.spp_name, self.r, self.scaling = where, config.r, config.scaling
        self.dropout, self.dropout_mode, self.disabled = config.dropout, config.dropout_mode, False
        self._adapter_names = self.spp_rule.attribute_names()
        shapes = self.spp_rule.shapes(self.out_features, self.in_features, config.r)
        self.experts_shape = tuple(weight.shape[:-2])
        is_meta = weight.device.type == "meta"
        for name, shape in zip(self._adapter_names, shapes, strict=True):
            size, dtype = (*weight.shape[:-2], *shape), arithmetic_dtype(weight.dtype)
            empty = torch.empty(size, dtype=dtype, device="meta" if is_meta else "cpu")
            self.register_parameter(name, nn.Parameter(empty))
        if not is_meta:
            self.reset_parameters(generator)
            for parameter in self.adapter_parameters():
                parameter.data = parameter.data.to(weight.device)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return [W_α, W_β]."""
        held = self._parameters  # straight from it: nn.Module's own look-up would cost as much as the rest of a token
        return [held[name] for name in self._adapter_names]  # type: ignore[misc]

    def adapter(self) -> Adapter:
        """Return the adapter."""
        return Adapter(self.spp_rule, self.adapter_parameters(), self.scaling, self.dropout, self.dropout_mode)

    def active(self) -> Adapter | None:
        return None if self.disabled else self.adapter()

    def parts(self) -> Iterator[tuple[Tensor, Adapter]]:
        """Yield W (m, n) and its adapter, of fused experts one after the other; a packed W is decoded for it."""
        pairs = zip(self.held().experts(), self.adapter().experts(), strict=True)
        yield from ((one.matrix(), adapter) for one, adapter in pairs)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the adapter anew in place, expert after expert; a generator must be on the parameters' device."""
        for adapter in self.adapter().experts():
            self.spp_rule.init_(adapter.params, generator)

    def effective_weight(self) -> Tensor:
        """Return W_eff in the dtype and layout of `weight`: what the forward multiplies by, and a merge stores."""
        made = [effective_weight(weight, adapter) for weight, adapter in self.parts()]
        effective = torch.stack(made) if self.adapter_parameters()[0].dim() == 3 else made[0]
        return effective if self.input_axis == -1 else effective.mT.contiguous()

    def resident_names(self) -> tuple[str, ...]:
        return self._adapter_names

    def extra_repr(self) -> str:
        return self.describe(f"r={self.r}, scaling={self.scaling}, dropout={self.dropout}")
