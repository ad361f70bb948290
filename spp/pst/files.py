"""Save and load what PST trains: adapter_config.json (peft_type "PST") and adapter_model.safetensors.

The config holds PSTConfig's fields, the sparsity of each layer, and a checksum of each frozen weight: the mask depends
on every bit of it.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from spp.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from spp.errors import AdapterError, NonFiniteError
from spp.files import (
    CheckpointReader,
    atomic_directory,
    content_crc32,
    read_json,
    require_replaceable,
    save_tensors,
    write_json,
)
from spp.files.hub import local_directory
from spp.inject import uncompiled
from spp.pst.config import PSTConfig
from spp.pst.model import config_of, is_wrapped, require_layers, trained_parameters, unwrap, wrap

PEFT_TYPE = "PST"
Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write what PST trains to a directory that appears whole or not at all.

    Args:
        model: wrapped.
        path: a directory that does not exist yet, unless `overwrite`.

    Raises:
        WrapError: the model is not wrapped.
        NonFiniteError: a tensor holds NaN or infinity; the keys are named.
        OutputError: the directory exists, or cannot be written.
    """
    check_finite(model)
    require_replaceable(path)
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
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": getattr(getattr(uncompiled(model), "config", None), "_name_or_path", None) or None,
        "base_crc32": checksums or base_checksums(model),
        "sparsity": {path: layer.sparsity for path, layer in require_layers(model).items()},
    }
    save_tensors(directory / WEIGHTS_NAME, {name: p.detach() for name, p in trained_parameters(model).items()})
    write_json(directory / CONFIG_NAME, config)


def load(model: Model, path: str | Path) -> Model:
    """Load what `save` wrote onto the dense model that it was trained on, wrapping it unless it is wrapped already.

    Returns:
        The same object.

    Raises:
        AdapterError: it is another method's, or missing, unexpected or misshapen keys, other frozen weights, another
            config than the model is wrapped with.
        CheckpointError, ConfigError, NonFiniteError: the files are bad.
        In each case the model is left as it was.
    """
    directory = local_directory(path, "PST state")
    values = read_json(directory / CONFIG_NAME, "PST config")
    if values.get("peft_type") != PEFT_TYPE:
        raise AdapterError(f"{directory} holds an adapter of type {values.get('peft_type')!r}, not {PEFT_TYPE}")
    known = {f.name for f in fields(PSTConfig)}
    config = PSTConfig.from_dict({name: value for name, value in values.items() if name in known})
    with CheckpointReader(directory, file=WEIGHTS_NAME) as reader:
        tensors = {key: reader.tensor(key).clone() for key in reader.keys()}  # noqa: SIM118  a reader is no mapping
    bad = sorted(key for key, t in tensors.items() if not bool(torch.isfinite(t).all()))
    if bad:
        raise NonFiniteError(f"{directory}: NaN or infinity in {', '.join(bad)}; take an earlier checkpoint")
    wrapped = is_wrapped(model)
    if wrapped and config_of(model) != config:
        raise AdapterError(
            f"the model is wrapped as {config_of(model)}, but {directory} holds {config}: unwrap it first"
        )
    if not wrapped:
        with torch.random.fork_rng(devices=[]):  # the values drawn are replaced at once
            wrap(model, config)
    try:
        sparsities = _check(model, directory, values, tensors)
    except BaseException:
        if not wrapped:
            unwrap(model)
        raise
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(tensors[name])
    for layer_path, layer in require_layers(model).items():
        layer.sparsity = sparsities[layer_path]
    return model


def check_finite(model: nn.Module) -> None:
    """Raise a NonFiniteError that names every trained tensor with NaN or infinity."""
    bad = sorted(name for name, p in trained_parameters(model).items() if not bool(torch.isfinite(p).all()))
    if bad:
        raise NonFiniteError(f"NaN or infinity in {', '.join(bad)}: the training diverged; lower the learning rate")


def base_checksums(model: nn.Module) -> dict[str, int]:
    """Return {path: crc32} of the frozen weights."""
    return {path: content_crc32(layer.weight.detach()) for path, layer in require_layers(model).items()}


def _check(model: nn.Module, directory: Path, values: dict[str, Any], tensors: dict[str, Any]) -> dict[str, float]:
    """Return the layers' sparsity; an AdapterError, all of them in one, for what does not fit the model."""
    shapes = {name: tuple(p.shape) for name, p in trained_parameters(model).items()}
    problems = [f"missing {key} {shapes[key]}" for key in shapes.keys() - tensors.keys()]
    problems += [f"unexpected {key} {tuple(tensors[key].shape)}" for key in tensors.keys() - shapes.keys()]
    problems += [
        f"misshapen {key}: saved {tuple(tensors[key].shape)}, model needs {shapes[key]}"
        for key in shapes.keys() & tensors.keys()
        if tuple(tensors[key].shape) != shapes[key]
    ]
    layers = require_layers(model)
    for name in ("sparsity", "base_crc32"):
        if not isinstance(values.get(name), dict) or values[name].keys() != layers.keys():
            problems.append(f"{name} of {CONFIG_NAME} does not list the layers of this model")
    if problems:
        raise AdapterError(f"the PST state in {directory} does not fit this model:\n  " + "\n  ".join(sorted(problems)))
    changed = sorted(path for path, crc in base_checksums(model).items() if values["base_crc32"][path] != crc)
    if changed:
        raise AdapterError(
            f"the frozen weights are not those that {directory} was trained on, in {len(changed)} layers: "
            f"{', '.join(changed[:8])}; the masks would be others. Load it onto "
            f"{values.get('base_model_name_or_path') or 'its own base'}, in the same dtype"
        )
    before = {path: layer.sparsity for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.sparsity = values["sparsity"][path]  # checks it
    finally:
        for path, layer in layers.items():
            layer.sparsity = before[path]
    return dict(values["sparsity"])
