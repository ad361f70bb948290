"""Keep the frozen weights of a model packed, without an adapter, and unpack them again."""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from spp.errors import ConfigError, TargetError, WrapError
from spp.layers.checks import survey, warn_dense
from spp.layers.experts import PackedExperts, adapt_experts, check_packable_experts, release_experts
from spp.layers.host import PackedLinear, check_packable
from spp.models.targets import resolve_projections
from spp.wrapping.state import guard_saving, replace_modules, uncompiled
from spp.wrapping.wrap import is_wrapped

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
Names = str | list[str] | tuple[str, ...] | None


def pack(model: Model, *, target_modules: Names = None, exclude_modules: Names = None) -> Model:
    """Store the pruned weights of a model packed, in place: kept values and a mask.

    At most one dense weight exists beside the packed ones at any time, of those that nothing else refers to; fused
    experts stay with their module, and of them one expert's is copied at a time. Tensors mapped from a file, as
    safetensors loads them, are freed together, with the last one of the file: to load, prune and pack a model in one
    process takes the memory of both forms, to `spp.load_packed` a pruned checkpoint that of the packed one.

    The model computes what it did, to the order of summation of a product that is done in blocks, and each call
    decodes: meant for memory, and for many tokens a call. `spp.wrap(model, packed=True)` trains it, `spp.unpack(model)`
    is the way back.

    Args:
        model: any torch module with linears, Conv1D or fused experts; not wrapped.
        target_modules, exclude_modules: which of them, as in SPPConfig.

    Returns:
        The same object.

    Raises:
        WrapError: the model is wrapped.
        TargetError: nothing matches, or a match cannot be packed.
        ConfigError: a weight is quantized, or on the meta device. The model is left as it was.

    Example:
        >>> model = pack(model)  # doctest: +SKIP
    """
    given, model = model, uncompiled(model)
    if is_wrapped(model):
        raise WrapError("the model is wrapped: wrap it with spp.wrap(model, packed=True), or spp.unwrap(model) first")
    targets = resolve_projections(model, target_modules, exclude_modules)
    if "" in targets:
        raise TargetError("the model itself is a linear, which cannot be replaced in place; use PackedLinear(linear)")
    fresh = {path: target for path, target in targets.items() if target.packed is None}
    for path, target in fresh.items():
        if target.fused:
            check_packable_experts(target)
        else:
            check_packable(target.module, path)
    if fresh:
        warn_dense({path: survey(target) for path, target in fresh.items()}, "pack")
    for path, target in fresh.items():
        if target.fused:
            adapt_experts({target.name: PackedExperts(target)})
        else:
            replace_modules(model, {id(target.module): PackedLinear(target.module, where=path)})
    guard_saving(model)
    logger.info("packed %d layers", len(fresh))
    return given


def unpack(model: Model) -> Model:
    """Make every packed weight dense again, in place; the modules that had been packed return.

    Args:
        model: packed by `spp.pack`, or loaded by `spp.load_packed`.

    Returns:
        The same object.

    Raises:
        WrapError: the model is wrapped.
        ConfigError: nothing in the model is packed.

    Example:
        >>> unpack(spp.load_packed("packed")).save_pretrained("dense")  # doctest: +SKIP
    """
    given, model = model, uncompiled(model)
    if is_wrapped(model):
        raise WrapError("the model is wrapped: spp.merge(model) or spp.unwrap(model) first, then unpack")
    layers = packed_layers(model)
    if not layers:
        raise ConfigError("nothing in the model is packed; spp.pack(model) packs it")
    for layer in layers.values():
        if isinstance(layer, PackedExperts):
            release_experts(layer.projection.module, PackedExperts)
        else:
            replace_modules(model, {id(layer): layer.restore()})
    guard_saving(model)
    return given


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedExperts]:
    """Return {path: layer} of what is packed without an adapter, in module order; experts by their parameter's path."""
    found = uncompiled(model).named_modules()
    return {path: module for path, module in found if isinstance(module, PackedLinear | PackedExperts)}
