"""What can be adapted, and how it stores its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.layer_packed import PackedLinear
from spp.offload import offloader, values
from spp.packed import QuantizedLayout, quantized_kind, read_quantized
from spp.patterns import all_finite
from spp.rules import get_rule
from spp.targets_layout import features, is_conv1d


def check_linear(linear: nn.Module, config: SPPConfig, where: str, r: int | None = None) -> None:
    """Raise unless `linear` can be adapted: a floating-point, finite nn.Linear or Conv1D that r fits."""
    held = linear.packed_layout if isinstance(linear, PackedLinear) else None
    if isinstance(held, QuantizedLayout):
        pass
    elif isinstance(linear, PackedLinear):
        if not config.packed:
            raise ConfigError(f"{where} is packed: pass packed=True, or call spp.unpack(model) first")
    elif not isinstance(linear, nn.Linear) and not is_conv1d(linear):
        raise TargetError(
            f"{where} is a {type(linear).__name__}; SPP adapts torch.nn.Linear, its subclasses and transformers' Conv1D"
        )
    if isinstance(linear._parameters.get("weight"), torch.sparse.SparseSemiStructuredTensor):
        raise TargetError(
            f"{where}.weight is a semi-structured tensor, for inference only: load the pruned model again to train it"
        )
    if torch.nn.utils.parametrize.is_parametrized(linear):
        names = [name for name, _ in linear.parametrizations.named_children()]  # type: ignore[union-attr]
        raise TargetError(
            f"{where} has a parametrization on {', '.join(names)}; make it permanent first "
            f"with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(held, QuantizedLayout) or quantized_kind(linear):
        if config.packed:
            raise ConfigError(f"{where} is quantized, which is small already: it is not packed; packed=False")
        get_rule(config.rule).check_rank(*features(linear), r or config.r, where)
        if held is None:
            read_quantized(linear, f"{where}.weight")
        return
    weight = linear.stored_weight if isinstance(linear, PackedLinear) else linear.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TargetError(
            f"{where}.weight is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights"
        )
    if config.packed and not isinstance(linear, PackedLinear) and offloader(linear) is not None:
        raise ConfigError(f"{where} is offloaded by accelerate, and what is packed stays in memory: packed=False")
    if config.packed and weight.is_meta:
        raise ConfigError(f"{where}.weight is on the meta device and has no values to pack; load the model first")
    get_rule(config.rule).check_rank(*features(linear), r or config.r, where)
    weight = weight if isinstance(linear, PackedLinear) else values(linear)
    if not weight.is_meta and not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise NonFiniteError(
            f"{where}.weight holds {bad} NaN or infinite values of {weight.numel()}; mend or re-load the model first"
        )
