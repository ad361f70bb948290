"""The tuner layer of a fused expert weight: any number of SPP adapters beside it, expert by expert.

The weight stays a parameter of the module that has it, and that module's own forward runs, its products replaced
(spp.layers.experts). An adapter has W_α (E, r, n) and W_β (E, m, 1), in the files under `<path>.experts.gate_up_proj`.

An adapter is a submodule under the name of its parameter, which attribute access finds first. `FindsAdapters` makes a
model's `get_submodule` find the adapter, as transformers' `model.load_adapter` needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spp.integrations.peft.terms import TermsLayer
from spp.kernels import Run
from spp.kernels.linear import linear
from spp.layers.experts_packed import OverPackedExperts, PackedExperts
from spp.merging.report import LayerMerge
from spp.merging.weight import merge_experts
from spp.models.projection import Projection, as_matrices
from spp.rules import get_rule
from spp.weights import HeldWeight, PackedStack
from spp.weights.offload import home, is_offloaded


class SPPPeftExperts(OverPackedExperts, TermsLayer):
    """The adapters of one fused weight, as PEFT's machinery handles them; `adapt_experts` puts it in place.

    Args:
        projection: the fused weight.
        packed: hold the weight packed; PackedExperts hand over theirs.

    Attributes:
        spp_alpha: {adapter: α (E, Σ r_t, n)}; spp_beta: {adapter: β (E, m, terms)}.
    """

    def __init__(self, projection: Projection, *, packed: bool = False) -> None:
        OverPackedExperts.__init__(self, projection)
        self._init_terms(get_rule("spp"), projection.path)
        self.saved_activations = "full"
        self.training = projection.module.training
        self.weight_requires_grad = projection.operand.requires_grad
        if packed:
            self.hold_what_is_there()
            self.take_over()

    def restore(self) -> PackedExperts | None:
        """Give the weight back as it is now, flags as PEFT leaves them; a packed one stays packed if it was before."""
        return None if self.packed_layout is None else self.release_packed()

    @property
    def disabled(self) -> bool:  # type: ignore[override]
        """Whether the module's own products run. A merge is taken back first where the adapters are disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.active() is None

    def has_no_effect(self) -> bool:
        """Whether no active adapter has been trained, and this call trains none."""
        on_cpu = self.kept_weight().device.type == "cpu"  # elsewhere, asking would stall the device
        if torch.is_grad_enabled() or not on_cpu:
            return False
        if self.training and any(self.spp_dropout[name][0] for name in self.active_names() if name in self.spp_terms):
            return False  # what a checkpoint recomputes must draw the same values
        return not any(bool(self.spp_beta[name].any()) for name in self.active_names() if name in self.spp_terms)

    def multiplier(self) -> Callable[[int, Tensor], Tensor]:
        """Return what multiplies an expert's tokens x (t, n) by the active adapters' effective weight."""
        active, weights = self.active(), self.sources()
        assert active is not None
        experts, run = active.for_call(self.training).experts(), Run(self.saved_activations)
        return lambda expert, x: linear(x, weights[expert], None, experts[expert], run)

    def kept_weight(self) -> Tensor:
        """Return the tensor that holds the weight's values."""
        return self.stored_weight

    def held_now(self) -> HeldWeight:
        """Return the weight as it is held."""
        return OverPackedExperts.held(self)

    def held(self) -> HeldWeight:
        """Return W as it was before any merge, as it is held."""
        return TermsLayer.held(self)

    def home(self) -> torch.device:
        """Return the device that adapters belong on."""
        return home(self.projection.module, self.kept_weight())

    def is_offloaded(self) -> bool:
        """Whether accelerate has the weight offloaded."""
        return is_offloaded(self.projection.module, self.projection.name)

    def resident_names(self) -> tuple[str, ...]:
        """Return nothing: the parameters are in containers of their own."""
        return ()

    def base_matrices(self) -> Iterator[Tensor]:
        """Yield W (m, n) of each expert as it was before any merge; packed ones are decoded when they are asked for."""
        held: Any = self._before_merge[0] if self._before_merge else None
        if held is None and self.packed_layout is not None:
            held = self.packed_experts()
        if isinstance(held, PackedStack):
            yield from (matrix.dense() for matrix in held.matrices())
        else:
            yield from as_matrices(self.base_weight().detach(), transposed=self.input_axis == -2)

    def merged_weight(self, adapters: Sequence[str]) -> tuple[Tensor, LayerMerge] | None:
        """Return (W_merged as it is stored, what that did) for some adapters together; None where none is here.

        Raises:
            NonFiniteError, MaskError: as for `spp.merge`.
        """
        active = self.combined(adapters)
        if active is None:
            return None
        params = list(zip(*(param.unbind(0) for param in active.params), strict=True))
        given = active.rule, self.base_matrices(), params, active.scaling
        return merge_experts(*given, transposed=self.input_axis == -2, where=self.spp_name)

    def write_merged(self, weight: Tensor) -> Tensor | PackedStack:
        """Have the module hold a merged weight."""
        if self.packed_layout is not None:
            packed = self.packed_experts()
            self.hold_dense(weight)
            return packed
        before = self.weight.data
        self.weight.data = weight
        return before

    def write_back(self, before: Tensor | PackedStack) -> None:
        """Hold again what was there before a merge."""
        if isinstance(before, PackedStack):
            self.projection.release()
            self.hold_packed(before)
        else:
            self.weight.data = before.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPPeftExperts:
        """Convert or move; what was set aside by a merge follows."""
        super()._apply(fn, recurse)
        self.convert_before(fn)
        return self

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
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
