"""Merge an adapter into the weights: the stored weight is bit for bit the one that the forward multiplied by.

W_merged = W_eff = round(W · (1 + s·β·A))      one rounding, zeros stay zeros, kept weights stay kept
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spp.certifying.certificate import TensorSparsity, make_report
from spp.certifying.scan import scan_tensor
from spp.distributed.sharded import refuse_shards
from spp.errors import ConfigError, NonFiniteError, arg, call
from spp.files import dtype_name
from spp.files.hashes import fingerprint
from spp.layers.experts import SPPExperts
from spp.masks.patterns import all_finite
from spp.merging.report import LayerMerge, MergeReport
from spp.merging.weight import check_rounding, draw_seed, merge_also, merge_cannot_fail, merge_weight, requantized
from spp.models.targets import (
    is_other_matrix,
    is_projection_key,
    packed_modules,
    projection_axes,
    projection_weights,
    weight_of,
)
from spp.rules import rescue_
from spp.rules.adapter import idle_reason
from spp.weights import NAMES as PACKED_NAMES
from spp.weights import HoldsWeight, QuantizedLayout, QuantizedWeight, quantize_like
from spp.weights.offload import in_memory, is_offloaded, offloader, write
from spp.wrapping.state import forget_quantizer, uncompiled
from spp.wrapping.wrap import SAVED_BY_ALL, AdapterLayer, also_trained, base_verdict, require_layers, unwrap

logger = logging.getLogger(__name__)


def merge(
    model: nn.Module,
    *,
    check: bool = True,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    requantize: bool = False,
) -> MergeReport:
    """Merge the adapter into the weights in place and take the wrapping out; the zero pattern stays what it was.

    Args:
        model: wrapped.
        check: show before the first layer is written that none can fail, so that an error leaves the model as it was:
            |W_eff| ≤ max|W| · (1 + max|s·β·A|) must fit the dtype. A layer for which that bound does not tell is
            merged once more beforehand. False skips this, and an error then comes when earlier layers are merged.
        dtype: store in another floating dtype; the whole model is converted. None keeps each weight's own.
        rounding: "nearest", or "stochastic" (unbiased; for 16-bit dtypes, from which small updates would vanish).
        requantize: quantize merged weights in the form that they had; without it they come back dense, and once
            nothing is quantized any more the model counts as a plain one. What the merge does not change keeps its
            codes; of the rest the report counts what was stored, against what the forward multiplied by.
        seed: of stochastic rounding; None draws one from torch's global generator.

    Returns:
        MergeReport, of the weights as they are stored; a warning if less than nine tenths of the update survived, if
        the error of quantizing again is large beside it, or if the adapter changes no weight at all.

    Raises:
        WrapError: the model is not wrapped, or is sharded.
        ConfigError: an option makes no sense, or accelerate has a weight offloaded to a disk, or any, and `dtype` is
            given: `spp.merge_checkpoint` is the way then. What is offloaded to memory is written there.
        NonFiniteError: the adapter or a merged weight holds NaN or infinity, or a tensor overflows in `dtype`; named.
        MaskError: a zero would not stay one, or a kept weight would become one.

    Example:
        >>> report = merge(model)  # doctest: +SKIP
        >>> report.sparsity_report.pattern  # doctest: +SKIP
        '2:4'
    """
    model = uncompiled(model)
    layers = require_layers(model)
    out = call("merge_checkpoint", "base, adapter, out")
    refuse_shards(model, "spp.merge", f"merge on the disk with {out}; {SAVED_BY_ALL}")
    check_rounding(dtype, rounding)
    _check_offloaded(model, layers, dtype)
    if requantize:
        _check_requantize(layers, dtype)
    seed, verdict = draw_seed(rounding, seed), base_verdict(model)
    compute = partial(_merge_layer, dtype=dtype, rounding=rounding, seed=seed, requantize=requantize)
    ready: dict[str, tuple[Tensor | QuantizedWeight, LayerMerge]] = {}
    if check:
        for path, layer in layers.items():
            if requantize and _quantized(layer) is not None:
                ready[path] = compute(path, layer)  # small enough to be kept
            elif not _cannot_fail(layer, dtype):
                compute(path, layer)
    if dtype is not None:
        _check_conversion(model, layers, dtype)
    named = {path if isinstance(layer, SPPExperts) else f"{path}.weight": layer for path, layer in layers.items()}
    base = describe_base(model, named)
    idle = idle_reason(layer.adapter() for layer in layers.values())
    stored: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "seed": seed}
    also = {
        name: (one.original, *merge_also([(one.trained, 1.0)], one.original, where=name, **stored))
        for name, one in also_trained(model).items()
    }
    results: dict[str, LayerMerge] = {}
    for path, layer in layers.items():
        merged, results[path] = ready.pop(path) if path in ready else compute(path, layer)
        if isinstance(merged, Tensor):
            _write_weight(layer, merged)
        else:
            layer.hold_packed(merged)
    unwrap(model)
    for original, merged_whole, _ in also.values():
        original.data = merged_whole.to(original.device)
    forget_quantizer(model)
    if dtype is not None:
        _convert_model(model, dtype)
    changes = {name: change for name, (_, _, change) in also.items()}
    report = report_merge(model, results, base, idle=idle, requantized=requantize, also=changes)
    return replace(report, base=verdict)


@dataclass(frozen=True)
class BaseMasks:
    """The zeros of a pruned model, which a merge does not change.

    Attributes:
        record: for the certificate: name_or_path, fingerprint, and keys that are no projections by their names.
        facts: {parameter name: its zeros}.
    """

    record: dict[str, Any]
    facts: dict[str, TensorSparsity]


def describe_base(model: nn.Module, merged: Mapping[str, Any]) -> BaseMasks:
    """Look at each projection once; it may be asked before a merge or after one.

    Args:
        merged: {parameter name: a module with its weight}.
    """
    scanned = {name: scan_tensor(weight, axis) for name, weight, axis in projection_weights(model)}
    extra = sorted(merged.keys() - scanned.keys())  # no projection by its name
    scanned |= {name: scan_tensor(merged[name].held().dense(), -1) for name in extra}
    masks = {name: found.mask for name, found in scanned.items()}
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    record = {"name_or_path": name, "fingerprint": fingerprint(masks), "keys": extra}
    return BaseMasks(record, {name: found.zeros for name, found in scanned.items()})


def report_merge(model: nn.Module, results: dict[str, LayerMerge], base: BaseMasks, **options: Any) -> MergeReport:
    """Remember the base of a merged model, for spp.save_model to put into the certificate, and report the merge.

    The zeros are the base's; a weight is looked at again only where quantizing it again made some.

    Args:
        options: of `MergeReport.from_layers`.
    """
    model._spp_base = base.record  # type: ignore[assignment]
    logger.info("merged %d layers", len(results))
    changed = {path for path, layer in results.items() if layer.lost}
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    packed: dict[str, Any] = packed_modules(model)
    facts = {}
    for name in (*projection_axes(model), *base.record["keys"]):
        found = base.facts[name]
        if name.removesuffix(".weight") in changed:
            found = scan_tensor(weight_of(model, name), -1).zeros
        elif name in packed:
            found = replace(found, dtype=dtype_name(packed[name].stored_weight.dtype))
        elif name in dtypes:
            found = replace(found, dtype=dtype_name(dtypes[name]))
        facts[name] = found
    return MergeReport.from_layers(results, make_report(facts), **options)


def _merge_layer(
    path: str, layer: AdapterLayer, *, dtype: torch.dtype | None, rounding: str, seed: int, requantize: bool
) -> tuple[Tensor | QuantizedWeight, LayerMerge]:
    """Return what is stored of a merged layer, in its own layout, and what was done.

    With `requantize`, a quantized weight comes in the form that it had; one that the merge left as it was keeps its
    codes and scales: quantizing it again could only add an error.
    """
    held, matrices, adapter = _quantized(layer) if requantize else None, _matrices(layer), layer.adapter()
    merged, done = merge_weight(
        matrices,
        adapter,
        transposed=layer.input_axis != -1,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        where=path,
    )
    if held is None:
        return merged, done
    if done.moved:
        held = quantize_like(held.layout, merged, path, asymmetric=held.nested is not None)
    (weight,) = matrices
    return held, requantized(weight, adapter, merged, held, done)


def _matrices(layer: AdapterLayer) -> Iterable[Tensor]:
    """Return W (m, n); of experts each one's, decoded in turn."""
    return (one.matrix() for one in layer.held().experts()) if isinstance(layer, SPPExperts) else [layer.matrix]


def _quantized(layer: AdapterLayer) -> QuantizedWeight | None:
    """Return the quantized weight of a layer; None where it has another form."""
    held = layer.held()
    return held if isinstance(held, QuantizedWeight) else None


def _cannot_fail(layer: AdapterLayer, dtype: torch.dtype | None) -> bool:
    """Whether a bound shows that merging a layer raises nothing; of a packed weight its kept values tell."""
    packed = layer.packed_layout is not None and _quantized(layer) is None
    adapters = layer.adapter().experts() if isinstance(layer, SPPExperts) else [layer.adapter()]
    weights = [layer.stored_weight] if packed else _matrices(layer)
    return merge_cannot_fail(weights, adapters, layer.out_features, dtype)


def _write_weight(layer: AdapterLayer, merged: Tensor) -> None:
    module, name = _holder(layer)
    if is_offloaded(module, name):
        write(module, name, merged)
        return
    with torch.no_grad():
        if isinstance(layer, SPPExperts) and layer.packed_layout is None:
            layer.projection.write(merged)
        elif layer.packed_layout is None and merged.dtype == layer.weight.dtype:
            layer.weight.copy_(merged)  # the Parameter keeps its identity
        else:
            layer.hold_dense(merged)


def _holder(layer: AdapterLayer) -> tuple[nn.Module, str]:
    """Return the module that has a layer's weight, and its name there."""
    return (layer.projection.module, layer.projection.name) if isinstance(layer, SPPExperts) else (layer, "weight")


def _check_offloaded(model: nn.Module, layers: Mapping[str, AdapterLayer], dtype: torch.dtype | None) -> None:
    """Raise a ConfigError where a merged weight could not be stored: on a disk, in another dtype than it has there."""
    held = {path: _holder(layer) for path, layer in layers.items()}
    on_disk = [path for path, (m, name) in held.items() if is_offloaded(m, name) and in_memory(m, name) is None]
    others = [path for path, module in model.named_modules() if dtype is not None and offloader(module) is not None]
    if not on_disk and not others:
        return
    what = f"{on_disk[0]} is offloaded to a disk" if on_disk else f"{others[0]} is offloaded"
    raise ConfigError(
        f"{what} by accelerate, and a merge in memory writes only to what lies in memory, in its own dtype. Merge on "
        f"disk: spp.save_adapter(model, path), then {call('merge_checkpoint', 'base, path, out')}, which holds one "
        f"shard at a time"
    )


def _check_requantize(layers: Mapping[str, AdapterLayer], dtype: torch.dtype | None) -> None:
    """Raise a ConfigError where quantizing again makes no sense."""
    if not any(isinstance(getattr(layer, "packed_layout", None), QuantizedLayout) for layer in layers.values()):
        raise ConfigError(f"{arg('requantize', True)}, but none of the merged weights is quantized; leave it out")
    if dtype is not None:
        raise ConfigError(
            f"{arg('requantize', True)} and {arg('dtype', dtype)}: a quantized weight has its own form; leave one of "
            f"them out"
        )


def _check_conversion(model: nn.Module, layers: dict[str, AdapterLayer], dtype: torch.dtype) -> None:
    """Raise a NonFiniteError where a tensor that the adapter leaves alone does not fit the dtype."""
    merged = {f"{path}.{name}" for path in layers for name in ("weight", *PACKED_NAMES)} | layers.keys()
    for name, tensor in model.state_dict().items():
        if name in merged or not tensor.is_floating_point() or tensor.is_meta:
            continue
        if all_finite(tensor) and not all_finite(tensor.to(dtype)):
            raise NonFiniteError(f"{name} overflows in {dtype}; nothing was merged. Merge to a wider dtype")


def _convert_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert what a checkpoint would hold, parameters and buffers; matrices but embeddings keep their zeros."""

    def converted(t: Tensor, is_matrix: bool) -> Tensor:
        result = t.to(dtype)
        if is_matrix and t.dtype != dtype:
            rescue_(result, t)
        return result

    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            is_matrix = is_projection_key(name, parameter.ndim) or is_other_matrix(
                name, parameter.ndim, parameter.dtype
            )
            parameter.data = converted(parameter.data, is_matrix)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = converted(buffer.detach(), isinstance(module, HoldsWeight))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "dtype"):
        config.dtype = dtype
