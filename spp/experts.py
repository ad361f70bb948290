"""SPPExperts: the adapter of a fused expert weight, one W_α and W_β an expert (the maths: spp.rules.spp).

    W (E, m, n), or (E, n, m) where inputs come first; of expert e: W_eff[e] = W[e] ⊙ (1 + s·β[e]·A[e])

The weight stays a parameter of the module that has it, and the module's own forward runs; its products with the weight
are replaced by those with the effective weight, expert by expert (spp.targets_products). Gradients come from routed
tokens only, and one expert's block of W_eff exists at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from spp.config import SPPConfig
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.kernels import OffloadedExperts, WeightSource, linear
from spp.offload import fetch, home, offloader
from spp.offload_hooks import HookedAdapter, let_go_on_error
from spp.patterns import all_finite
from spp.rules import Rule, effective_weight, get_rule
from spp.rules.canonical import arithmetic_dtype
from spp.targets_layout import Projection, as_matrices
from spp.targets_products import ExpertProducts, set_experts_implementation

_FOLLOWED = (None, "eager", "grouped_mm")  # the forms of transformers' experts whose products can be told apart
_opaque_forward: Callable[..., Any] | None = None


class ExpertsAdapter(HookedAdapter):
    """What sits beside a fused expert weight and gives its products: `adapt_experts` puts it in place.

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

    @property
    def projection(self) -> Projection:
        """The fused weight."""
        return self._projection[0]

    @property
    def weight(self) -> Tensor:
        """The fused weight as it is stored: (E, m, n) or (E, n, m); on the meta device while offloaded."""
        return self.projection.weight

    def dense_weight(self) -> Tensor:
        """Return the fused weight with its numbers: of an offloaded one, what is loaded."""
        return self.projection.dense_weight()

    def matrices(self) -> list[Tensor]:
        """Return the experts' weights (m, n), views of `dense_weight`."""
        return as_matrices(self.dense_weight().detach(), transposed=self.projection.input_axis == -2)

    def sources(self) -> Sequence[Tensor | WeightSource]:
        """Return what the experts' products take their weights from, for one call."""
        matrices, hook = self.matrices(), offloader(self.projection.module)
        if hook is None:
            return matrices
        name, dtype, transposed = self.projection.name, self.weight.dtype, self.projection.input_axis == -2
        loaded = OffloadedExperts(lambda: as_matrices(fetch(hook, name, dtype), transposed=transposed))
        return loaded.sources(matrices)

    @abstractmethod
    def has_no_effect(self) -> bool:
        """Whether W_eff is W and nothing is to be learned from this call."""

    @abstractmethod
    def multiplier(self) -> Callable[[int, Tensor], Tensor]:
        """Return what multiplies an expert's tokens x (t, n) by its effective weight, for one forward."""


class SPPExperts(ExpertsAdapter):
    """The adapter of one fused expert weight; `adapt_experts` puts it in place.

    Args:
        projection: the fused weight, frozen from here on.
        r, scaling, dropout, dropout_mode, init, rule: as in SPPConfig, for each expert.
        generator: where the W_α are drawn from, expert after expert; None is torch's global generator.

    Attributes:
        spp_alpha: W_α (E, r, n). spp_beta: W_β (E, m, 1).

    Raises:
        ConfigError: r > m or r < 1, or an option makes no sense.
        NonFiniteError: the weight holds NaN or infinity.
        TargetError: the weight is not floating-point.
    """

    spp_alpha: nn.Parameter
    spp_beta: nn.Parameter

    def __init__(
        self,
        projection: Projection,
        r: int = 16,
        scaling: float = 2.0,
        dropout: float = 0.0,
        dropout_mode: str = "input",
        init: str = "paper",
        rule: str = "spp",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(projection)
        config = SPPConfig(r=r, scaling=scaling, dropout=dropout, dropout_mode=dropout_mode, init=init, rule=rule)
        check_experts(projection, config, r)
        self.spp_rule: Rule = get_rule(rule)
        self.spp_init = init
        self.spp_name = projection.path
        self.r = r
        self.scaling = scaling
        self.dropout = dropout
        self.dropout_mode = dropout_mode
        self.disabled = False
        self.grad_precision = "auto"
        self.saved_activations = "full"
        weight = projection.weight
        self.weight_requires_grad = weight.requires_grad
        dtype, device = arithmetic_dtype(weight.dtype), home(projection.module, weight)
        shapes = self.spp_rule.shapes(self.out_features, self.in_features, r)
        for name, shape in zip(self.spp_rule.attribute_names(), shapes, strict=True):
            empty = torch.empty(
                (self.num_experts, *shape), dtype=dtype, device="meta" if device.type == "meta" else "cpu"
            )
            self.register_parameter(name, nn.Parameter(empty))
        if device.type != "meta":
            self.reset_parameters(generator)
            for parameter in self.adapter_parameters():
                parameter.data = parameter.data.to(device)
        weight.requires_grad_(False)
        self.training = projection.module.training

    @property
    def stored_weight(self) -> Tensor:
        """What holds the weight's numbers: the fused weight."""
        return self.weight

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return [W_α, W_β] of all experts."""
        return [getattr(self, name) for name in self.spp_rule.attribute_names()]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the adapter anew in place, expert after expert."""
        for params in self.of_experts():
            self.spp_rule.init_(params, self.spp_init, generator)

    def of_experts(self) -> list[tuple[Tensor, ...]]:
        """Return (W_α (r, n), W_β (m, 1)) of each expert, views of the parameters."""
        return list(zip(*(parameter.unbind(0) for parameter in self.adapter_parameters()), strict=True))

    def effective_weight(self) -> Tensor:
        """Return W_eff in the weight's shape and dtype: what the products use and a merge stores, bit for bit."""
        matrices, params = self.matrices(), self.of_experts()
        made = [effective_weight(self.spp_rule, w, p, self.scaling) for w, p in zip(matrices, params, strict=True)]
        return torch.stack(made if self.projection.input_axis == -1 else [w.T for w in made])

    def has_no_effect(self) -> bool:
        """Whether W_eff is W and nothing is to be learned from this call: an untrained adapter in evaluation."""
        first = next(iter(self.adapter_parameters()))
        if torch.is_grad_enabled() or first.device.type != "cpu":  # elsewhere, asking would stall the device
            return False
        return self.spp_rule.is_idle(self.adapter_parameters())

    def multiplier(self) -> Callable[[int, Tensor], Tensor]:
        """Return what multiplies an expert's tokens x (t, n) by its effective weight, for one forward."""
        weights, params = self.sources(), self.of_experts()
        dropout = self.dropout if self.training else 0.0
        if dropout and self.dropout_mode == "alpha":
            params = [(F.dropout(first, dropout), *rest) for first, *rest in params]
            dropout = 0.0

        def multiply(expert: int, x: Tensor) -> Tensor:
            given = x, weights[expert], None, self.spp_rule, params[expert], self.scaling, dropout
            return linear(*given, self.grad_precision, self.saved_activations)

        return multiply

    def resident_names(self) -> tuple[str, ...]:
        """Return the names of W_α and W_β."""
        return tuple(self.spp_rule.attribute_names())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPExperts:
        """Convert or move; W_α and W_β follow the device, but keep the dtype of the arithmetic."""
        before = {name: self._parameters[name] for name in self.spp_rule.attribute_names()}
        values = {name: parameter.detach() for name, parameter in before.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, value in values.items():
            applied = self._parameters[name]
            assert applied is not None
            kept = torch.float64 if applied.dtype == torch.float64 else torch.float32
            if applied.dtype != kept:  # from the value as it was: no digit is lost on the way
                applied.data = value.to(applied.device, kept)
        return self

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"r={self.r}, scaling={self.scaling}, dropout={self.dropout}"
        )


class ExpertsForward:
    """The forward of a module of fused experts whose weights are adapted: its own, with other products.

    Args:
        module: that holds the fused weights, and their adapters as submodules of the same names.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get(_forward_name(module))
        self.implementation = set_experts_implementation(module, "eager", unless=_FOLLOWED)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if torch.compiler.is_compiling():
            assert _opaque_forward is not None
            return _opaque_forward(self, *args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, its products with adapted weights replaced."""
        inner = self.before or type(self.module).forward.__get__(self.module)
        adapters = [a for a in adapters_of(self.module).values() if not a.disabled and not a.has_no_effect()]
        if not adapters:
            return inner(*args, **kwargs)
        multipliers = [adapter.multiplier() for adapter in adapters]

        def multiply(index: int, expert: int, x: Tensor, _: bool) -> Tensor:
            return multipliers[index](expert, x)

        products = ExpertProducts([adapter.projection for adapter in adapters], multiply)
        with let_go_on_error(self.module), products:
            return inner(*args, **kwargs)

    def restore(self) -> None:
        """Give the module its own forward and implementation back."""
        name = _forward_name(self.module)
        if self.before is None and name == "forward":
            del self.module.__dict__[name]
        else:
            self.module.__dict__[name] = self.before or type(self.module).forward.__get__(self.module)
        set_experts_implementation(self.module, self.implementation)


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
    module.__dict__[_forward_name(module)] = ExpertsForward(module)
    if _opaque_forward is None:  # not at import time: it imports the compiler, which takes seconds
        _opaque_forward = torch.compiler.disable(ExpertsForward.run)


def release_experts(module: nn.Module) -> None:
    """Take the adapters of a module's fused weights out again; its parameters stay as they are now."""
    for name, adapter in adapters_of(module).items():
        adapter.projection.weight.requires_grad_(adapter.weight_requires_grad)
        del module._modules[name]
    forward = module.__dict__.get(_forward_name(module))
    if isinstance(forward, ExpertsForward):
        forward.restore()


def check_experts(projection: Projection, config: SPPConfig, r: int) -> None:
    """Raise unless a fused weight can be adapted: floating-point, finite, of matrices that r fits."""
    where, weight = projection.path, projection.weight
    if parametrize.is_parametrized(projection.module):
        raise TargetError(f"{where} has a parametrization; make it permanent first")
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TargetError(f"{where} is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights")
    if config.packed:
        raise ConfigError(
            f"{where}: fused experts are not packed; leave them out with exclude_modules, or pass packed=False"
        )
    get_rule(config.rule).check_rank(projection.out_features, projection.in_features, r, where)
    weight = projection.dense_weight()
    if not weight.is_meta and not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise NonFiniteError(
            f"{where} holds {bad} NaN or infinite values of {weight.numel()}; mend or re-load the model first"
        )
