"""Put SPP layers into a model and take them out again: the model stays the same object of the same class."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from spp.configs.adapter import SPPConfig, check_also_train
from spp.configs.checks import name_matches
from spp.distributed.sharded import refuse_shards
from spp.errors import ConfigError, arg
from spp.files.hashes import content_sha256
from spp.kernels import check_saved_activations
from spp.layers.checks import check_linear, check_values, warn_dense
from spp.layers.experts import SPPExperts, adapt_experts, check_experts, release_experts
from spp.layers.linear import SPPLinear
from spp.models.projection import Projection
from spp.models.targets import name_targets, resolve_projections
from spp.weights import HoldsWeight
from spp.weights.base_values import BaseVerdict
from spp.weights.offload import check_offloading
from spp.wrapping.also import AlsoTrained, find_also, put_also, take_also
from spp.wrapping.state import (
    Wrapping,
    check_quantizer,
    dtype_of_model,
    guard_saving,
    layer_generator,
    replace_modules,
    uncompiled,
)

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
AdapterLayer = SPPLinear | SPPExperts
_SPP: Wrapping[SPPConfig, AdapterLayer] = Wrapping(
    "_spp_state",
    SPPConfig,
    (SPPLinear, SPPExperts),
    linear="spp.SPPLinear",
    wrap="spp.wrap",
    load="spp.load_adapter",
    ways_out="spp.unwrap(model) takes the adapter out, spp.merge(model) merges it in, spp.load_adapter(model, path) "
    "replaces its values",
)
adapter_layers = _SPP.layers  # {path: layer} in module order, fused experts under the path of their parameter
is_wrapped = _SPP.is_in
require_layers = _SPP.require
refuse_wrapped = _SPP.refuse
SAVED_BY_ALL = "the adapter is saved by spp.save_adapter(model, path), called on every rank, or by SPPTrainer"
_LAYER_OPTIONS = ("scaling", "dropout", "dropout_mode", "rule", "packed")  # of SPPConfig, the same for all


def wrap(
    model: Model,
    r: int | SPPConfig = 16,
    *,
    scaling: float = 2.0,
    dropout: float = 0.0,
    dropout_mode: str = "input",
    target_modules: str | list[str] | tuple[str, ...] | None = None,
    exclude_modules: str | list[str] | tuple[str, ...] | None = None,
    rank_pattern: dict[str, int] | None = None,
    rule: str = "spp",
    packed: bool = False,
    seed: int | None = None,
    also_train: str | Sequence[str] = (),
) -> Model:
    """Adapt a pruned model in place: its projections become SPPLinear, everything but W_α and W_β is frozen
    (and what `also_train` names).

    With W_β zero at the start, the wrapped model computes exactly what the pruned one did. Fused experts keep their
    module, which gets SPPExperts beside the weights: r rows of W_α for each expert.

    Args:
        model: any torch module with linears; Hugging Face causal language models need no further arguments.
        r: rows of W_α in every layer, or a whole SPPConfig (then no other option).
        scaling, dropout, dropout_mode, target_modules, exclude_modules, rank_pattern, rule, packed, seed,
            also_train: as in SPPConfig.

    Returns:
        The same object.

    Raises:
        WrapError: the model is wrapped already.
        TargetError: nothing matches, or a match cannot be adapted.
        ConfigError: an option makes no sense or fits no layer; or the model is packed and packed=True is missing.
        NonFiniteError: a base weight holds NaN or infinity; the layer is named.
        In each case the model is left as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> model = wrap(model, r=2, target_modules="all-linear")  # doctest: +SKIP
    """
    options: dict[str, Any] = {
        "scaling": scaling,
        "dropout": dropout,
        "dropout_mode": dropout_mode,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "rank_pattern": rank_pattern,
        "rule": rule,
        "packed": packed,
        "seed": seed,
        "also_train": check_also_train(also_train),
    }
    if type(r) is int and r < 1:  # the error names the first layer that was to have it
        given = SPPConfig(**options)
        path = next(iter(resolve_projections(uncompiled(model), given.target_modules, given.exclude_modules)))
        raise ConfigError(f"{path}: r is {r}; it must be an int of at least 1")
    config = _SPP.options(r, options)
    given_model, model = model, uncompiled(model)
    check_quantizer(model)
    check_offloading(model)
    refuse_wrapped(model)
    targets = _SPP.targets(model, config.target_modules, config.exclude_modules)
    also, dtype = find_also(model, config.also_train, targets), dtype_of_model(model)
    check_targets(config, targets)
    layers = _SPP.put_in(model, config, targets, lambda target: _make_layer(target, config, dtype))
    _adapt_fused(layers)
    _SPP.state(model).also = put_also(model, also)
    guard_saving(model)
    logger.info(
        "wrapped %d layers, %d trainable parameters", len(targets), sum(p.numel() for p in adapter_parameters(model))
    )
    return given_model


def unwrap(model: Model) -> Model:
    """Take the adapter out: the pruned model again, bit for bit, with the requires_grad flags that it had before wrap.

    Args:
        model: wrapped; it is changed in place.

    Returns:
        The same object.

    Raises:
        WrapError: the model is not wrapped, or is sharded.

    Example:
        >>> pruned = unwrap(model)  # doctest: +SKIP
    """
    layers = require_layers(model).values()
    refuse_shards(uncompiled(model), "spp.unwrap", f"load the pruned model anew; {SAVED_BY_ALL}")
    for layer in layers:
        if isinstance(layer, SPPExperts):
            release_experts(layer.projection.module, SPPExperts)
    take_also(also_trained(model))
    _SPP.take_out(model, SPPLinear.restore)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute as the pruned model does, without the adapter: a context manager.

    Args:
        model: wrapped.

    Yields:
        Nothing; the adapter is active again afterwards.

    Raises:
        WrapError: the model is not wrapped.

    Example:
        >>> with disabled(model):  # doctest: +SKIP
        ...     pruned_logits = model(ids).logits
    """
    layers, also = list(require_layers(model).values()), also_trained(model).values()
    if also:
        instead = f"load the pruned model beside it, or wrap without {arg('also_train')}"
        refuse_shards(uncompiled(model), f"spp.disabled of a model with {arg('also_train')}", instead)
    before, shown = [layer.disabled for layer in layers], [one.shown() for one in also]
    try:
        for layer in layers:
            layer.disabled = True
        for one in also:
            one.show(one.original)
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.disabled = flag
        for one, parameter in zip(also, shown, strict=True):
            one.show(parameter)


def base_verdict(model: nn.Module) -> BaseVerdict:
    """Return whether a wrapped model has the values that its adapter was trained on: "same" unless it was loaded."""
    return _SPP.state(model).base


def set_loaded(model: nn.Module, verdict: BaseVerdict, origin: Mapping[str, Any]) -> None:
    """Remember what a loaded adapter says of the base, and the fields of its config that it says that with."""
    state = _SPP.state(model)
    state.base, state.loaded = verdict, (_parameters_hash(model), origin)


def origin_of_loaded(model: nn.Module) -> Mapping[str, Any] | None:
    """Return on which values an adapter says that it was trained; None unless it was loaded and not changed since."""
    loaded = _SPP.state(model).loaded
    return loaded[1] if loaded is not None and loaded[0] == _parameters_hash(model) else None


def _parameters_hash(model: nn.Module) -> str:
    """Return one hash of the parameters of all adapters, as they are now."""
    digest = hashlib.sha256()
    for path, layer in require_layers(model).items():
        digest.update(path.encode() + b"\0")
        for parameter in layer.adapter_parameters():
            digest.update(b"meta" if parameter.is_meta else content_sha256(parameter).encode())
    for one in also_trained(model).values():
        digest.update(b"meta" if one.trained.is_meta else content_sha256(one.trained).encode())
    return digest.hexdigest()


def adapter_config(model: nn.Module) -> SPPConfig:
    """Return the config that the model was wrapped with, its target_modules resolved to names (`name_targets`)."""
    names = name_targets(uncompiled(model), list(require_layers(model)))
    config: SPPConfig = _SPP.state(model).config
    return replace(config, target_modules=names, exclude_modules=None)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what an optimizer is given.

    Args:
        model: wrapped.

    Returns:
        The trained parameters in module order, of each layer W_α (r, n), then W_β (m, 1); after these what
        `also_train` names, in module order.

    Raises:
        WrapError: the model is not wrapped.
        ConfigError: accelerate offloads the adapter too.

    Example:
        >>> optimizer = torch.optim.AdamW(adapter_parameters(model), lr=4e-3)  # doctest: +SKIP
    """
    check_offloading(uncompiled(model))
    found = [parameter for layer in require_layers(model).values() for parameter in layer.adapter_parameters()]
    return found + [one.trained for one in also_trained(model).values()]


def also_trained(model: nn.Module) -> dict[str, AlsoTrained]:
    """Return {parameter name: what trains beside the adapter of a wrapped model}, in module order."""
    found: dict[str, AlsoTrained] = _SPP.state(model).also
    for one in found.values():
        one.follow()
    return found


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many; packed weights count as what they are dense.

    Args:
        model: wrapped or not.

    Example:
        >>> print_trainable_parameters(nn.Linear(2, 2))
        trainable params: 6 || all params: 6 || trainable%: 100.0000
    """
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    packed = {module for module in model.modules() if isinstance(module, HoldsWeight) and module.packed_layout}
    total = sum(p.numel() for p in parameters) + sum(layer.held().numel for layer in packed)
    share = 100 * trainable / max(total, 1)
    print(  # noqa: T201  the one function that prints, as PEFT's does
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
    )


@contextlib.contextmanager
def adapted(
    block: nn.Module, targets: Mapping[str, Projection], config: SPPConfig
) -> Iterator[dict[str, AdapterLayer]]:
    """Have adapters in the place of some projections of a part of a model; yields {path: layer}: a context manager."""
    layers = {path: _make_layer(target, config, None) for path, target in targets.items()}
    replace_modules(block, {id(targets[path].module): layers[path] for path in layers if not targets[path].fused})
    _adapt_fused(layers)
    try:
        yield layers
    finally:
        for layer in layers.values():
            if isinstance(layer, SPPExperts):
                release_experts(layer.projection.module, SPPExperts)
        plain = {id(layer): layer.restore() for layer in layers.values() if isinstance(layer, SPPLinear)}
        replace_modules(block, plain)


def check_rank_pattern(config: SPPConfig, paths: Sequence[str]) -> None:
    """Raise a ConfigError where an entry of rank_pattern means none of the targets, whose module paths are given."""
    unused = [n for n in config.rank_pattern or {} if not any(name_matches(path, n) for path in paths)]
    if unused:
        raise ConfigError(
            f"{arg('rank_pattern')}: {', '.join(unused)} matches none of the target modules, such as {paths[0]}"
        )


def _make_layer(target: Projection, config: SPPConfig, dtype: torch.dtype | None) -> AdapterLayer:
    r = config.rank_for(target.path)
    generator = None if config.seed is None else layer_generator(config.seed, target.path)
    if target.fused:
        return SPPExperts(target, replace(config, r=r), generator=generator, checked=True)
    options: dict[str, Any] = {name: getattr(config, name) for name in _LAYER_OPTIONS}
    return SPPLinear(target.module, r, dtype=dtype, where=target.path, generator=generator, checked=True, **options)  # type: ignore[arg-type]


def _adapt_fused(layers: dict[str, AdapterLayer]) -> None:
    """Put the adapters of fused experts in place, all of one module together."""
    of_module: dict[nn.Module, dict[str, SPPExperts]] = {}
    for layer in layers.values():
        if isinstance(layer, SPPExperts):
            of_module.setdefault(layer.projection.module, {})[layer.projection.name] = layer
    for adapters in of_module.values():
        adapt_experts(adapters)


def check_targets(config: SPPConfig, targets: dict[str, Projection]) -> None:
    """Raise what speaks against adapting any of the targets, before the first is touched; warn of dense ones."""
    check_rank_pattern(config, list(targets))
    for path, target in targets.items():
        if target.fused:
            check_experts(target, config, config.rank_for(path))
        else:
            check_linear(target.module, config, path, config.rank_for(path))
    surveys = {path: check_values(target) for path, target in targets.items()}
    warn_dense(surveys, "pack" if config.packed else "train")


def set_saved_activations(model: nn.Module, choice: str) -> None:
    """Choose in what form all layers of a wrapped model keep their input for backward.

    A choice of the run: it is no part of SPPConfig and is not saved with the adapter.

    Args:
        model: wrapped.
        choice: "full", or "bfloat16": float32 inputs are kept rounded to bfloat16, at half the memory. Outputs and the
            gradients of activations do not change; those of W_α and W_β see inputs that are off by at most 2⁻⁸ of each
            entry. 16-bit inputs stay as they are.

    Raises:
        ConfigError: another choice.
        WrapError: the model is not wrapped.

    Example:
        >>> set_saved_activations(spp.wrap(model), "bfloat16")  # doctest: +SKIP
    """
    check_saved_activations(choice)
    for layer in require_layers(model).values():
        layer.saved_activations = choice
