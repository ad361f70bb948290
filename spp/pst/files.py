"""Save and load what PST trains: adapter_config.json (peft_type "PST") and adapter_model.safetensors.

The config holds PSTConfig's fields, the sparsity of each layer, and the dtype and a checksum of each frozen weight: the
mask depends on every bit of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spp.configs.pst import PSTConfig
from spp.errors import AdapterError, CheckpointError, NonFiniteError, some_of
from spp.files import (
    CheckpointReader,
    atomic_directory,
    content_crc32,
    dtype_name,
    read_json,
    save_tensors,
    write_json,
)
from spp.files.hub import local_directory
from spp.pst.model import config_of, is_wrapped, require_layers, trained_parameters, unwrap, wrap
from spp.wrapping.adapter_files import CONFIG_NAME, PST_TYPE, WEIGHTS_NAME
from spp.wrapping.state import uncompiled

Model = TypeVar("Model", bound=nn.Module)
_LISTED = 12  # problems that a message lists


@dataclass(frozen=True)
class PSTState:
    """The contents of a directory that `save` wrote.

    Attributes:
        source: the directory.
        config: how the model was wrapped.
        tensors: by parameter name, the factors of the layers and the modules that trained as a whole.
        sparsity: {path: share that is pruned}. base_crc32: {path: checksum of the frozen weight}.
        base_dtype: {path: its dtype}. base_name: where the dense model came from, or None.
    """

    source: Path
    config: PSTConfig
    tensors: dict[str, Tensor]
    sparsity: dict[str, float]
    base_crc32: dict[str, int]
    base_dtype: dict[str, str]
    base_name: str | None


def save(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write what PST trains to a directory that appears whole or not at all.

    Args:
        model: wrapped.
        path: a directory that does not exist yet, unless `overwrite`.
        overwrite: replace what is there, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        The directory.

    Raises:
        WrapError: the model is not wrapped.
        NonFiniteError: a tensor holds NaN or infinity; the keys are named.
        OutputError: the directory exists, or cannot be written.

    Example:
        >>> spp.pst.save(model, "state")  # doctest: +SKIP
    """
    check_finite(model)
    with atomic_directory(path, overwrite=overwrite) as directory:
        write(model, directory)
    return Path(path)


def write(model: nn.Module, directory: Path, checksums: dict[str, int] | None = None) -> None:
    """Write the two files into a directory that exists (`save` is the safe whole).

    Args:
        checksums: of `base_checksums`, where they are known.
    """
    check_finite(model)
    config = {
        **config_of(model).to_dict(),
        "peft_type": PST_TYPE,
        "base_model_name_or_path": getattr(getattr(uncompiled(model), "config", None), "_name_or_path", None) or None,
        "base_crc32": checksums or base_checksums(model),
        "base_dtype": {path: dtype_name(layer.weight.dtype) for path, layer in require_layers(model).items()},
        "sparsity": {path: layer.sparsity for path, layer in require_layers(model).items()},
    }
    save_tensors(directory / WEIGHTS_NAME, {name: p.detach() for name, p in trained_parameters(model).items()})
    write_json(directory / CONFIG_NAME, config)


def load(model: Model, path: str | Path) -> Model:
    """Load what `save` wrote onto the dense model that it was trained on.

    Args:
        model: dense, which is wrapped then, or wrapped already as the saved config says.
        path: the directory, or a hub id.

    Returns:
        The same object.

    Raises:
        AdapterError: it is another method's, or missing, unexpected or misshapen keys, other frozen weights, other
            layers, ranks, scales or pattern than the model is wrapped with.
        CheckpointError, ConfigError, NonFiniteError: the files are bad.
        In each case the model is left as it was.

    Example:
        >>> model = spp.pst.load(dense, "run/adapter")  # doctest: +SKIP
    """
    state = read(path)
    wrapped = is_wrapped(model)
    if wrapped and _computes_otherwise(config_of(model), state.config):
        raise AdapterError(
            f"the model is wrapped as {config_of(model)}, but {state.source} holds {state.config}: unwrap it first"
        )
    if not wrapped:
        with torch.random.fork_rng(devices=[]):  # the values drawn are replaced at once
            wrap(model, state.config)
    try:
        _check(model, state)
    except BaseException:
        if not wrapped:
            unwrap(model)
        raise
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(state.tensors[name])
    for layer_path, layer in require_layers(model).items():
        layer.sparsity = state.sparsity[layer_path]
    return model


def read(path: str | Path) -> PSTState:
    """Read and check what `save` wrote, or a hub id, without a model.

    Raises:
        AdapterError: it is another method's.
        CheckpointError, ConfigError, NonFiniteError: the files are bad.
    """
    directory = local_directory(path, "PST state")
    values = read_json(directory / CONFIG_NAME, "PST config")
    if values.get("peft_type") != PST_TYPE:
        raise AdapterError(f"{directory} holds an adapter of type {values.get('peft_type')!r}, not {PST_TYPE}")
    known = {f.name for f in fields(PSTConfig)}
    config = PSTConfig.from_dict({name: value for name, value in values.items() if name in known})
    with CheckpointReader(directory, file=WEIGHTS_NAME) as reader:
        tensors = {key: reader.tensor(key).clone() for key in reader.keys()}  # noqa: SIM118  a reader is no mapping
    bad = sorted(key for key, t in tensors.items() if not bool(torch.isfinite(t).all()))
    if bad:
        raise NonFiniteError(f"{directory}: NaN or infinity in {', '.join(bad)}; take an earlier checkpoint")
    facts: dict[str, Any] = {}
    for name, is_one in (("sparsity", _is_sparsity), ("base_crc32", _is_checksum), ("base_dtype", _is_dtype)):
        facts[name] = values.get(name)
        if not isinstance(facts[name], dict) or not all(map(is_one, facts[name].values())):
            raise CheckpointError(f"{directory / CONFIG_NAME}: {name} must map the paths of layers to what it says")
    base = values.get("base_model_name_or_path")
    return PSTState(directory, config, tensors, **facts, base_name=base if isinstance(base, str) else None)


def check_finite(model: nn.Module) -> None:
    """Raise a NonFiniteError that names every trained tensor with NaN or infinity."""
    bad = sorted(name for name, p in trained_parameters(model).items() if not bool(torch.isfinite(p).all()))
    if bad:
        raise NonFiniteError(f"NaN or infinity in {', '.join(bad)}: the training diverged; lower the learning rate")


def base_checksums(model: nn.Module) -> dict[str, int]:
    """Return {path: crc32} of the frozen weights."""
    return {path: content_crc32(layer.weight.detach()) for path, layer in require_layers(model).items()}


def _check(model: nn.Module, state: PSTState) -> None:
    """Raise an AdapterError, all of it in one, for what does not fit the model."""
    tensors, shapes = state.tensors, {name: tuple(p.shape) for name, p in trained_parameters(model).items()}
    problems = [f"missing {key} {shapes[key]}" for key in shapes.keys() - tensors.keys()]
    problems += [f"unexpected {key} {tuple(tensors[key].shape)}" for key in tensors.keys() - shapes.keys()]
    problems += [
        f"misshapen {key}: saved {tuple(tensors[key].shape)}, model needs {shapes[key]}"
        for key in shapes.keys() & tensors.keys()
        if tuple(tensors[key].shape) != shapes[key]
    ]
    layers = require_layers(model)
    for name in ("sparsity", "base_crc32", "base_dtype"):
        if getattr(state, name).keys() != layers.keys():
            problems.append(f"{name} of {CONFIG_NAME} does not list the layers of this model")
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        listing = "\n  ".join([*sorted(problems)[:_LISTED], *more])
        raise AdapterError(f"the PST state in {state.source} does not fit this model:\n  {listing}")
    changed = sorted(path for path, crc in base_checksums(model).items() if state.base_crc32[path] != crc)
    if changed:
        raise AdapterError(
            f"the frozen weights are not those that {state.source} was trained on, in {len(changed)} layers: "
            f"{some_of(changed)}; the masks would be others. Load it onto {state.base_name or 'its own base'}, "
            f"in {' and '.join(sorted(set(state.base_dtype.values())))}"
        )
    before = {path: layer.sparsity for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.sparsity = state.sparsity[path]  # checks it
    finally:
        for path, layer in layers.items():
            layer.sparsity = before[path]


def _computes_otherwise(one: PSTConfig, other: PSTConfig) -> bool:
    """Whether two configs make other layers of the same linears; which linears these are, `_check` sees."""
    elsewhere: dict[str, Any] = {"target_modules": None, "exclude_modules": None, "modules_to_save": None, "seed": None}
    return replace(one, **elsewhere) != replace(other, **elsewhere)


def _is_sparsity(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_checksum(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dtype(value: object) -> bool:
    return value in ("float64", "float32", "bfloat16", "float16")
