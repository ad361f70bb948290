"""The adapters beside fused expert weights, and the forward of their module: its own, with other products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, TargetError, arg
from spp.kernels import Run, base_linear
from spp.kernels.linear import linear
from spp.layers.adapted import HoldsAdapter
from spp.layers.checks import check_rank, check_values, refuse_sharded
from spp.layers.host import Opaque, check_packable_weight, refuse_parametrization
from spp.models.expert_products import ExpertProducts, plain_experts
from spp.models.projection import Projection
from spp.rules import Adapter
from spp.weights import DTYPES, HoldsWeight, PackedStack, Weight
from spp.weights.holder import PACKED
from spp.weights.offload import let_go_on_error, parameter_weight

_FOLLOWED = (None, "eager", "grouped_mm")  # the forms of transformers' experts whose products can be told apart
Multiply = Callable[[int, Tensor], Tensor]


class ExpertsAdapter(HoldsWeight):
    """An adapter beside a fused expert weight, which gives its products; `adapt_experts` puts it in place.

    The weight is a parameter of the module that it belongs to, which accelerate may have offloaded, or packed and held
    here. One that PackedExperts held goes back to them.
    """

    disabled: bool
    saved_activations: str = "full"
    weight_requires_grad: bool

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self._projection = (projection,)  # in a tuple: the module that it belongs to is no submodule of this one
        self.num_experts = projection.shape[0]
        self.out_features, self.in_features = projection.out_features, projection.in_features
        self.input_axis = projection.input_axis
        before = projection.packed
        self._before = (before,) if isinstance(before, PackedExperts) else ()  # in a tuple: no submodule

    @property
    def projection(self) -> Projection:
        """The fused weight."""
        return self._projection[0]

    @property
    def weight(self) -> Tensor:
        """The fused weight as it is stored: (E, m, n) or (E, n, m); of a packed one a copy; on meta while offloaded."""
        return self.projection.operand if self.packed_layout is None else self.held().dense()

    @property
    def stored_weight(self) -> Tensor:
        return self.projection.operand if self.packed_layout is None else super().stored_weight

    def held(self) -> Weight:
        if self.packed_layout is not None:
            return super().held()
        return parameter_weight(self.projection.module, self.projection.name, self.input_axis)

    @abstractmethod
    def active(self) -> Adapter | None:
        """Return the adapter to compute with; None computes with W."""

    def has_no_effect(self) -> bool:
        """Whether W_eff is W and nothing is to be learned from this call."""
        active = None if self.disabled else self.active()
        if active is None:
            return True
        if torch.is_grad_enabled() or active.params[0].device.type != "cpu":  # elsewhere, asking would stall the device
            return False
        if self.training and active.dropout:  # what a checkpoint recomputes must draw the same dropout
            return False
        return active.is_idle()

    def multiplier(self) -> Multiply:
        """Return what multiplies an expert's tokens x (t, n) by its effective weight, for one forward."""
        weights, active = self.held().experts(), self.active()
        if active is None:
            return lambda expert, x: base_linear(x, weights[expert], None)
        adapters, run = active.for_call(self.training).experts(), Run(self.saved_activations)
        return lambda expert, x: linear(x, weights[expert], None, adapters[expert], run)

    def restore(self) -> PackedExperts | None:
        """Give the weight back as it is now, flags as before; PackedExperts come back if it is packed still."""
        if self.packed_layout is not None:
            for before in self._before:
                before.hold_packed(self.held())
                self.drop_weight()
                return before
            self.hold_dense(self.weight)
        self.projection.operand.requires_grad_(self.weight_requires_grad)
        return None

    def hold_what_is_there(self) -> None:
        """Pack the weight, or take what is packed already. The source is freed in `take_over`."""
        packed = self.projection.packed
        self.hold_packed(pack_experts(self.projection) if packed is None else self.projection.held())

    def take_over(self) -> None:
        """Free the storage that held the weight before."""
        held = self.projection.packed
        if held is None:
            self.projection.release()
        else:
            assert isinstance(held, HoldsWeight)
            held.drop_weight()

    def hold_dense(self, weight: Tensor) -> None:
        """Give the module a dense weight, as it is stored, in place of the packed one."""
        self.drop_weight()
        self.projection.hold(nn.Parameter(weight, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertsAdapter:
        """Convert or move; the meta placeholder of a packed weight in the module follows its dtype."""
        super()._apply(fn, recurse)
        self.refresh()
        return self

    def refresh(self) -> None:
        """Set the dtype of the meta placeholder of a packed weight in the module."""
        if self.packed_layout is not None:
            self.projection.stand_for(self.stored_weight.dtype)

    def sizes(self) -> str:
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class PackedExperts(ExpertsAdapter):
    """The packed weight of fused experts; `adapt_experts` puts it in place, and the module's own forward runs.

    Each product of an expert's tokens decodes that expert's matrix, a block at a time.

    Args:
        projection: the fused weight, which is freed in the module.
        packed: the weight, packed already (then the module's may be on the meta device); None packs it.

    Raises:
        TargetError: it is no weight of float64, float32, bfloat16 or float16.
        ConfigError: it is on the meta device.
    """

    save_refusal = PACKED

    def __init__(self, projection: Projection, packed: PackedStack | None = None) -> None:
        super().__init__(projection)
        if packed is None:
            check_packable_experts(projection)
        self.disabled = False
        self.weight_requires_grad = projection.operand.requires_grad
        if packed is None:
            self.hold_what_is_there()
        else:
            self.hold_packed(packed)
        projection.release()
        self.refresh()
        self.train(projection.module.training)

    def active(self) -> None:
        """Return nothing: there is no adapter."""


class ExpertsForward:
    """The forward of a module of fused experts whose weights are adapted or packed: its own, with other products."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get(_forward_name(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if torch.compiler.is_compiling():
            assert Opaque.call is not None
            return Opaque.call(ExpertsForward.run, self, *args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, its products with adapted or packed weights replaced."""
        inner = self.before or type(self.module).forward.__get__(self.module)
        adapters, multipliers = [], []
        for adapter in adapters_of(self.module).values():
            if adapter.has_no_effect() and adapter.packed_layout is None:
                continue
            adapter.refresh()
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
    """Put {parameter name: adapter} of a module in place: as submodules beside the weights, and into its forward."""
    module = next(iter(adapters.values())).projection.module
    module._modules.update(adapters)  # under the names of parameters, which attribute access goes on to find first
    name = _forward_name(module)
    if not isinstance(module.__dict__.get(name), ExpertsForward):
        module.__dict__[name] = ExpertsForward(module)
    Opaque.prepare()


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


def require_alone(projection: Projection) -> None:
    """Raise a TargetError where an adapter, such as PEFT's, sits beside a fused weight already."""
    beside = adapters_of(projection.module).get(projection.name)
    if beside is not None and not isinstance(beside, PackedExperts):
        raise TargetError(f"{projection.path} has a {type(beside).__name__} beside it already; take that out first")


def check_packable_experts(projection: Projection) -> None:
    """Raise unless a fused weight can be packed: plain, floating-point and in memory."""
    where = projection.parameter_path
    require_alone(projection)
    refuse_parametrization(projection.module, where)
    check_packable_weight(projection.weight, where)


# ---- SPPExperts: one W_α and W_β an expert (the maths: spp.rules.spp).
#
#     W (E, m, n), or (E, n, m) where inputs come first; of expert e: W_eff[e] = W[e] ⊙ (1 + s·β[e]·A[e])
#
# The weight stays a parameter of the module that has it, and the module's own forward runs; its products with the
# weight are replaced by those with the effective weight, expert by expert (spp.models.expert_products). Gradients come
# from routed tokens only, and one expert's block of W_eff exists at a time. A packed weight is held by the adapter, and
# one expert's block of W too.


class SPPExperts(HoldsAdapter, ExpertsAdapter):
    """The adapter of one fused expert weight; `adapt_experts` puts it in place.

    Args:
        projection: the fused weight, frozen from here on.
        config: of each expert's adapter. A packed weight stays with it until `restore`; PackedExperts hand over theirs.
        generator: where the W_α are drawn from, expert after expert; None is torch's global generator.
        checked: whether `check_experts` and `check_values` have found it good: they are not asked again.

    Attributes:
        spp_alpha: W_α (E, r, n). spp_beta: W_β (E, m, 1).

    Raises:
        ConfigError: r > m; packed experts without packed=True, or packed=True on the meta device.
        NonFiniteError: the weight holds NaN or infinity.
        TargetError: the weight is not floating-point, or has an adapter already.
    """

    def __init__(
        self,
        projection: Projection,
        config: SPPConfig,
        *,
        generator: torch.Generator | None = None,
        checked: bool = False,
    ) -> None:
        super().__init__(projection)
        require_alone(projection)
        if not checked:
            check_experts(projection, config, config.r)
            check_values(projection)
        flags = [*(b.weight_requires_grad for b in self._before), projection.operand.requires_grad]
        self.weight_requires_grad = flags[0]
        if config.packed:
            self.hold_what_is_there()
        self.add_adapter(config, projection.path, self.held(), generator)
        self.stored_weight.requires_grad_(False)
        self.training = projection.module.training
        if config.packed:
            self.take_over()


def check_experts(projection: Projection, config: SPPConfig, r: int) -> None:
    """Raise unless the form of a fused weight can be adapted: floating-point matrices that r fits."""
    where, weight = projection.path, projection.held()
    if projection.packed is not None and not config.packed:
        raise ConfigError(f"{where} is packed: pass {arg('packed', True)}, or call spp.unpack(model) first")
    refuse_parametrization(projection.module, where)
    refuse_sharded(projection.module._parameters.get(projection.name), where)
    if weight.dtype not in DTYPES:
        raise TargetError(f"{where} is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights")
    if config.packed and (weight.is_meta if projection.packed else projection.operand.is_meta):
        raise ConfigError(f"{where} is on the meta device and has no values to pack; load the model first")
    check_rank(config, (projection.out_features, projection.in_features), where, r)
