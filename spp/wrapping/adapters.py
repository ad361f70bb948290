"""Save and load adapters: the small matrices, how they were made, and which zeros and values they belong to."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.distributed.ranks import is_first
from spp.distributed.sharded import (
    assign,
    full,
    gathered,
    holds_shards,
    is_sharded,
    meet,
    refuse_shards,
    settle,
    whole_shape,
)
from spp.distributed.sums import together
from spp.errors import AdapterError, ConfigError, MaskError, SPPWarning, TargetError, arg, call, some_of
from spp.files import atomic_directory, mask_sha256
from spp.models.projection import Projection
from spp.models.targets import resolve_projections
from spp.rules import get_rule
from spp.rules.adapter import effect_of, idle_reason, no_update_text, rounded_away_text
from spp.weights import Weight
from spp.weights.base import DenseWeight
from spp.weights.base_values import NOT_COMPARABLE, OTHER, BaseComparison, BaseVerdict, where_it_belongs
from spp.wrapping.adapter_files import (
    PEFT_TYPE,
    PREFIX,
    AdapterFiles,
    does_not_fit,
    misfits,
    read_adapter,
    shapes_of,
    write_files,
)
from spp.wrapping.also import AlsoTrained, find_also
from spp.wrapping.state import uncompiled
from spp.wrapping.wrap import (
    AdapterLayer,
    adapter_config,
    adapter_layers,
    also_trained,
    is_wrapped,
    origin_of_loaded,
    require_layers,
    set_loaded,
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
        under the path of their parameter, are (E, r, n) and (E, m, 1). Behind them what `also_train` names, under the
        names of the parameters.

    Raises:
        WrapError: the model is not wrapped.

    Example:
        >>> sorted(adapter_state_dict(model))[0]  # doctest: +SKIP
        'model.layers.0.mlp.down_proj.spp_alpha'
    """
    found = parameters_of(require_layers(model))
    return found | {name: one.trained.detach() for name, one in also_trained(model).items()}


def parameters_of(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """Return {"<module path>.<name>": parameter}, not copied, of {module path: layer}."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, layer in layers.items()
        for name, parameter in zip(layer.spp_rule.attribute_names(), layer.adapter_parameters(), strict=True)
    }


def base_masks(model: nn.Module) -> dict[str, str]:
    """Return {module path: hash of the zero pattern} of the frozen weights of a wrapped model."""
    masks = {path: mask_of(layer) for path, layer in require_layers(model).items()}
    return {path: mask for path, mask in masks.items() if mask is not None}


def whole_weight(target: Projection | AdapterLayer) -> Weight:
    """Return a target's weight, gathered where it is sharded, which every rank must ask for: one at a time."""
    if isinstance(target, Projection) or not any(map(is_sharded, target.stored_tensors())):
        return target.held()
    if target.packed_layout is None:
        return DenseWeight(full(target.stored_weight), target.input_axis)
    whole: Weight = target.held().maker()(*map(full, target.stored_tensors()))
    whole.input_axis = target.input_axis
    return whole


def base_values(weights: Iterable[tuple[str, Weight]]) -> dict[str, dict[str, str]]:
    """Return what an adapter's config says of the values of its base: the fields "base_values" and "base_forms".

    A weight on the meta device is left out.
    """
    found = [(path, held.form, held.values_sha256()) for path, held in weights]
    known = [(path, form, digest) for path, form, digest in found if digest is not None]
    return {
        "base_values": {path: digest for path, _, digest in known},
        "base_forms": {path: form for path, form, _ in known},
    }


def save_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapter to a directory that appears whole or not at all; identical input gives identical bytes.

    Of a model that is sharded (FSDP2) every rank must call this: all gather, and rank 0 writes.

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
    if holds_shards(uncompiled(model)):
        require_layers(model)
        _save_together(model, path, overwrite)
        return Path(path)
    with atomic_directory(path, overwrite=overwrite) as directory:
        write_adapter(model, directory)
    warn_without_effect(model)
    return Path(path)


def _save_together(model: nn.Module, path: str | Path, overwrite: bool) -> None:
    """Write the adapter of a sharded model: every rank gathers, a weight at a time for its hashes, and one writes."""
    meet("spp.save_adapter")
    with whole_adapter(model):
        masks = base_masks(model)
        values = base_values((path, whole_weight(layer)) for path, layer in adapter_layers(model).items())
        with together(named=True):
            if is_first():
                with atomic_directory(path, overwrite=overwrite) as directory:
                    write_adapter(model, directory, masks, values)


@contextlib.contextmanager
def whole_adapter(model: nn.Module) -> Iterator[None]:
    """Have the adapter of a sharded model whole, to be read: a context manager that every rank must enter."""
    settle(uncompiled(model))
    with contextlib.ExitStack() as stack:
        stack.enter_context(gathered(adapter_layers(model).values(), lambda layer: layer.resident_names()))
        for one in also_trained(model).values():
            stack.enter_context(one.whole())
        yield


def write_adapter(
    model: nn.Module,
    directory: Path,
    masks: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files of an adapter into a directory that exists (`save_adapter` is the safe whole).

    One that was loaded, and not trained since, belongs to the values that its files name, whatever it was loaded onto.

    Args:
        masks, values: of the base, as `base_masks` and `base_values` return them; None looks.
    """
    origin = origin_of_loaded(model)
    origin = values if origin is None else origin
    if origin is None:
        origin = base_values((path, layer.held()) for path, layer in require_layers(model).items())
    hashes = {"base_masks": base_masks(model) if masks is None else dict(masks), **origin}
    write_tensors_of(
        directory, uncompiled(model), adapter_config(model), adapter_state_dict(model), name_of_base(model), hashes
    )


def write_tensors_of(
    directory: Path,
    model: nn.Module,
    config: SPPConfig,
    tensors: Mapping[str, Tensor],
    base: str | None,
    hashes: Mapping[str, Any],
) -> None:
    """Write the two files of an adapter that no model may hold.

    Args:
        directory: that exists.
        model: that it is for; of what kind it is counts.
        config: with target_modules resolved.
        tensors: {"<module path>.<name>": parameter}.
        base: where the model came from.
        hashes: the fields base_masks, base_values and base_forms.
    """
    values = {
        **config.to_dict(),
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base,
        **hashes,
        "task_type": "CAUSAL_LM" if _generates(model) else None,  # what PEFT's Auto classes go by
    }
    write_files(directory, values, {PREFIX + key: tensor for key, tensor in tensors.items()})


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapters of a wrapped model the values of {"<module path>.<name>": parameter}."""
    fill_layers(adapter_layers(model), tensors)


def fill_layers(layers: Mapping[str, AdapterLayer], tensors: Mapping[str, Tensor]) -> None:
    """Give the adapters of {module path: layer} the values of {"<module path>.<name>": parameter}."""
    for path, layer in layers.items():
        _fill(layer, path, tensors)


def name_of_base(model: nn.Module) -> str | None:
    """Return the directory or hub id that a model says it came from."""
    return getattr(getattr(uncompiled(model), "config", None), "_name_or_path", None) or None


def warn_without_effect(model: nn.Module) -> str | None:
    """Warn where the adapter of a wrapped model changes no weight; return what was said."""
    text = without_effect(model)
    if text is not None:
        warnings.warn(text, SPPWarning, stacklevel=3)
    return text


@torch.no_grad()
def without_effect(model: nn.Module) -> str | None:
    """Return a sentence that says why the adapter changes no weight; None where it changes one.

    That is known from the adapter's parameters where they are as they were at the start, and from the first block of
    weights where they have been trained. Of a weight on the meta device nothing is said.
    """
    layers = require_layers(model).values()
    if any(one.changed() for one in also_trained(model).values()):
        return None
    reason = idle_reason(layer.adapter() for layer in layers)
    if reason is not None:
        return no_update_text(reason)
    updated = False
    for layer in layers:
        for weight, adapter in layer.parts():
            if weight.is_meta or any(parameter.is_meta for parameter in adapter.params):
                return None
            found = effect_of(weight, adapter)
            if found.moved:
                return None
            updated = updated or found.updated
    if not updated:
        return no_update_text()
    return f"{rounded_away_text()}. Train it longer or at a higher rate, or on weights in torch.float32"


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
    passed, model = model, uncompiled(model)
    refuse_shards(model, "spp.load_adapter", "load the adapter first and shard the model afterwards")
    files = read_adapter(path)
    wrapped = is_wrapped(model)
    targets: Targets = require_layers(model) if wrapped else _targets(model, files)
    if wrapped:
        _check_same_config(adapter_config(model), files)
    also: Mapping[str, AlsoTrained | nn.Parameter]
    also = also_trained(model) if wrapped else _also(model, files, targets)
    _check_keys(targets, also, files, strict=strict)
    given = name_of_base(model)
    same_zeros = _check_masks(targets, files, given, strict=strict)
    verdict = _check_values(targets, files, given, strict=strict_values, quiet=not same_zeros)
    if not wrapped:
        with torch.random.fork_rng(devices=[]):  # the values drawn by wrap are replaced at once
            held_packed = any(isinstance(t, Projection) and t.packed is not None for t in targets.values())
            wrap(model, replace(files.config, packed=True) if held_packed else files.config)
    fill(model, files.tensors)
    for name, one in also_trained(model).items():
        if name in files.also:
            one.fill(files.also[name])
    fields = {"base_values": files.base_values, "base_forms": files.base_forms}
    set_loaded(model, verdict, {name: value for name, value in fields.items() if value is not None})
    logger.info("loaded %d tensors from %s", len(files.tensors), files.source)
    return passed


def refill(model: nn.Module, path: str | Path, masks: Mapping[str, str]) -> None:
    """Give the adapter of a sharded model the values of another one of the same run, without a look at a weight.

    Args:
        masks: of the base, as `base_masks` returned them while it was whole.

    Raises:
        AdapterError, MaskError: as `load_adapter`.
    """
    model, files = uncompiled(model), read_adapter(path)
    settle(model)
    layers, also = require_layers(model), also_trained(model)
    _check_same_config(adapter_config(model), files)
    _check_keys(layers, also, files, strict=True)
    differing = sorted(path for path, mask in masks.items() if (files.base_masks or {}).get(path, mask) != mask)
    if differing:
        raise MaskError(f"the zeros of the base differ from those of {files.source}: {some_of(differing)}")
    fill(model, files.tensors)
    for name, one in also.items():
        if name in files.also:
            one.fill(files.also[name])


@torch.no_grad()
def _fill(layer: AdapterLayer, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer the values that there are for its parameters; those on the meta device become materialised."""
    for name, parameter in zip(layer.spp_rule.attribute_names(), layer.adapter_parameters(), strict=True):
        tensor = tensors.get(f"{path}.{name}")
        if tensor is not None and parameter.is_meta:
            weight = layer.held()  # of an offloaded one, the device is that of the calls
            value = tensor.to(tensor.device if weight.device.type == "meta" else weight.device, copy=True)
            setattr(layer, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        elif tensor is not None:
            assign(parameter, tensor)


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


def _also(model: nn.Module, files: AdapterFiles, targets: Targets) -> dict[str, nn.Parameter]:
    try:
        return find_also(model, files.config.also_train, targets)
    except ConfigError as error:
        raise AdapterError(f"the adapter in {files.source} is not for this model: {error.marked}") from None


def _check_same_config(config: SPPConfig, files: AdapterFiles) -> None:
    differing = [
        f"{field}: model {getattr(config, field)!r}, adapter {getattr(files.config, field)!r}"
        for field in ("rule", "r", "rank_pattern", "scaling", "also_train")
        if getattr(config, field) != getattr(files.config, field)
    ]
    if differing:
        raise AdapterError(
            f"the model is wrapped otherwise than the adapter in {files.source} ({'; '.join(differing)}); call "
            f"spp.unwrap(model) first, and load_adapter wraps it as the adapter needs"
        )


def _check_keys(
    targets: Targets, also: Mapping[str, AlsoTrained | nn.Parameter], files: AdapterFiles, *, strict: bool
) -> None:
    rule = get_rule(files.config.rule)
    expected: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        experts = tuple(target.held().shape[:-2]) if isinstance(target, Projection) else target.experts_shape
        shapes = rule.shapes(target.out_features, target.in_features, files.config.rank_for(path))
        for name, shape in zip(rule.attribute_names(), shapes, strict=True):
            expected[f"{path}.{name}"] = (*experts, *shape)
    for name, one in also.items():
        expected[name] = whole_shape(one.trained if isinstance(one, AlsoTrained) else one)
    keys, misshapen = misfits(expected, shapes_of({**files.tensors, **files.also}))
    strange = sorted((files.base_masks or {}).keys() - targets.keys())
    keys += [f"unexpected {path} in base_masks: the model has no such layer to adapt" for path in strange]
    what = f"the adapter in {files.source}"
    if misshapen or (strict and keys):
        raise AdapterError(does_not_fit(what, keys + misshapen))
    if keys:
        warnings.warn(does_not_fit(what, keys, "was loaded in part"), SPPWarning, stacklevel=3)


def _check_masks(targets: Targets, files: AdapterFiles, given: str | None, *, strict: bool) -> bool:
    """Return whether the base has the zeros that the adapter was trained on, as far as it says."""
    files.warn_unchecked()
    masks = files.base_masks or {}
    differing = sorted(
        path for path, target in targets.items() if path in masks and mask_of(target) not in (None, masks[path])
    )
    if not differing:
        return True
    home = where_it_belongs(files.base_name, given)
    if files.has_moved_masks:
        made = call("merge_checkpoint", "base, checkpoint, out")
        home = f"it is a checkpoint of a run that moves its masks, and {made} makes the model that it belongs to"
    message = (
        f"the zeros of the base differ from those that the adapter in {files.source} was trained on, in "
        f"{len(differing)} layers: {some_of(differing)}; {home}"
    )
    if strict:
        remedy = f"or pass {arg('strict', False)} to load it all the same"
        raise MaskError(message, remedy=remedy)
    warnings.warn(message, SPPWarning, stacklevel=3)
    return False


def _check_values(
    targets: Targets, files: AdapterFiles, given: str | None, *, strict: bool, quiet: bool
) -> BaseVerdict:
    """Compare the values of the base with those that the adapter was trained on; warn of others, unless `quiet`."""
    comparison = BaseComparison(files.base_values, files.base_forms, files.source, files.base_name, given)
    for path, target in targets.items():
        comparison.add_held(path, target.held(), anew=strict)  # a known hash has a blind spot
    verdict = comparison.verdict()
    if verdict.state == OTHER and strict:
        raise AdapterError(verdict.message)
    if verdict.state == OTHER and not quiet:
        warnings.warn(verdict.message, SPPWarning, stacklevel=3)
    elif verdict.state == NOT_COMPARABLE:
        logger.info(verdict.message)
    return verdict


def mask_of(target: Projection | AdapterLayer) -> str | None:
    """Return the hash of a target's zeros, of a sharded one gathered; None for a weight on the meta device."""
    weight = whole_weight(target).dense()
    return None if weight.is_meta else mask_sha256(weight)
