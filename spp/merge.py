"""Merge an adapter into the weights: the stored weight is bit for bit the one that the forward multiplied by.

W_merged = W_eff = round(W · (1 + s·β·A))      one rounding, zeros stay zeros, kept weights stay kept
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp.certificate import SparsityReport, fingerprint, report_from_tensors
from spp.errors import ConfigError, MaskError, NonFiniteError, SPPWarning
from spp.files import mask_sha256
from spp.inject import layer_generator, require_layers, uncompiled, unwrap
from spp.layer import SPPLinear
from spp.layer_packed import NAMES as PACKED_NAMES
from spp.layer_packed import PackedHolder
from spp.patterns import all_finite, nonzero_mask
from spp.rules import Rule, rescue_
from spp.rules.canonical import arithmetic_dtype
from spp.targets import is_projection_key, projection_weights

logger = logging.getLogger(__name__)
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ENOUGH_SURVIVED = 0.9
BLOCK_ELEMENTS = 2**22  # part of the format: a stochastic merge draws a block of rows after the other


@dataclass(frozen=True)
class LayerMerge:
    """What a merge did to one layer.

    Attributes:
        kept: weights that are not zero, before and after.
        rescued: of these, how many rounded to zero and were stored as the smallest magnitude that stays one.
        survived: ⟨W_merged − W, ΔW⟩ / ⟨ΔW, ΔW⟩, the share of the update that rounding left; 1 where ΔW is 0.
        max_relative_change: the largest |W_merged − W| / |W| over the kept weights.
        update_norm: ‖ΔW‖, Frobenius.
    """

    kept: int
    rescued: int
    survived: float
    max_relative_change: float
    update_norm: float


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What a merge did: per layer by module path, over all, and the sparsity of the result."""

    layers: dict[str, LayerMerge]
    survived: float
    sparsity_report: SparsityReport

    @classmethod
    def from_layers(cls, layers: dict[str, LayerMerge], sparsity_report: SparsityReport) -> MergeReport:
        """Sum the layers up and warn where rounding took more than a tenth of the update."""
        total = sum(layer.update_norm**2 for layer in layers.values())
        left = sum(layer.survived * layer.update_norm**2 for layer in layers.values())
        survived = left / total if total else 1.0
        if survived < ENOUGH_SURVIVED:
            warnings.warn(
                f"rounding to the stored dtype left {survived:.1%} of the update that the adapter learned: its changes "
                f"are smaller than the dtype's steps. Merge with dtype=torch.float32 or torch.float16, with "
                f"rounding='stochastic', or serve the adapter unmerged",
                SPPWarning,
                stacklevel=3,
            )
        return cls(layers, survived, sparsity_report)

    def __repr__(self) -> str:
        found = f"{len(self.layers)} layers, survived {self.survived:.4f}, rescued {self.rescued}"
        return f"MergeReport({found}, pattern {self.sparsity_report.pattern})"

    @property
    def kept(self) -> int:
        """Weights that are not zero, over all merged layers."""
        return sum(layer.kept for layer in self.layers.values())

    @property
    def rescued(self) -> int:
        """Kept weights that would have rounded to zero, over all merged layers."""
        return sum(layer.rescued for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "layers": {path: asdict(layer) for path, layer in self.layers.items()},
            "survived": self.survived,
            "kept": self.kept,
            "rescued": self.rescued,
            "sparsity_report": self.sparsity_report.to_dict(),
        }


def merge(
    model: nn.Module,
    *,
    check: bool = True,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
) -> MergeReport:
    """Merge the adapter into the weights in place and take the wrapping out; the zero pattern stays what it was.

    Args:
        model: wrapped.
        check: compute every layer once before the first is written, so that an error leaves the model as it was; False
            saves that pass, and an error then comes when earlier layers are merged already.
        dtype: store in another floating dtype; the whole model is converted. None keeps each weight's own.
        rounding: "nearest", or "stochastic" (unbiased; for 16-bit dtypes, from which small updates would vanish).
        seed: of stochastic rounding; None draws one from torch's global generator.

    Returns:
        MergeReport; a warning if less than nine tenths of the update survived the rounding.

    Raises:
        WrapError: the model is not wrapped.
        NonFiniteError: the adapter or a merged weight holds NaN or infinity, or a tensor overflows in `dtype`; named.
        MaskError: a zero would not stay one, or a kept weight would become one.

    Example:
        >>> report = merge(model)  # doctest: +SKIP
        >>> report.sparsity_report.pattern  # doctest: +SKIP
        '2:4'
    """
    model = uncompiled(model)
    layers = require_layers(model)
    check_rounding(dtype, rounding)
    seed = draw_seed(rounding, seed)
    results: dict[str, LayerMerge] = {}
    if check:
        for path, layer in layers.items():
            results[path] = _merge_layer(path, layer, dtype, rounding, seed)[1]
    if dtype is not None:
        _check_conversion(model, layers, dtype)
    masks = {name: mask_sha256(weight) for name, weight, _ in projection_weights(model)}
    extra = sorted({f"{path}.weight" for path in layers} - masks.keys())  # merged, but no projection by its name
    masks |= {name: mask_sha256(layers[name.removesuffix(".weight")].weight) for name in extra}
    base = {
        "name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "fingerprint": fingerprint(masks),
        "keys": extra,
    }
    for path, layer in layers.items():
        merged, results[path] = _merge_layer(path, layer, dtype, rounding, seed)
        _write_weight(layer, merged)
    unwrap(model)
    if dtype is not None:
        _convert_model(model, dtype)
    model._spp_base = base  # type: ignore[assignment]  # spp.save_model puts it into the certificate
    logger.info("merged %d layers", len(results))
    merged_others = [(name, model.get_parameter(name).detach(), -1) for name in extra]
    return MergeReport.from_layers(results, report_from_tensors([*projection_weights(model), *merged_others]))


def merge_tensor(
    rule: Rule,
    weight: Tensor,
    params: Sequence[Tensor],
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    where: str = "weight",
) -> tuple[Tensor, LayerMerge]:
    """Merge one weight: the canonical effective weight, checked, in a new tensor.

    Args:
        rule, params, scaling: the adapter; parameters on the device of `weight` or convertible to it.
        weight: W (m, n).
        dtype: of the result; None for that of `weight`.
        rounding: "nearest" or "stochastic"; the latter needs `generator`, a CPU generator.
        where: the layer's name in messages.

    Returns:
        (W_merged (m, n), what was done).

    Raises:
        NonFiniteError, MaskError: as for `merge`.
    """
    dtype = dtype or weight.dtype
    params = [p.detach().to(weight.device) for p in params]
    for name, parameter in zip(rule.attribute_names(), params, strict=True):
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"{where}.{name} holds NaN or infinity; nothing was merged")
    arithmetic = arithmetic_dtype(weight.dtype)
    factors = rule.prepare(params, scaling, weight.shape[0], arithmetic)
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    totals = _Totals()
    step = max(1, BLOCK_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        block = weight.detach()[rows]
        exact = torch.empty(block.shape, dtype=arithmetic, device=weight.device)
        rule.build(block, factors, rows, slice(None), exact)
        if rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16):
            assert generator is not None
            merged[rows] = round_stochastically(exact, dtype, generator)
        else:
            merged[rows] = exact
        rescued = rescue_(merged[rows], block)
        kept = _check_block(block, merged[rows], start, where)
        rule.delta(block, factors, rows, slice(None), exact)
        totals.add(block, merged[rows], exact, kept, int(torch.count_nonzero(rescued)))
    return merged, totals.result()


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to a 16-bit dtype, up or down with the probabilities that make the mean exact.

    Args:
        exact: float32 or float64; dtype: bfloat16 or float16; generator: on the CPU.
    """
    bits = exact.to(dtype).view(torch.int16)
    past = bits.view(dtype).to(exact.dtype).abs() > exact.abs()
    low = bits - past.to(torch.int16)  # toward zero: one magnitude step less, sign kept
    low_value = low.view(dtype).to(exact.dtype).abs()
    high_value = (low + 1).view(dtype).to(exact.dtype).abs()
    share = (exact.abs() - low_value) / (high_value - low_value)
    draw = torch.rand(exact.shape, generator=generator, dtype=torch.float32).to(exact.device)
    rounded = (low + (draw < share).to(torch.int16)).view(dtype)
    nearest = bits.view(dtype)
    return torch.where(torch.isinf(nearest), nearest, rounded)  # too large for the dtype: the caller raises


def check_rounding(dtype: torch.dtype | None, rounding: str) -> None:
    """Raise a ConfigError unless the options of a merge make sense."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding is {rounding!r}; known: {', '.join(ROUNDINGS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype}; a merge stores {', '.join(str(d) for d in DTYPES)}")


def draw_seed(rounding: str, seed: int | None) -> int:
    """Return the seed of a merge: `seed`, or for stochastic rounding without one a draw from torch's generator."""
    if seed is None and rounding == "stochastic":
        return int(torch.randint(2**62, (1,)))
    return seed or 0


class _Totals:
    """Sums over the blocks of one layer: rows in the arithmetic's dtype, over the rows in float64."""

    def __init__(self) -> None:
        self.kept = self.rescued = 0
        self.inner = self.square = self.largest = 0.0

    def add(self, weight: Tensor, merged: Tensor, update: Tensor, kept: int, rescued: int) -> None:
        before = weight.to(update.dtype)
        change = merged.to(update.dtype) - before
        self.kept += kept
        self.rescued += rescued
        self.inner += _sum(change * update)
        self.square += _sum(update * update)
        relative = change.div_(before).abs_().nan_to_num_(nan=0.0)  # 0 / 0 where pruned
        self.largest = max(self.largest, float(relative.amax()) if relative.numel() else 0.0)

    def result(self) -> LayerMerge:
        survived = self.inner / self.square if self.square else 1.0
        return LayerMerge(self.kept, self.rescued, survived, self.largest, math.sqrt(self.square))


def _sum(products: Tensor) -> float:
    return float(products.sum(-1).double().sum())


def _merge_layer(
    path: str, layer: SPPLinear, dtype: torch.dtype | None, rounding: str, seed: int
) -> tuple[Tensor, LayerMerge]:
    return merge_tensor(
        layer.spp_rule,
        layer.weight,
        layer.adapter_parameters(),
        layer.scaling,
        dtype=dtype,
        rounding=rounding,
        generator=layer_generator(seed, path),
        where=path,
    )


def _check_block(weight: Tensor, merged: Tensor, start: int, where: str) -> int:
    """Return how many weights are kept; raise unless `merged` is finite and zero exactly where the weight is."""
    if not all_finite(merged):
        row, col = (int(i) for i in (~torch.isfinite(merged)).nonzero()[0])
        raise NonFiniteError(
            f"{where}: the merged weight at [{start + row}, {col}] is {float(merged[row, col])} in {merged.dtype} (the "
            f"pruned one is {float(weight[row, col])}); nothing was written. Merge to a wider dtype or take an "
            f"earlier adapter"
        )
    kept = nonzero_mask(weight)
    differing = kept ^ nonzero_mask(merged)
    if bool(differing.any()):
        row, col = (int(i) for i in differing.nonzero()[0])
        raise MaskError(
            f"{where}: the merge would change the zero pattern in {int(differing.sum())} places, first at "
            f"[{start + row}, {col}]; nothing was written"
        )
    return int(torch.count_nonzero(kept))


def _write_weight(layer: SPPLinear, merged: Tensor) -> None:
    with torch.no_grad():
        if layer.packed_layout is None and merged.dtype == layer.weight.dtype:
            layer.weight.copy_(merged)  # the Parameter keeps its identity
        else:
            layer.hold_dense(merged)


def _check_conversion(model: nn.Module, layers: dict[str, SPPLinear], dtype: torch.dtype) -> None:
    """Raise a NonFiniteError where a tensor that the adapter leaves alone does not fit the dtype."""
    merged = {f"{path}.{name}" for path in layers for name in ("weight", *PACKED_NAMES)}
    for name, tensor in model.state_dict().items():
        if name in merged or not tensor.is_floating_point() or tensor.is_meta:
            continue
        if all_finite(tensor) and not all_finite(tensor.to(dtype)):
            raise NonFiniteError(f"{name} overflows in {dtype}; nothing was merged. Merge to a wider dtype")


def _convert_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert what a checkpoint would hold, parameters and persistent buffers; projections keep their zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                converted = parameter.data.to(dtype)
                if is_projection_key(name, parameter.ndim):
                    rescue_(converted, parameter.data)
                parameter.data = converted
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                    buffer_converted = buffer.to(dtype)
                    if isinstance(module, PackedHolder) and buffer.dtype != dtype:
                        rescue_(buffer_converted, buffer)
                    module._buffers[name] = buffer_converted
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "dtype"):
        config.dtype = dtype
