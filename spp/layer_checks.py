"""What can be adapted."""

from __future__ import annotations

import torch
from torch import nn

from spp.config import SPPConfig
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.layer_packed import PackedLinear
from spp.patterns import all_finite
from spp.rules import get_rule


def check_linear(linear: nn.Module, config: SPPConfig, where: str, r: int | None = None) -> None:
    """Raise unless `linear` can be adapted: a floating-point, finite nn.Linear that r fits."""
    if isinstance(linear, PackedLinear):
        if not config.packed:
            raise ConfigError(f"{where} is packed: pass packed=True, or call spp.unpack(model) first")
    elif not isinstance(linear, nn.Linear):
        raise TargetError(f"{where} is a {type(linear).__name__}; SPP adapts torch.nn.Linear and its subclasses")
    if torch.nn.utils.parametrize.is_parametrized(linear):
        names = [name for name, _ in linear.parametrizations.named_children()]  # type: ignore[union-attr]
        raise TargetError(
            f"{where} has a parametrization on {', '.join(names)}; make it permanent first "
            f"with torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = linear.stored_weight if isinstance(linear, PackedLinear) else linear.weight
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TargetError(
            f"{where}.weight is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights"
        )
    if config.packed and weight.is_meta:
        raise ConfigError(f"{where}.weight is on the meta device and has no values to pack; load the model first")
    get_rule(config.rule).check_rank(linear.out_features, linear.in_features, r or config.r, where)
    if not weight.is_meta and not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise NonFiniteError(
            f"{where}.weight holds {bad} NaN or infinite values of {weight.numel()}; mend or re-load the model first"
        )
