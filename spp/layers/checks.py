"""Checks of layers to adapt: of their form, which costs nothing to look at, and their values, which are read once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from spp.configs.adapter import SPPConfig
from spp.distributed.sharded import is_sharded
from spp.errors import ConfigError, NonFiniteError, SPPWarning, TargetError, arg, call
from spp.layers.host import PackedLinear, refuse_parametrization
from spp.masks.patterns import all_finite, nonzero_mask
from spp.models.projection import Projection, features, is_conv1d
from spp.models.targets import last_name
from spp.rules import get_rule
from spp.weights import DTYPES, QuantizedWeight, quantized_kind, read_quantized
from spp.weights.offload import offloader

_CHUNK = 1 << 17  # weights looked at together, which stay in a core's cache between the looks


@dataclass(frozen=True)
class Survey:
    """The findings of one pass over a weight's values.

    Attributes:
        numel: entries. kept: how many of them are not zero. bad: how many are NaN or infinite.
    """

    numel: int
    kept: int
    bad: int


def check_linear(linear: nn.Module, config: SPPConfig, where: str, r: int | None = None) -> None:
    """Raise unless the form of `linear` can be adapted: a floating-point nn.Linear or Conv1D that r fits.

    Its values are `check_values`' matter.
    """
    packed = linear.held() if isinstance(linear, PackedLinear) else None
    is_quantized = isinstance(packed, QuantizedWeight) or quantized_kind(linear) is not None
    if packed is not None and not is_quantized and not config.packed:
        raise ConfigError(f"{where} is packed: pass {arg('packed', True)}, or call spp.unpack(model) first")
    if not isinstance(linear, (nn.Linear, PackedLinear)) and not is_conv1d(linear):
        raise TargetError(
            f"{where} is a {type(linear).__name__}; SPP adapts torch.nn.Linear, its subclasses and transformers' Conv1D"
        )
    if isinstance(linear._parameters.get("weight"), torch.sparse.SparseSemiStructuredTensor):
        raise TargetError(
            f"{where}.weight is a semi-structured tensor, for inference only: load the pruned model again to train it"
        )
    refuse_parametrization(linear, where)
    refuse_sharded(linear._parameters.get("weight"), f"{where}.weight")
    if is_quantized:
        if config.packed:
            raise ConfigError(f"{where} is quantized, which is small already: pass {arg('packed', False)}")
        check_rank(config, features(linear), where, r)
        if packed is None:
            read_quantized(linear, f"{where}.weight")
        return
    weight = packed or linear.get_parameter("weight")
    if weight.dtype not in DTYPES:
        raise TargetError(
            f"{where}.weight is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights"
        )
    if config.packed and packed is None and offloader(linear) is not None:
        raise ConfigError(
            f"{where} is offloaded by accelerate, and what is packed stays in memory: pass {arg('packed', False)}"
        )
    if config.packed and weight.is_meta:
        raise ConfigError(f"{where}.weight is on the meta device and has no values to pack; load the model first")
    check_rank(config, features(linear), where, r)


def refuse_sharded(weight: object, where: str) -> None:
    """Raise a TargetError for a weight that is sharded already, by FSDP2 or by tensor parallelism."""
    plain = type(weight) in (nn.Parameter, torch.Tensor) and not hasattr(weight, "ds_id")
    if not plain and is_sharded(weight):
        raise TargetError(
            f"{where} is sharded already: load the model whole, wrap it and shard it afterwards, with fully_shard "
            f"(FSDP2) or by the Trainer, which shards the adapter with it; tensor-parallel weights are not supported"
        )


def check_rank(config: SPPConfig, shape: tuple[int, int], where: str, r: int | None = None) -> None:
    """Raise unless r fits a layer of out_features × in_features; one of a model may have its own, a layer alone not."""
    rule, asked = get_rule(config.rule), r or config.r
    most = rule.largest_rank(*shape)
    if asked > most:
        own = arg("rank_pattern", {last_name(where): max(1, most)})
        others = "" if r is None else f", or give layers of this name their own: {own}"
        rule.check_rank(*shape, asked, where, f"lower {arg('r')}{others}")


def check_values(target: Projection) -> Survey | None:
    """Return what one pass over a projection's values finds; None for a weight on the meta device.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.
    """
    found = survey(target)
    if found is not None and found.bad:
        raise NonFiniteError(
            f"{target.parameter_path} holds {found.bad} NaN or infinite values of {found.numel}; mend or re-load the "
            f"model first"
        )
    return found


def survey(target: Projection) -> Survey | None:
    """Return what one pass over a projection's values finds, however it is held; None on the meta device."""
    weight = target.held()
    if weight.is_meta:
        return None
    kept, bad, values = 0, 0, weight.entries()
    rows = values if values.dim() else values.view(1)
    step = max(1, _CHUNK // max(1, rows[0].numel())) if len(rows) else 1
    for part in rows.split(step):
        kept += int(torch.count_nonzero(nonzero_mask(part)))
        if not all_finite(part):
            bad += int((~torch.isfinite(part)).sum())
    return Survey(weight.numel, kept, bad)


def warn_dense(found: Mapping[str, Survey | None], purpose: str) -> None:
    """Warn of target layers without zeros.

    Args:
        found: {path of a layer that is adapted or packed: what its values are}.
        purpose: "train", or "pack", which saves no memory there.
    """
    dense = [path for path, one in found.items() if one is not None and one.numel and one.kept == one.numel]
    if not dense:
        return
    what = (
        f"all {len(dense)} target layers are"
        if len(dense) == len(found)
        else f"{len(dense)} of {len(found)} target layers are"
    )
    consequence = {
        "train": "SPP trains them, but there is no mask to preserve",
        "pack": f"packed, they take more memory than they did; name them in {arg('exclude_modules')}",
    }[purpose]
    warnings.warn(
        SPPWarning(
            f"{what} dense (no zeros), such as {dense[0]}: {consequence}. Prune first: "
            f"{call('prune', 'model, method, pattern')}"
        ),
        stacklevel=4,
    )
