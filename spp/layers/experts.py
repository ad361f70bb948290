"""SPPExperts: the adapter of a fused expert weight, one W_α and W_β an expert (the maths: spp.rules.spp).

    W (E, m, n), or (E, n, m) where inputs come first; of expert e: W_eff[e] = W[e] ⊙ (1 + s·β[e]·A[e])

The weight stays a parameter of the module that has it, and the module's own forward runs; its products with the weight
are replaced by those with the effective weight, expert by expert (spp.models.expert_products). Gradients come from
routed tokens only, and one expert's block of W_eff exists at a time. A packed weight is held by the adapter, and one
expert's block of W too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, TargetError
from spp.kernels import Run
from spp.kernels.linear import linear
from spp.layers.checks import check_values
from spp.layers.experts_forward import Multiply
from spp.layers.experts_packed import OverPackedExperts, PackedExperts, require_alone
from spp.models.projection import Projection
from spp.rules import Adapter, Rule, effective_weight, get_rule
from spp.rules.canonical import arithmetic_dtype
from spp.weights.holder import WRAPPED
from spp.weights.offload import home


class SPPExperts(OverPackedExperts):
    """The adapter of one fused expert weight; `adapt_experts` puts it in place.

    Args:
        projection: the fused weight, frozen from here on.
        r, scaling, dropout, dropout_mode, init, rule, packed: as in SPPConfig, for each expert. A packed weight stays
            with the adapter until `restore`; PackedExperts hand over theirs.
        generator: where the W_α are drawn from, expert after expert; None is torch's global generator.
        checked: whether `check_experts` and `check_values` have found it good: they are not asked again.

    Attributes:
        spp_alpha: W_α (E, r, n). spp_beta: W_β (E, m, 1).

    Raises:
        ConfigError: r > m or r < 1, or an option makes no sense.
        NonFiniteError: the weight holds NaN or infinity.
        TargetError: the weight is not floating-point, or has an adapter already.
        ConfigError: packed experts without packed=True, or packed=True on the meta device.
    """

    save_refusal = WRAPPED
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
        packed: bool = False,
        generator: torch.Generator | None = None,
        checked: bool = False,
    ) -> None:
        super().__init__(projection)
        config = SPPConfig(
            r=r, scaling=scaling, dropout=dropout, dropout_mode=dropout_mode, init=init, rule=rule, packed=packed
        )
        require_alone(projection)
        if not checked:
            check_experts(projection, config, r)
            check_values(projection)
        self.spp_rule: Rule = get_rule(rule)
        self.spp_init = init
        self.spp_name = projection.path
        self.r = r
        self.scaling = scaling
        self.dropout = dropout
        self.dropout_mode = dropout_mode
        self.disabled = False
        self.saved_activations = "full"
        flags = [*(b.weight_requires_grad for b in self._before), projection.operand.requires_grad]
        self.weight_requires_grad = flags[0]
        if packed:
            self.hold_what_is_there()
        stored = self.stored_weight
        dtype, device = arithmetic_dtype(stored.dtype), home(projection.module, stored)
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
        stored.requires_grad_(False)
        self.training = projection.module.training
        if packed:
            self.take_over()

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
        pairs = zip(self.dense_matrices(), self.of_experts(), strict=True)
        made = [effective_weight(self.spp_rule, w, params, self.scaling) for w, params in pairs]
        return torch.stack(made if self.input_axis == -1 else [w.T for w in made])

    def dense_matrices(self) -> Iterator[Tensor]:
        """Yield W (m, n) of each expert; of a packed weight a copy, decoded when it is asked for."""
        if self.packed_layout is None:
            yield from self.matrices()
        else:
            yield from (matrix.dense() for matrix in self.packed_experts().matrices())

    def has_no_effect(self) -> bool:
        """Whether W_eff is W and nothing is to be learned from this call: an untrained adapter in evaluation."""
        first = next(iter(self.adapter_parameters()))
        if torch.is_grad_enabled() or first.device.type != "cpu":  # elsewhere, asking would stall the device
            return False
        if self.training and self.dropout:  # what a checkpoint recomputes must draw the same numbers
            return False
        return self.spp_rule.is_idle(self.adapter_parameters(), self.scaling)

    def restore(self) -> PackedExperts | None:
        """Let go of the weight as it is now; PackedExperts come back if it is packed still."""
        if self.packed_layout is None:
            self.projection.operand.requires_grad_(self.weight_requires_grad)
            return None
        return self.release_packed()

    def multiplier(self) -> Multiply:
        """Return what multiplies an expert's tokens x (t, n) by its effective weight, for one forward."""
        weights, run = self.sources(), Run(self.saved_activations)
        adapter = Adapter(
            self.spp_rule, tuple(self.adapter_parameters()), self.scaling, self.dropout, self.dropout_mode
        )
        experts = adapter.for_call(self.training).experts()
        return lambda expert, x: linear(x, weights[expert], None, experts[expert], run)

    def home(self) -> torch.device:
        """Return the device that the adapter belongs on."""
        return home(self.projection.module, self.weight)

    def resident_names(self) -> tuple[str, ...]:
        """Return the names of W_α and W_β."""
        return tuple(self.spp_rule.attribute_names())

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"r={self.r}, scaling={self.scaling}, dropout={self.dropout}"
            + ("" if self.packed_layout is None else f", packed={self.packed_layout}")
        )


def check_experts(projection: Projection, config: SPPConfig, r: int) -> None:
    """Raise unless the form of a fused weight can be adapted: floating-point matrices that r fits."""
    where, held = projection.path, projection.packed
    if held is not None and not config.packed:
        raise ConfigError(f"{where} is packed: pass packed=True, or call spp.unpack(model) first")
    if parametrize.is_parametrized(projection.module):
        raise TargetError(f"{where} has a parametrization; make it permanent first")
    weight = projection.operand if held is None else held.stored_weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TargetError(f"{where} is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights")
    if config.packed and weight.is_meta:
        raise ConfigError(f"{where} is on the meta device and has no values to pack; load the model first")
    get_rule(config.rule).check_rank(projection.out_features, projection.in_features, r, where)
