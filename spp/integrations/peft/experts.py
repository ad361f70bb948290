"""The tuner layer of a fused expert weight: any number of SPP adapters beside it, expert by expert.

The weight stays a parameter of the module that has it, and that module's own forward runs, its products replaced
(spp.layers.experts). An adapter has W_α (E, r, n) and W_β (E, m, 1), in the files under `<path>.experts.gate_up_proj`.

An adapter lies where its parameter is, under the same name, which attribute access finds first: `FindsAdapters` has a
model's `get_submodule` find the adapter, as transformers' `model.load_adapter` needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from spp.files import dtype_name
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
        self._packed_before_merge: tuple[PackedStack, ...] = ()
        if packed:
            self.hold_what_is_there()
            self.take_over()

    def restore(self) -> PackedExperts | None:
        """Let go of the weight as it is now, flags as PEFT leaves them; what was packed before stays packed."""
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
            return False  # what a checkpoint recomputes must draw the same numbers
        return not any(bool(self.spp_beta[name].any()) for name in self.active_names() if name in self.spp_terms)

    def multiplier(self) -> Callable[[int, Tensor], Tensor]:
        """Return what multiplies an expert's tokens x (t, n) by the active adapters' effective weight."""
        active, weights = self.active(), self.sources()
        assert active is not None
        experts, run = active.for_call(self.training).experts(), Run(self.saved_activations)
        return lambda expert, x: linear(x, weights[expert], None, experts[expert], run)

    def kept_weight(self) -> Tensor:
        """Return the tensor that holds the weight's numbers."""
        return self.stored_weight

    def base_weight(self) -> Tensor:
        """Return W as it was before any merge; of a packed one a dense copy."""
        for packed in self._packed_before_merge:
            return packed.dense()
        return self.dense_weight() if self._before_merge is None else self._before_merge

    def held(self) -> HeldWeight:
        """Return W as it was before any merge, as it is held."""
        for packed in self._packed_before_merge:
            return HeldWeight(dtype_name(packed.dtype), packed.tensors(), packed.dense)
        return super().held() if self._before_merge is None else HeldWeight.of_tensor(self._before_merge)

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
        packed = self._packed_before_merge or (() if self.packed_layout is None else (self.packed_experts(),))
        for stack in packed:
            yield from (matrix.dense() for matrix in stack.matrices())
        if not packed:
            yield from as_matrices(self.base_weight().detach(), transposed=self.input_axis == -2)

    def merged_weight(self, adapters: Sequence[str]) -> tuple[Tensor, LayerMerge] | None:
        """Return (W_merged as it is stored, what that did) for some adapters together; None where none is here.

        Raises:
            NonFiniteError, MaskError: as for `spp.merge`.
        """
        active = self.combined(adapters)
        if active is None:
            return None
        return merge_experts(self.base_matrices(), active, transposed=self.input_axis == -2, where=self.spp_name)

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
            self._packed_before_merge = (self.packed_experts(),)
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
            PackedStack(packed.layout, *(fn(t) for t in packed.tensors())) for packed in self._packed_before_merge
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
