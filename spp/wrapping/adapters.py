"""Save and load adapters: the small matrices, how they were made, and which zeros and values they belong to."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import AdapterError, MaskError, NonFiniteError, SPPWarning, TargetError, arg, some_of
from spp.files import atomic_directory, mask_sha256, save_tensors, write_json
from spp.layers.experts import SPPExperts
from spp.models.projection import Projection
from spp.models.targets import resolve_projections
from spp.rules import get_rule
from spp.weights import HeldWeight
from spp.weights.base_values import NOT_COMPARABLE, OTHER, BaseComparison, BaseVerdict
from spp.wrapping.adapter_files import CONFIG_NAME, PEFT_TYPE, PREFIX, WEIGHTS_NAME, AdapterFiles, read_adapter
from spp.wrapping.effect import without_effect
from spp.wrapping.state import uncompiled
from spp.wrapping.wrap import (
    AdapterLayer,
    adapter_config,
    adapter_layers,
    is_wrapped,
    require_layers,
    set_base_verdict,
    wrap,
)

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
Targets = Mapping[str, Projection | AdapterLayer]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the adapter, not copied.

    Args:
        model: wrapped.

    Returns:
        {"<module path>.spp_alpha": (r, n), "<module path>.spp_beta": (m, 1)} in module order; those of fused experts,
        under the path of their parameter, are (E, r, n) and (E, m, 1).

    Raises:
        WrapError: the model is not wrapped.

    Example:
        >>> sorted(adapter_state_dict(model))[0]  # doctest: +SKIP
        'model.layers.0.mlp.down_proj.spp_alpha'
    """
    return {
        f"{path}.{name}": parameter.detach()
        for path, layer in require_layers(model).items()
        for name, parameter in zip(layer.spp_rule.attribute_names(), layer.adapter_parameters(), strict=True)
    }


def base_masks(model: nn.Module) -> dict[str, str]:
    """Return {module path: hash of the zero pattern} of the frozen weights of a wrapped model."""
    weights = ((path, layer.dense_weight()) for path, layer in require_layers(model).items())
    return {path: mask_sha256(weight) for path, weight in weights if not weight.is_meta}


def base_values(weights: Iterable[tuple[str, HeldWeight]]) -> dict[str, dict[str, str]]:
    """Return what an adapter's config says of the values of its base: the fields "base_values" and "base_forms".

    Args:
        weights: module paths and the frozen weights there; one on the meta device is left out.
    """
    found = [(path, held.form, held.sha256()) for path, held in weights]
    known = [(path, form, digest) for path, form, digest in found if digest is not None]
    return {
        "base_values": {path: digest for path, _, digest in known},
        "base_forms": {path: form for path, form, _ in known},
    }


def save_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapter to a directory that appears whole or not at all; identical input gives identical bytes.

    Args:
        model: wrapped.
        path: a directory that does not exist yet, unless `overwrite`.
        overwrite: replace what is there, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        The directory; a warning if the adapter changes no weight.

    Raises:
        WrapError: the model is not wrapped.
        NonFiniteError: the adapter holds NaN or infinity; the keys are named.
        OutputError: the directory exists, or cannot be written.

    Example:
        >>> save_adapter(model, "adapter")  # doctest: +SKIP
    """
    store_adapter(model, path, overwrite=overwrite)
    warn_without_effect(model)
    return Path(path)


def store_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> None:
    """Do as `save_adapter` without a word on what the adapter does: a trainer says that once, at the end."""
    check_finite(model)
    with atomic_directory(path, overwrite=overwrite) as directory:
        write_adapter(model, directory)


def warn_without_effect(model: nn.Module) -> str | None:
    """Warn where the adapter of a wrapped model changes no weight; return what was said."""
    text = without_effect(model)
    if text is not None:
        warnings.warn(text, SPPWarning, stacklevel=3)
    return text


def write_adapter(model: nn.Module, directory: Path) -> None:
    """Write the two files of an adapter into a directory that exists (`save_adapter` is the safe whole)."""
    check_finite(model)
    name = getattr(getattr(uncompiled(model), "config", None), "_name_or_path", None) or None
    config = {
        **adapter_config(model).to_dict(),
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": name,
        "base_masks": base_masks(model),
        **base_values((path, layer.held()) for path, layer in require_layers(model).items()),
        "task_type": "CAUSAL_LM" if _generates(uncompiled(model)) else None,  # what PEFT's Auto classes go by
    }
    save_tensors(directory / WEIGHTS_NAME, {PREFIX + key: tensor for key, tensor in adapter_state_dict(model).items()})
    write_json(directory / CONFIG_NAME, config)


def load_adapter(model: Model, path: str | Path, *, strict: bool = True, strict_values: bool = False) -> Model:
    """Load an adapter, ours or the SPP authors', onto the pruned model that it was trained on.

    A base with the same zeros and other values is warned of; one that is quantized or of another dtype than in
    training, so that there is nothing to compare, is logged (spp.weights.base_values).

    An unwrapped model is wrapped as the saved config says. On a wrapped one the values are replaced; its rank, scaling
    and rule must be the adapter's.

    Not promised: the files hold no checksum of the adapter itself. Finite values that were changed, exchanged between
    layers of one shape, or transposed where they are square, and another scaling, are loaded as they are.

    Args:
        model: the pruned model, wrapped or not.
        path: an adapter directory or a hub id.
        strict: False loads onto a base whose zeros differ, and in spite of missing or unexpected keys, with a warning;
            shapes must fit always.
        strict_values: refuse a base that has other values, too, instead of warning.

    Returns:
        The same object.

    Raises:
        AdapterError: missing, unexpected or misshapen keys, all in one message; another rank or scaling than wrapped;
            other values, with `strict_values`.
        MaskError: the base's zeros are not those that the adapter was trained on; the layers are named.
        CheckpointError, ConfigError, NonFiniteError: the files are bad.
        In each case the model is left as it was.

    Example:
        >>> model = load_adapter(pruned, "adapter")  # doctest: +SKIP
    """
    given, model = model, uncompiled(model)
    files = read_adapter(path)
    wrapped = is_wrapped(model)
    targets: Targets = require_layers(model) if wrapped else _targets(model, files)
    if wrapped:
        _check_same_config(adapter_config(model), files)
    _check_keys(targets, files, strict=strict)
    same_zeros = _check_masks(targets, files, strict=strict)
    verdict = _check_values(targets, files, strict=strict_values, quiet=not same_zeros)
    if not wrapped:
        with torch.random.fork_rng(devices=[]):  # the values drawn by wrap are replaced at once
            wrap(model, _as_the_model_is(files.config, targets))
    with torch.no_grad():
        for path_, layer in adapter_layers(model).items():
            for name, parameter in zip(layer.spp_rule.attribute_names(), layer.adapter_parameters(), strict=True):
                tensor = files.tensors.get(f"{path_}.{name}")
                if tensor is None:
                    continue
                if parameter.is_meta:
                    device = layer.home() if layer.home().type != "meta" else tensor.device
                    value = tensor.to(device, copy=True)
                    setattr(layer, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
                else:
                    parameter.copy_(tensor)
    set_base_verdict(model, verdict)
    logger.info("loaded %d tensors from %s", len(files.tensors), files.source)
    return given


def check_finite(model: nn.Module) -> None:
    """Raise a NonFiniteError that names every adapter tensor with NaN or infinity."""
    bad = sorted(k for k, t in adapter_state_dict(model).items() if not t.is_meta and not bool(torch.isfinite(t).all()))
    if bad:
        raise NonFiniteError(f"NaN or infinity in {', '.join(bad)}: the training diverged; lower the learning rate")


def _as_the_model_is(config: SPPConfig, targets: Targets) -> SPPConfig:
    """Return the config for a model that may be packed already, whatever the adapter was trained on."""
    packed = any(isinstance(t, Projection) and t.packed is not None for t in targets.values())
    return replace(config, packed=True) if packed else config


def _generates(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    return callable(can_generate) and bool(can_generate()) and not getattr(config, "is_encoder_decoder", False)


def _targets(model: nn.Module, files: AdapterFiles) -> dict[str, Projection]:
    try:
        return resolve_projections(model, files.config.target_modules, files.config.exclude_modules)
    except TargetError as error:
        raise AdapterError(f"the adapter in {files.source} is not for this model: {error.marked}") from None


def _check_same_config(config: SPPConfig, files: AdapterFiles) -> None:
    differing = [
        f"{field}: model {getattr(config, field)!r}, adapter {getattr(files.config, field)!r}"
        for field in ("rule", "r", "rank_pattern", "scaling")
        if getattr(config, field) != getattr(files.config, field)
    ]
    if differing:
        raise AdapterError(
            f"the model is wrapped otherwise than the adapter in {files.source} ({'; '.join(differing)}); call "
            f"spp.unwrap(model) first, and load_adapter wraps it as the adapter needs"
        )


def _check_keys(targets: Targets, files: AdapterFiles, *, strict: bool) -> None:
    rule = get_rule(files.config.rule)
    expected: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        shapes = rule.shapes(target.out_features, target.in_features, files.config.rank_for(path))
        for name, shape in zip(rule.attribute_names(), shapes, strict=True):
            expected[f"{path}.{name}"] = (*_experts_of(target), *shape)
    missing = [f"missing {key} {expected[key]}" for key in expected.keys() - files.tensors.keys()]
    unexpected = [
        f"unexpected {key} {tuple(files.tensors[key].shape)}" for key in files.tensors.keys() - expected.keys()
    ]
    strange = sorted((files.base_masks or {}).keys() - targets.keys())
    unexpected += [f"unexpected {path} in base_masks: the model has no such layer to adapt" for path in strange]
    misshapen = [
        f"misshapen {key}: adapter {tuple(files.tensors[key].shape)}, model needs {expected[key]}"
        for key in expected.keys() & files.tensors.keys()
        if tuple(files.tensors[key].shape) != expected[key]
    ]
    if not strict and (missing or unexpected) and not misshapen:
        warnings.warn(_listing(files, missing + unexpected, "was loaded in part"), SPPWarning, stacklevel=3)
    elif missing or unexpected or misshapen:
        raise AdapterError(_listing(files, missing + unexpected + misshapen, "does not fit this model"))


def _listing(files: AdapterFiles, problems: list[str], verdict: str) -> str:
    return f"the adapter in {files.source} {verdict}:\n  " + "\n  ".join(sorted(problems))


def _check_masks(targets: Targets, files: AdapterFiles, *, strict: bool) -> bool:
    """Return whether the base has the zeros that the adapter was trained on, as far as it says."""
    files.warn_unchecked()
    masks = files.base_masks or {}
    differing = sorted(
        path for path, target in targets.items() if path in masks and _mask_of(target) not in (None, masks[path])
    )
    if not differing:
        return True
    message = (
        f"the zeros of the base differ from those that the adapter in {files.source} was trained on, in "
        f"{len(differing)} "
        f"layers: {some_of(differing)}. It belongs to "
        f"{files.base_name or 'another base'}"
    )
    if strict:
        remedy = f"load it there, or pass {arg('strict', False)} to load it all the same"
        raise MaskError(message, remedy=remedy)
    warnings.warn(message, SPPWarning, stacklevel=3)
    return False


def _check_values(targets: Targets, files: AdapterFiles, *, strict: bool, quiet: bool) -> BaseVerdict:
    """Compare the values of the base with those that the adapter was trained on; warn of others, unless `quiet`."""
    comparison = BaseComparison(files.base_values, files.base_forms, files.source, files.base_name)
    for path, target in targets.items():
        comparison.add_held(path, target.held())
    verdict = comparison.verdict()
    if verdict.state == OTHER and strict:
        raise AdapterError(f"{verdict.message}; load it there")
    if verdict.state == OTHER and not quiet:
        warnings.warn(verdict.message, SPPWarning, stacklevel=3)
    elif verdict.state == NOT_COMPARABLE:
        logger.info(verdict.message)
    return verdict


def _experts_of(target: Projection | AdapterLayer) -> tuple[int, ...]:
    """Return (E,) of a fused weight, () of a matrix."""
    if isinstance(target, Projection):
        return target.shape[:1] if target.fused else ()
    return (target.num_experts,) if isinstance(target, SPPExperts) else ()


def _mask_of(target: Projection | AdapterLayer) -> str | None:
    """Return the hash of a target's zeros; None for a weight on the meta device."""
    weight = target.dense_weight()
    return None if weight.is_meta else mask_sha256(weight)


__all__ = ["adapter_state_dict", "base_masks", "base_values", "load_adapter", "save_adapter", "write_adapter"]
