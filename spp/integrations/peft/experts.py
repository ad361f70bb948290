"""The tuner layer of a fused expert weight: any number of SPP adapters beside it, expert by expert.

The weight stays a parameter of the module that has it, and that module's own forward runs, its products replaced
(spp.layers.experts). An adapter has W_α (E, r, n) and W_β (E, m, 1), in the files under `<path>.experts.gate_up_proj`.

An adapter lies where its parameter is, under the same name, which attribute access finds first: `FindsAdapters` has a
model's `get_submodule` find the adapter, as transformers' `model.load_adapter` needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from spp.integrations.peft.terms import TermsLayer
from spp.layers.experts_forward import ExpertsAdapter, PackedExperts
from spp.merging.report import LayerMerge
from spp.merging.weight import merge_experts
from spp.models.projection import Projection
from spp.rules import Adapter, get_rule
from spp.weights import DenseWeight, Weight
from spp.weights.offload import is_offloaded


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
        self._init_terms(get_rule("spp"), projection.path)
        self.training = projection.module.training
        self.weight_requires_grad = projection.operand.requires_grad
        self._packed_before_merge: tuple[Weight, ...] = ()
        if packed:
            self.hold_what_is_there()
            self.take_over()

    def restore(self) -> PackedExperts | None:
        """Let go of the weight as it is now, flags as PEFT leaves them; what was packed before stays packed."""
        return None if self.packed_layout is None else super().restore()

    @property
    def disabled(self) -> bool:  # type: ignore[override]
        """Whether the module's own products run. A merge is taken back first where the adapters are disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.active() is None

    def active(self) -> Adapter | None:
        """Return the active adapters' sum, unless they are disabled or merged."""
        return TermsLayer.active(self)

    def held(self) -> Weight:
        """Return W as it was before any merge."""
        if self._before_merge is not None:
            return DenseWeight(self._before_merge, self.input_axis)
        return self._packed_before_merge[0] if self._packed_before_merge else super().held()

    def is_offloaded(self) -> bool:
        """Whether accelerate has the weight offloaded."""
        return is_offloaded(self.projection.module, self.projection.name)

    def merged_weight(self, adapters: Sequence[str]) -> tuple[Tensor, LayerMerge] | None:
        """Return (W_merged as it is stored, what that did) for some adapters together; None where none is here.

        Raises:
            NonFiniteError, MaskError: as for `spp.merge`.
        """
        active = self.combined(adapters)
        if active is None:
            return None
        matrices = (one.matrix() for one in self.held().experts())
        return merge_experts(matrices, active, transposed=self.input_axis == -2, where=self.spp_name)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight of the active adapters, or those named; as SPPPeftLinear's, with one rounding.

        Raises:
            NonFiniteError, MaskError: as for `merged_weight`; the weight is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_terms]
        result = self.merged_weight([*self.merged_adapters, *names]) if names else None
        if result is None:
            return
        merged, self.spp_merge = result
        if self.packed_layout is not None:
            self._packed_before_merge = (self.held(),)
            self.hold_dense(merged)
        else:
            if not self.merged:
                self._before_merge = self.weight.data
            self.weight.data = merged
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Put back the weight that was there before the merge: the same tensor, not a computed one."""
        for packed in self._packed_before_merge:
            self.projection.release()
            self.hold_packed(packed)
        if self._before_merge is not None:
            self.weight.data = self._before_merge.to(self.weight.device)
        self._before_merge, self._packed_before_merge, self.merged_adapters = None, (), []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPPeftExperts:
        """Convert or move; what was set aside by a merge follows."""
        super()._apply(fn, recurse)
        if self._before_merge is not None:
            self._before_merge = fn(self._before_merge)
        self._packed_before_merge = tuple(
            packed.maker()(*(fn(t) for t in packed.tensors())) for packed in self._packed_before_merge
        )
        return self

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        ranks = {name: [term.rank for term in terms] for name, terms in self.spp_terms.items()}
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"num_experts={self.num_experts}, {sizes}, r={ranks}"


class FindsAdapters:
    """What stands in for a model's `get_submodule`: it finds submodules that have the name of a parameter beside them.

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
        """Have a model's adapters of experts be found."""
        model.__dict__["get_submodule"] = cls(model)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Give a model its own look-up back."""
        if isinstance(model.__dict__.get("get_submodule"), cls):
            del model.__dict__["get_submodule"]
