"""SPPExperts: the adapter of a fused expert weight, one W_α and W_β an expert (the maths: spp.rules.spp).

    W (E, m, n), or (E, n, m) where inputs come first; of expert e: W_eff[e] = W[e] ⊙ (1 + s·β[e]·A[e])

The weight stays a parameter of the module that has it, and the module's own forward runs; its products with the weight
are replaced by those with the effective weight, expert by expert (spp.models.expert_products). Gradients come from
routed tokens only, and one expert's block of W_eff exists at a time. A packed weight is held by the adapter, and one
expert's block of W too.
"""

from __future__ import annotations

import torch
import torch.nn.utils.parametrize as parametrize

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, TargetError
from spp.layers.adapted import HoldsAdapter, adapter_config
from spp.layers.checks import check_values
from spp.layers.experts_forward import ExpertsAdapter, require_alone
from spp.models.projection import Projection
from spp.rules import get_rule
from spp.weights import DTYPES


class SPPExperts(HoldsAdapter, ExpertsAdapter):
    """The adapter of one fused expert weight; `adapt_experts` puts it in place.

    Args:
        projection: the fused weight, frozen from here on.
        r, scaling, dropout, dropout_mode, rule, packed: as in SPPConfig, for each expert. A packed weight stays
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

    def __init__(
        self,
        projection: Projection,
        r: int = 16,
        scaling: float = 2.0,
        dropout: float = 0.0,
        dropout_mode: str = "input",
        rule: str = "spp",
        *,
        packed: bool = False,
        generator: torch.Generator | None = None,
        checked: bool = False,
    ) -> None:
        super().__init__(projection)
        config = adapter_config(
            projection.path,
            r=r,
            scaling=scaling,
            dropout=dropout,
            dropout_mode=dropout_mode,
            rule=rule,
            packed=packed,
        )
        require_alone(projection)
        if not checked:
            check_experts(projection, config, r)
            check_values(projection)
        flags = [*(b.weight_requires_grad for b in self._before), projection.operand.requires_grad]
        self.weight_requires_grad = flags[0]
        if packed:
            self.hold_what_is_there()
        self.add_adapter(config, projection.path, self.held(), generator)
        self.stored_weight.requires_grad_(False)
        self.training = projection.module.training
        if packed:
            self.take_over()

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return self.describe(f"r={self.r}, scaling={self.scaling}, dropout={self.dropout}")


def check_experts(projection: Projection, config: SPPConfig, r: int) -> None:
    """Raise unless the form of a fused weight can be adapted: floating-point matrices that r fits."""
    where, weight = projection.path, projection.held()
    if projection.packed is not None and not config.packed:
        raise ConfigError(f"{where} is packed: pass packed=True, or call spp.unpack(model) first")
    if parametrize.is_parametrized(projection.module):
        raise TargetError(f"{where} has a parametrization; make it permanent first")
    if weight.dtype not in DTYPES:
        raise TargetError(f"{where} is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights")
    if config.packed and (weight.is_meta if projection.packed else projection.operand.is_meta):
        raise ConfigError(f"{where} is on the meta device and has no values to pack; load the model first")
    get_rule(config.rule).check_rank(projection.out_features, projection.in_features, r, where)
