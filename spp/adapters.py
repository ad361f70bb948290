"""Save and load adapters: the small matrices, how they were made, and which zeros they belong to."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from spp.adapter_files import CONFIG_NAME, PEFT_TYPE, PREFIX, WEIGHTS_NAME, AdapterFiles, read_adapter
from spp.configs.adapter import SPPConfig
from spp.errors import AdapterError, MaskError, NonFiniteError, SPPWarning, TargetError, arg, some_of
from spp.experts import SPPExperts
from spp.files import atomic_directory, mask_sha256, require_replaceable, save_tensors, write_json
from spp.inject import AdapterLayer, adapter_config, adapter_layers, is_wrapped, require_layers, uncompiled, wrap
from spp.rules import get_rule
from spp.targets import resolve_projections
from spp.targets_layout import Projection

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
Targets = Mapping[str, Projection | AdapterLayer]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return {"<module path>.spp_alpha": (r, n), "<module path>.spp_beta": (m, 1)} in module order, not copied.

    Those of fused experts, under the path of their parameter, are (E, r, n) and (E, m, 1).

    Raises:
        WrapError: the model is not wrapped.
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


def save_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapter to a directory that appears whole or not at all; identical input gives identical bytes.

    Args:
        model: wrapped.
        path: a directory that does not exist yet, unless `overwrite`.

    Returns:
        The directory.

    Raises:
        WrapError: the model is not wrapped.
        NonFiniteError: the adapter holds NaN or infinity; the keys are named.
        OutputError: the directory exists, or cannot be written.
    """
    check_finite(model)
    require_replaceable(path)
    with atomic_directory(path, overwrite=overwrite) as directory:
        write_adapter(model, directory)
    return Path(path)


def write_adapter(model: nn.Module, directory: Path) -> None:
    """Write the two files of an adapter into a directory that exists (`save_adapter` is the safe whole)."""
    check_finite(model)
    name = getattr(getattr(uncompiled(model), "config", None), "_name_or_path", None) or None
    config = {
        **adapter_config(model).to_dict(),
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": name,
        "base_masks": base_masks(model),
        "task_type": "CAUSAL_LM" if _generates(uncompiled(model)) else None,  # what PEFT's Auto classes go by
    }
    save_tensors(directory / WEIGHTS_NAME, {PREFIX + key: tensor for key, tensor in adapter_state_dict(model).items()})
    write_json(directory / CONFIG_NAME, config)


def load_adapter(model: Model, path: str | Path, *, strict: bool = True) -> Model:
    """Load an adapter, ours or the SPP authors', onto the pruned model that it was trained on.

    An unwrapped model is wrapped as the saved config says. On a wrapped one the values are replaced; its rank, scaling
    and rule must be the adapter's.

    Args:
        model: the pruned model, wrapped or not.
        path: an adapter directory or a hub id.
        strict: False loads onto a base whose zeros differ, and in spite of missing or unexpected keys, with a warning;
            shapes must fit always.

    Returns:
        The same object.

    Raises:
        AdapterError: missing, unexpected or misshapen keys, all in one message; another rank or scaling than wrapped.
        MaskError: the base's zeros are not those that the adapter was trained on; the layers are named.
        CheckpointError, ConfigError, NonFiniteError: the files are bad.
        In each case the model is left as it was.
    """
    given, model = model, uncompiled(model)
    files = read_adapter(path)
    wrapped = is_wrapped(model)
    targets: Targets = require_layers(model) if wrapped else _targets(model, files)
    if wrapped:
        _check_same_config(adapter_config(model), files)
    _check_keys(targets, files, strict=strict)
    _check_masks(targets, files, strict=strict)
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


def _check_masks(targets: Targets, files: AdapterFiles, *, strict: bool) -> None:
    if files.base_masks is None:
        logger.warning("%s does not say which zeros it was trained on; nothing to check the base against", files.source)
        return
    differing = sorted(
        path
        for path, target in targets.items()
        if path in files.base_masks and _mask_of(target) not in (None, files.base_masks[path])
    )
    if not differing:
        return
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


def _experts_of(target: Projection | AdapterLayer) -> tuple[int, ...]:
    """Return (E,) of a fused weight, () of a matrix."""
    if isinstance(target, Projection):
        return target.shape[:1] if target.fused else ()
    return (target.num_experts,) if isinstance(target, SPPExperts) else ()


def _mask_of(target: Projection | AdapterLayer) -> str | None:
    """Return the hash of a target's zeros; None for a weight on the meta device."""
    weight = target.dense_weight()
    return None if weight.is_meta else mask_sha256(weight)


__all__ = ["adapter_state_dict", "base_masks", "load_adapter", "save_adapter", "write_adapter"]
