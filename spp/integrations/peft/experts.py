"""The tuner layer of a fused expert weight: any number of SPP adapters beside it, expert by expert.

The weight stays a parameter of the module that has it, and that module's own forward runs, its products replaced
(spp.layers.experts). An adapter has W_α (E, r, n) and W_β (E, m, 1), in the files under `<path>.experts.gate_up_proj`.

An adapter is a submodule under the name of its parameter, which attribute access finds first. `FindsAdapters` makes a
model's `get_submodule` find the adapter, as transformers' `model.load_adapter` needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from spp.integrations.peft.terms import TermsLayer
from spp.layers.experts import ExpertsAdapter, PackedExperts
from spp.merging.report import LayerMerge
from spp.merging.weight import merge_experts
from spp.models.projection import Projection
from spp.rules import Adapter, get_rule
from spp.weights import Weight
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
        """Return the active adapters' sum, unless they are disabled or merged."""
        return TermsLayer.active(self)

    def held_now(self) -> Weight:
        """Return the weight, merged or not."""
        return ExpertsAdapter.held(self)

    def held(self) -> Weight:
        """Return W as it was before any merge."""
        return TermsLayer.held(self)

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
