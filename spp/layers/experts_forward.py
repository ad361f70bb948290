"""The adapters beside fused expert weights, and the forward of their module: its own, with other products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spp.kernels import OffloadedExperts, PackedSource, WeightSource, base_linear
from spp.models.expert_products import ExpertProducts, plain_experts
from spp.models.projection import Projection, as_matrices
from spp.weights import HeldWeight, HoldsWeight, PackedStack
from spp.weights.hooks import let_go_on_error
from spp.weights.offload import fetch, offloader

_FOLLOWED = (None, "eager", "grouped_mm")  # the forms of transformers' experts whose products can be told apart
_opaque_forward: Callable[..., Any] | None = None
Multiply = Callable[[int, Tensor], Tensor]


class ExpertsAdapter(HoldsWeight):
    """An adapter beside a fused expert weight, which gives its products; `adapt_experts` puts it in place.

    The weight is a parameter of the module that it belongs to, which accelerate may have offloaded, or packed and held
    here.

    Args:
        projection: the fused weight.
    """

    disabled: bool
    weight_requires_grad: bool

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self._projection = (projection,)  # in a tuple: the module that it belongs to is no submodule of this one
        self.num_experts = projection.shape[0]
        self.out_features, self.in_features = projection.out_features, projection.in_features
        self.input_axis = projection.input_axis

    @property
    def projection(self) -> Projection:
        """The fused weight."""
        return self._projection[0]

    @property
    def weight(self) -> Tensor:
        """The fused weight as it is stored: (E, m, n) or (E, n, m); of a packed one a copy; on meta while offloaded."""
        return self.projection.operand if self.packed_layout is None else self.packed_weight().dense()

    def dense_weight(self) -> Tensor:
        """Return the fused weight with its numbers: of an offloaded one, what is loaded."""
        return self.projection.dense_weight() if self.packed_layout is None else self.weight

    def held(self) -> HeldWeight:
        """Return the fused weight as it is held."""
        return self.projection.held() if self.packed_layout is None else super().held()

    def matrices(self) -> list[Tensor]:
        """Return the experts' weights (m, n), views of `dense_weight`."""
        return as_matrices(self.dense_weight().detach(), transposed=self.input_axis == -2)

    @abstractmethod
    def has_no_effect(self) -> bool:
        """Whether W_eff is W and nothing is to be learned from this call."""

    @abstractmethod
    def multiplier(self) -> Multiply:
        """Return what multiplies an expert's tokens x (t, n) by its effective weight, for one forward."""

    def restore(self) -> ExpertsAdapter | None:
        """Let go of the weight, flags as before, and return what takes this one's place in the module, if anything."""
        self.projection.operand.requires_grad_(self.weight_requires_grad)
        return None

    def packed_experts(self) -> PackedStack:
        """Return the packed weight."""
        packed = self.packed_weight()
        assert isinstance(packed, PackedStack)
        return packed

    def hold_what_is_there(self) -> None:
        """Pack the weight, or take what is packed already. The source is freed in `take_over`."""
        held = self.projection.packed
        self.hold_packed(pack_experts(self.projection) if held is None else held.packed_weight())  # type: ignore[operator]

    def take_over(self) -> None:
        """Free the storage that held the weight before."""
        held = self.projection.packed
        if held is None:
            self.projection.release()
        else:
            assert isinstance(held, HoldsWeight)
            held.drop_weight()

    def unpack(self) -> None:
        """Have the module hold the dense weight again."""
        self.hold_dense(self.weight)

    def hold_dense(self, weight: Tensor) -> None:
        """Give the module a dense weight, as it is stored, in place of the packed one."""
        self.drop_weight()
        self.projection.hold(nn.Parameter(weight, requires_grad=False))

    def sources(self) -> Sequence[Tensor | WeightSource]:
        """Return what the experts' products take their weights from, for one call."""
        if self.packed_layout is not None:
            return [PackedSource(matrix) for matrix in self.packed_experts().matrices()]
        matrices, hook = self.matrices(), offloader(self.projection.module)
        if hook is None:
            return matrices
        name, dtype, transposed = self.projection.name, self.weight.dtype, self.input_axis == -2
        loaded = OffloadedExperts(lambda: as_matrices(fetch(hook, name, dtype), transposed=transposed))
        return loaded.sources(matrices)

    def frozen_multiplier(self) -> Multiply:
        """Return what multiplies an expert's tokens x (t, n) by its packed weight as it is."""
        sources = [PackedSource(matrix) for matrix in self.packed_experts().matrices()]
        return lambda expert, x: base_linear(x, sources[expert], None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertsAdapter:
        """Convert or move; the meta placeholder of a packed weight in the module follows its dtype."""
        super()._apply(fn, recurse)
        self.refresh()
        return self

    def refresh(self) -> None:
        """Set the dtype of the meta placeholder of a packed weight in the module."""
        if self.packed_layout is not None:
            self.projection.stand_for(self.stored_weight.dtype)


class ExpertsForward:
    """The forward of a module of fused experts whose weights are adapted or packed: its own, with other products.

    Args:
        module: that holds the fused weights, and what sits beside them as submodules of the same names.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get(_forward_name(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if torch.compiler.is_compiling():
            assert _opaque_forward is not None
            return _opaque_forward(self, *args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, its products with adapted or packed weights replaced."""
        inner = self.before or type(self.module).forward.__get__(self.module)
        adapters, multipliers = [], []
        for adapter in adapters_of(self.module).values():
            if adapter.packed_layout is not None:
                adapter.refresh()
                multipliers.append(adapter.frozen_multiplier() if adapter.disabled else adapter.multiplier())
            elif adapter.disabled or adapter.has_no_effect():
                continue
            else:
                multipliers.append(adapter.multiplier())
            adapters.append(adapter)
        if not adapters:
            return inner(*args, **kwargs)

        def multiply(index: int, expert: int, x: Tensor, _: bool) -> Tensor:
            return multipliers[index](expert, x)

        products = ExpertProducts([adapter.projection for adapter in adapters], multiply)
        with plain_experts([self.module], unless=_FOLLOWED), let_go_on_error(self.module), products:
            return inner(*args, **kwargs)

    def restore(self) -> None:
        """Give the module its own forward back."""
        name = _forward_name(self.module)
        if self.before is None and name == "forward":
            del self.module.__dict__[name]
        else:
            self.module.__dict__[name] = self.before or type(self.module).forward.__get__(self.module)


def _forward_name(module: nn.Module) -> str:
    """Return where a module's own forward is overridden: inside of accelerate's hook, which loads the weights first."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def adapters_of(module: nn.Module) -> dict[str, ExpertsAdapter]:
    """Return {parameter name: adapter} of a module of fused experts."""
    return {name: child for name, child in module._modules.items() if isinstance(child, ExpertsAdapter)}


def adapt_experts(adapters: Mapping[str, ExpertsAdapter]) -> None:
    """Put adapters of one module's fused weights in place: as submodules beside the parameters, and into its forward.

    Args:
        adapters: {parameter name: adapter}.
    """
    global _opaque_forward
    module = next(iter(adapters.values())).projection.module
    module._modules.update(adapters)  # under the names of parameters, which attribute access goes on to find first
    name = _forward_name(module)
    if not isinstance(module.__dict__.get(name), ExpertsForward):
        module.__dict__[name] = ExpertsForward(module)
    if _opaque_forward is None:  # not at import time: it imports the compiler, which takes seconds
        _opaque_forward = torch.compiler.disable(ExpertsForward.run)


def release_experts(module: nn.Module, kind: type[ExpertsAdapter] = ExpertsAdapter) -> None:
    """Take the adapters of a kind out of a module of fused experts; its weights stay as they are now."""
    for name, adapter in adapters_of(module).items():
        if isinstance(adapter, kind):
            follower = adapter.restore()
            if follower is None:
                del module._modules[name]
            else:
                module._modules[name] = follower
    forward = module.__dict__.get(_forward_name(module))
    if isinstance(forward, ExpertsForward) and not adapters_of(module):
        forward.restore()


def pack_experts(projection: Projection) -> PackedStack:
    """Return the packed weight of fused experts that a module holds dense."""
    matrices = projection.matrices()
    return PackedStack.pack(
        lambda expert: matrices[expert],
        len(matrices),
        transposed=projection.input_axis == -2,
        where=projection.parameter_path,
    )
