"""The tuner layers: a frozen linear, or fused expert weight, with any number of SPP adapters; the active ones compute.

A fused weight stays a parameter of the module that has it, and that module's own forward runs, its products replaced
(spp.layers.experts). An adapter has W_α (E, r, n) and W_β (E, m, 1), in the files under `<path>.experts.gate_up_proj`.

Such an adapter is a submodule under the name of its parameter, which attribute access finds first. `FindsAdapters`
makes a model's `get_submodule` find the adapter, as transformers' `model.load_adapter` needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spp.integrations.peft.terms import TermsLayer
from spp.layers.adapted import AdaptedLinear
from spp.layers.experts import ExpertsAdapter, PackedExperts
from spp.layers.host import PackedLinear, release_parameter, share_hooks
from spp.models.projection import Projection, features, input_axis_of
from spp.rules import Adapter, get_rule
from spp.weights import Weight, quantized_kind, read_quantized
from spp.weights.offload import execution_device, is_offloaded, move_hook, offloader, parameter_weight, values

_SPP = get_rule("spp")
Place = tuple[nn.Module, str]  # the parent of a module, and its name there


class SPPPeftLinear(TermsLayer, AdaptedLinear):
    """A frozen linear layer and its adapters, as PEFT's machinery handles them.

    Args:
        base_layer: nn.Linear or a subclass, quantized or not, transformers' Conv1D, or a PackedLinear.
        where: the layer's path in the model, for messages and seeds.
        packed: pack the weight, unless it is packed already.
        dtype: of an 8-bit weight where it is multiplied, as in SPPLinear.

    Attributes:
        base_layer: what was given; of a quantized weight the PackedLinear that holds it, until this layer is unloaded.
        also_at: the places of a linear that is registered in several.
    """

    also_at: tuple[Place, ...] = ()

    def __init__(
        self, base_layer: nn.Module, where: str, *, packed: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        AdaptedLinear.__init__(self)
        quantized = read_quantized(base_layer, f"{where}.weight", dtype) if quantized_kind(base_layer) else None
        self._packed_here = (packed or quantized is not None) and not isinstance(base_layer, PackedLinear)
        if self._packed_here:
            assert isinstance(base_layer, nn.Linear)
            base_layer = PackedLinear(base_layer, quantized, where=where)
        self.base_layer = base_layer
        self._init_terms(_SPP, where)
        self.out_features, self.in_features = features(base_layer)
        self.input_axis = input_axis_of(base_layer)
        self.cache_effective = not isinstance(base_layer, PackedLinear)
        share_hooks(base_layer, self)  # the base layer itself is never called
        self.training = base_layer.training

    def drop_cache(self) -> None:
        self._cached = None

    def frozen(self) -> Weight:
        base = self.base_layer
        return base.held() if isinstance(base, PackedLinear) else parameter_weight(base, input_axis=self.input_axis)

    def frozen_bias(self) -> Tensor | None:
        return None if self.base_layer.bias is None else values(self.base_layer, "bias")

    @property
    def stored_weight(self) -> Tensor:
        base = self.base_layer
        stored = base.stored_weight if isinstance(base, PackedLinear) else base.weight
        assert isinstance(stored, Tensor)
        return stored

    def held_now(self) -> Weight:
        return self.frozen()

    def is_offloaded(self) -> bool:
        return offloader(self.base_layer) is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        hook = self.base_layer.__dict__.get("_hf_hook")  # never called itself, the base layer does not align its input
        return super().forward(x if hook is None else x.to(execution_device(hook) or x.device))

    def write_merged(self, weight: Tensor) -> Tensor | PackedLinear:
        """Have the base layer hold a merged weight; in place of a PackedLinear stands what it was made of."""
        base = self.base_layer
        if isinstance(base, PackedLinear):
            self.base_layer = base.restore(dense=True)
        parameter = self.base_layer.get_parameter("weight")
        before = parameter.data
        parameter.data = weight
        return base if isinstance(base, PackedLinear) else before

    def write_back(self, before: Tensor | PackedLinear) -> None:
        """Have the base layer be, or hold, what was there before a merge."""
        if isinstance(before, PackedLinear):
            release_parameter(self.base_layer, "weight")
            move_hook(self.base_layer, before)
            self.base_layer = before
        else:
            parameter = self.base_layer.get_parameter("weight")
            parameter.data = before.to(parameter.device)

    def put(self, module: nn.Module, parent: nn.Module, name: str) -> None:
        """Put a module where this layer's linear was, or this layer is: at a place, and at the others that it has."""
        for owner, attribute in ((parent, name), *self.also_at):
            setattr(owner, attribute, module)

    def unpack_base(self) -> None:
        """Give the base layer back as it was, if this layer has packed it, or holds it because it is quantized."""
        if self._packed_here and isinstance(self.base_layer, PackedLinear):
            self.base_layer = self.base_layer.restore()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPPeftLinear:
        super()._apply(fn, recurse)
        self.convert_before(fn)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.ranks}"


class SPPPeftExperts(ExpertsAdapter, TermsLayer):
    """The adapters of one fused weight, as PEFT's machinery handles them; `adapt_experts` puts it in place.

    Args:
        projection: the fused weight.
        packed: hold the weight packed; PackedExperts hand over theirs.

    Attributes:
        spp_alpha: {adapter: α (E, Σ r_t, n)}; spp_beta: {adapter: β (E, m, terms)}.
    """

    def __init__(self, projection: Projection, *, packed: bool = False) -> None:
        ExpertsAdapter.__init__(self, projection)
        self._init_terms(_SPP, projection.path)
        self.training = projection.module.training
        self.weight_requires_grad = projection.operand.requires_grad
        if packed:
            self.hold_what_is_there()
            self.take_over()

    def restore(self) -> PackedExperts | None:
        """Give the weight back as it is now, flags as PEFT leaves them; a packed one stays packed if it was before."""
        return None if self.packed_layout is None else super().restore()

    @property
    def disabled(self) -> bool:  # type: ignore[override]
        """Whether the module's own products run. A merge is taken back first where the adapters are disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.active() is None

    def active(self) -> Adapter | None:
        return TermsLayer.active(self)

    def held_now(self) -> Weight:
        return ExpertsAdapter.held(self)

    def held(self) -> Weight:
        return TermsLayer.held(self)

    def is_offloaded(self) -> bool:
        return is_offloaded(self.projection.module, self.projection.name)

    def write_merged(self, weight: Tensor) -> Tensor | Weight:
        """Have the module hold a merged weight."""
        if self.packed_layout is not None:
            packed = self.held_now()
            self.hold_dense(weight)
            return packed
        before = self.weight.data
        self.weight.data = weight
        return before

    def write_back(self, before: Tensor | Weight) -> None:
        """Hold again what was there before a merge."""
        if isinstance(before, Weight):
            self.projection.release()
            self.hold_packed(before)
        else:
            self.weight.data = before.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPPeftExperts:
        super()._apply(fn, recurse)
        self.convert_before(fn)
        return self

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"num_experts={self.num_experts}, {sizes}, r={self.ranks}"


class FindsAdapters:
    """A replacement of a model's `get_submodule` that finds submodules named like a parameter beside them.

    Args:
        model: whose own it replaces, until `remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, target: str) -> nn.Module:
        """Return the submodule at a path; as nn.Module's own, an AttributeError where there is none."""
        module = self.model
        for name in target.split(".") if target else ():
            child = module._modules.get(name)
            if child is None:
                return type(self.model).get_submodule(self.model, target)
            module = child
        return module

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Make a model's adapters of experts findable."""
        model.__dict__["get_submodule"] = cls(model)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Restore a model's own look-up."""
        if isinstance(model.__dict__.get("get_submodule"), cls):
            del model.__dict__["get_submodule"]
