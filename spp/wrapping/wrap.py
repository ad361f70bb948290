"""Put SPP layers into a model and take them out again: the model stays the same object of the same class."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from spp.configs.adapter import SPPConfig
from spp.configs.checks import name_matches
from spp.errors import ConfigError, TargetError, WrapError, arg
from spp.kernels import check_saved_activations
from spp.layers.checks import Survey, check_linear, check_values, warn_dense
from spp.layers.experts import SPPExperts, check_experts
from spp.layers.experts_forward import adapt_experts, release_experts
from spp.layers.linear import SPPLinear
from spp.models.projection import Projection
from spp.models.targets import name_targets, resolve_projections
from spp.weights import HoldsWeight
from spp.weights.base_values import BaseVerdict
from spp.weights.offload import check_offloading
from spp.wrapping.state import (
    WrapState,
    begin,
    check_quantizer,
    dtype_of_model,
    end,
    guard_saving,
    layer_generator,
    uncompiled,
)

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
AdapterLayer = SPPLinear | SPPExperts
_STATE = "_spp_state"


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
    init: str = "paper",
    rule: str = "spp",
    packed: bool = False,
    seed: int | None = None,
) -> Model:
    """Adapt a pruned model in place: its projections become SPPLinear, everything but W_α and W_β is frozen.

    With W_β zero at the start, the wrapped model computes exactly what the pruned one did. Fused experts keep their
    module, which gets SPPExperts beside the weights: r rows of W_α for each expert.

    Args:
        model: any torch module with linears; Hugging Face causal language models need no further arguments.
        r: rows of W_α in every layer, or a whole SPPConfig (then no other option).
        scaling, dropout, dropout_mode, target_modules, exclude_modules, rank_pattern, init, rule, packed, seed:
            as in SPPConfig.

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
        "init": init,
        "rule": rule,
        "packed": packed,
        "seed": seed,
    }
    config = _make_config(model, r, options)
    given, model = model, uncompiled(model)
    check_quantizer(model)
    check_offloading(model)
    if is_wrapped(model):
        raise WrapError(
            "the model is wrapped already; spp.unwrap(model) takes the adapter out, spp.merge(model) merges it in, "
            "spp.load_adapter(model, path) replaces its values"
        )
    targets = resolve_projections(model, config.target_modules, config.exclude_modules)
    warn_dense(_check_targets(config, targets), "train" if not config.packed else "pack")
    state = WrapState.of(model, config)
    layers: dict[int, SPPLinear] = {}
    experts: dict[nn.Module, dict[str, SPPExperts]] = {}
    dtype = dtype_of_model(model)
    try:
        for target in targets.values():
            if target.fused:
                experts.setdefault(target.module, {})[target.name] = SPPExperts(target, **_options(config, target.path))
            else:
                layers[id(target.module)] = _make_layer(target, config, dtype)
    except BaseException:
        made: list[Any] = [*layers.values(), *(adapter for of in experts.values() for adapter in of.values())]
        for layer in made:
            layer.restore()
        state.restore_flags(model)
        raise
    begin(model, _STATE, state, layers)
    for adapters in experts.values():
        adapt_experts(adapters)
    guard_saving(model)
    logger.info(
        "wrapped %d layers, %d trainable parameters", len(targets), sum(p.numel() for p in adapter_parameters(model))
    )
    return given


def unwrap(model: Model) -> Model:
    """Take the adapter out: the pruned model again, bit for bit, with the requires_grad flags that it had before wrap.

    Args:
        model: wrapped; it is changed in place.

    Returns:
        The same object.

    Raises:
        WrapError: the model is not wrapped.

    Example:
        >>> pruned = unwrap(model)  # doctest: +SKIP
    """
    given, model = model, uncompiled(model)
    layers = require_layers(model)
    for layer in layers.values():
        if isinstance(layer, SPPExperts):
            release_experts(layer.projection.module, SPPExperts)
    end(model, _STATE, {id(layer): layer.restore() for layer in layers.values() if isinstance(layer, SPPLinear)})
    return given


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute as the pruned model does, without the adapter, inside a `with` block.

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
    layers = list(require_layers(model).values())
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.disabled = flag


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return {path: layer} of the adapted layers in module order, fused experts under the path of their parameter."""
    return {path: module for path, module in uncompiled(model).named_modules() if isinstance(module, AdapterLayer)}


def base_verdict(model: nn.Module) -> BaseVerdict:
    """Return whether a wrapped model has the values that its adapter was trained on: "same" unless it was loaded."""
    require_layers(model)
    state: WrapState = getattr(uncompiled(model), _STATE)
    return state.base


def set_base_verdict(model: nn.Module, verdict: BaseVerdict) -> None:
    """Remember what a loaded adapter says of the base."""
    require_layers(model)
    getattr(uncompiled(model), _STATE).base = verdict


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model holds SPP layers."""
    return any(isinstance(module, AdapterLayer) for module in uncompiled(model).modules())


def require_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return `adapter_layers(model)`; a WrapError where `wrap` did not make it."""
    model = uncompiled(model)
    if not hasattr(model, _STATE):
        if is_wrapped(model):
            raise WrapError("this is a part or a container of a wrapped model; pass the object that spp.wrap was given")
        raise WrapError("the model is not wrapped; call spp.wrap(model) or spp.load_adapter(model, path) first")
    return adapter_layers(model)


def adapter_config(model: nn.Module) -> SPPConfig:
    """Return the config that the model was wrapped with, its target_modules resolved to names (`name_targets`)."""
    model = uncompiled(model)
    layers = require_layers(model)
    config: SPPConfig = getattr(model, _STATE).config
    return replace(config, target_modules=name_targets(model, list(layers)), exclude_modules=None)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what an optimizer is given.

    Args:
        model: wrapped.

    Returns:
        The trained parameters in module order, of each layer W_α (r, n), then W_β (m, 1).

    Raises:
        WrapError: the model is not wrapped.
        ConfigError: accelerate offloads the adapter too.

    Example:
        >>> optimizer = torch.optim.AdamW(adapter_parameters(model), lr=4e-3)  # doctest: +SKIP
    """
    check_offloading(uncompiled(model))
    return [parameter for layer in require_layers(model).values() for parameter in layer.adapter_parameters()]


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
    total = sum(p.numel() for p in parameters) + sum(layer.packed_weight().numel for layer in packed)
    share = 100 * trainable / max(total, 1)
    print(  # noqa: T201  the one function that prints, as PEFT's does
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
    )


def _make_config(model: nn.Module, r: int | SPPConfig, options: dict[str, Any]) -> SPPConfig:
    if not isinstance(r, SPPConfig):
        if type(r) is int and r < 1:  # the error names the first layer that was to have it
            config = SPPConfig(r=1, **options)
            path = next(iter(resolve_projections(uncompiled(model), config.target_modules, config.exclude_modules)))
            raise ConfigError(f"{path}: r is {r}; it must be an int of at least 1")
        return SPPConfig(r=r, **options)
    defaults = {f.name: f.default for f in fields(SPPConfig) if f.default is not MISSING}
    given = sorted(name for name, value in options.items() if value != defaults[name])
    if given:
        raise ConfigError(f"wrap was given a whole SPPConfig and also {', '.join(given)}; put them into the config")
    return r


def check_rank_pattern(config: SPPConfig, paths: Sequence[str]) -> None:
    """Raise a ConfigError where an entry of rank_pattern means none of the targets, whose module paths are given."""
    unused = [n for n in config.rank_pattern or {} if not any(name_matches(path, n) for path in paths)]
    if unused:
        raise ConfigError(
            f"{arg('rank_pattern')}: {', '.join(unused)} matches none of the target modules, such as {paths[0]}"
        )


def _check_targets(config: SPPConfig, targets: dict[str, Projection]) -> dict[str, Survey | None]:
    """Raise what speaks against adapting any of the targets, before the first is touched; return what they hold."""
    check_rank_pattern(config, list(targets))
    if "" in targets:
        raise TargetError("the model itself is a linear, which cannot be replaced in place; use spp.SPPLinear(linear)")
    for path, target in targets.items():
        if target.fused:
            check_experts(target, config, config.rank_for(path))
        else:
            check_linear(target.module, config, path, config.rank_for(path))
    return {path: check_values(target) for path, target in targets.items()}


def _options(config: SPPConfig, path: str) -> dict[str, Any]:
    """Return the arguments of one layer."""
    return {
        "r": config.rank_for(path),
        "scaling": config.scaling,
        "dropout": config.dropout,
        "dropout_mode": config.dropout_mode,
        "init": config.init,
        "rule": config.rule,
        "packed": config.packed,
        "checked": True,
        "generator": None if config.seed is None else layer_generator(config.seed, path),
    }


def _make_layer(target: Projection, config: SPPConfig, dtype: torch.dtype | None) -> SPPLinear:
    return SPPLinear(target.module, dtype=dtype, where=target.path, **_options(config, target.path))  # type: ignore[arg-type]


# ---- What of the activations a wrapped model keeps for backward: a choice of the run, not of the adapter.


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
