"""The files of PST: what it trains is saved, loaded, and made permanent in a checkpoint, shard by shard.

They are adapter_config.json (peft_type "PST") and adapter_model.safetensors. The config holds PSTConfig's fields,
the sparsity of each layer, and the dtype and a checksum of each frozen weight: the mask depends on every bit of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spp.certifying.certificate import SparsityReport
from spp.certifying.sources import checkpoint_directory
from spp.configs.checks import is_number
from spp.configs.pst import PSTConfig, check_pattern
from spp.errors import AdapterError, CheckpointError, NonFiniteError, some_of
from spp.files import CheckpointReader, atomic_directory, content_crc32, dtype_name
from spp.files.carry import refuse_overlap
from spp.merging.places import locate
from spp.merging.rewrite import Rewriting, Transform, output, stored_dtype, write_shards
from spp.merging.weight import check_rounding
from spp.pst.function import Scales, masked_weight
from spp.pst.layer import FACTORS, factor_shapes
from spp.pst.model import config_of, is_wrapped, require_layers, trained_parameters, unwrap, wrap
from spp.rules import rescue_
from spp.rules.adapter import arithmetic_dtype
from spp.weights import FLOATS
from spp.weights.base_values import where_it_belongs
from spp.wrapping.adapter_files import (
    CONFIG_NAME,
    PST_TYPE,
    base_name_of,
    does_not_fit,
    misfits,
    read_files,
    refuse_type,
    shapes_of,
    write_files,
)
from spp.wrapping.adapters import name_of_base

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
_FACTS: dict[str, Callable[[Any], bool]] = {  # of each layer, in the config
    "sparsity": lambda value: is_number(value) and 0 <= value < 1,
    "base_crc32": lambda value: type(value) is int,
    "base_dtype": lambda value: isinstance(value, str) and value in FLOATS,
}


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
    with atomic_directory(path, overwrite=overwrite) as directory:
        write(model, directory)
    return Path(path)


def write(model: nn.Module, directory: Path, checksums: dict[str, int] | None = None) -> None:
    """Write the two files into a directory that exists (`save` is the safe whole).

    Args:
        checksums: of `base_checksums`, where they are known.
    """
    layers = require_layers(model)
    config = {
        **config_of(model).to_dict(),
        "peft_type": PST_TYPE,
        "base_model_name_or_path": name_of_base(model),
        "base_crc32": base_checksums(model) if checksums is None else checksums,
        "base_dtype": {path: dtype_name(layer.weight.dtype) for path, layer in layers.items()},
        "sparsity": {path: layer.sparsity for path, layer in layers.items()},
    }
    write_files(directory, config, {name: p.detach() for name, p in trained_parameters(model).items()})


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
    directory, values, tensors = read_files(path)
    if values.get("peft_type") != PST_TYPE:
        refuse_type(directory, values, PST_TYPE)
    known = {f.name for f in fields(PSTConfig)}
    config = PSTConfig.from_dict({name: value for name, value in values.items() if name in known})
    facts: dict[str, Any] = {}
    for name, is_one in _FACTS.items():
        facts[name] = values.get(name)
        if not isinstance(facts[name], dict) or not all(map(is_one, facts[name].values())):
            raise CheckpointError(f"{directory / CONFIG_NAME}: {name} must map the paths of layers to what it says")
    return PSTState(directory, config, tensors, **facts, base_name=base_name_of(values))


def base_checksums(model: nn.Module) -> dict[str, int]:
    """Return {path: crc32} of the frozen weights."""
    return {path: content_crc32(layer.weight.detach()) for path, layer in require_layers(model).items()}


def _check(model: nn.Module, state: PSTState) -> None:
    """Raise an AdapterError, all of it in one, for what does not fit the model."""
    keys, misshapen = misfits(shapes_of(trained_parameters(model)), shapes_of(state.tensors))
    problems, layers = keys + misshapen, require_layers(model)
    for name in _FACTS:
        if getattr(state, name).keys() != layers.keys():
            problems.append(f"{name} of {CONFIG_NAME} does not list the layers of this model")
    if problems:
        raise AdapterError(does_not_fit(f"the PST state in {state.source}", problems))
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


# ---- A dense checkpoint pruned by what PST learned: one weight at a time in memory, never the model.
#
# The tensors are bit for bit those of `spp.pst.convert` in memory, where products of the factors round alike.


def convert_checkpoint(
    base_dir: str | os.PathLike[str],
    state_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> SparsityReport:
    """Make permanent what PST learned of a dense checkpoint; the output appears whole and certified, or not at all.

    Args:
        base_dir: the dense checkpoint (safetensors) that PST trained on, or a hub id.
        state_dir: what `spp.pst.save` wrote, such as the adapter/ of a tuning run, or a hub id.
        out_dir: a directory outside both that does not exist yet, unless `overwrite`.
        dtype: convert all floating tensors; None keeps each tensor's own.
        overwrite: replace what is at `out_dir`, if it is an output (spp.files.recognised) and holds nothing else.
        dry_run: do and check everything, and write nothing.

    Returns:
        The zeros of the output, as its certificate says.

    Raises:
        AdapterError: the state does not fit, or was trained on other weights.
        NonFiniteError: NaN or infinity in the state, a projection or a result.
        CheckpointError: files are bad.
        ConfigError: `out_dir` is, contains or lies inside a source, or the state's config is wrong.
        OutputError: `out_dir` exists, or cannot be written.

    Example:
        >>> spp.convert_checkpoint("dense", "run/adapter", "sparse-2of4").pattern  # doctest: +SKIP
        '2:4'
    """
    check_rounding(dtype, "nearest")
    base, state = checkpoint_directory(base_dir), read(Path(state_dir))
    refuse_overlap(Path(out_dir), base, "the base")
    refuse_overlap(Path(out_dir), state.source, "the PST state")
    with CheckpointReader(base) as reader:
        converting = _Converting(reader, state, dtype, base_dir)
        rewriting = Rewriting(reader, converting.transforms, dtype, certified=converting.layers)
        with output(rewriting, out_dir, overwrite=overwrite, dry_run=dry_run) as directory:
            write_shards(rewriting, directory, "converting")
            certificate = rewriting.certificate()
            if directory is not None:
                certificate.write(directory)
    logger.info("converted %d layers%s", len(converting.layers), "" if dry_run else f" into {out_dir}")
    return certificate.report()


class _Converting:
    """Which tensors become what.

    Attributes:
        layers: {key on disk: (module path, whether it is stored (n, m))}.
        transforms: of these, and of modules that trained as a whole.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        state: PSTState,
        dtype: torch.dtype | None,
        given: str | os.PathLike[str],
    ) -> None:
        self.reader, self.state, self.dtype, self.given = reader, state, dtype, os.fspath(given)
        paths = list(state.sparsity)
        places = locate(reader, paths)
        keys = {f"{path}.{name}": (path, name) for path in paths for name in FACTORS}
        self.whole = {name: tensor for name, tensor in state.tensors.items() if name not in keys}
        problems = [f"missing {key}" for key in keys.keys() - state.tensors.keys()]
        problems += [f"the base has no {path}.weight" for path in paths if path not in places]
        for name in ("base_crc32", "base_dtype"):
            problems += [f"{name} lacks {path}" for path in paths if path not in getattr(state, name)]
        for path, place in places.items():
            if place.group is not None or len(place.shape) != 2:
                problems.append(f"{path} is kept on the disk as {', '.join(place.keys)}; convert it in memory")
            elif not any(f"missing {path}." in problem for problem in problems):
                m, n = place.shape[::-1] if place.transposed else place.shape
                k, q = state.config.weight_rank, state.config.mask_rank
                expected = factor_shapes(m, n, k, q)
                needed = {f"{path}.{name}": shape for name, shape in expected.items()}
                problems += misfits(needed, shapes_of({key: state.tensors[key] for key in needed}))[1]
        problems += [
            f"{name}, which trained as a whole, is not in the base: convert in memory, with spp.pst.load(model, …)"
            for name, tensor in self.whole.items()
            if name not in reader or reader.shape(name) != tuple(tensor.shape)
        ]
        if problems:
            what = f"the PST state in {state.source}"
            raise AdapterError(does_not_fit(what, problems, f"does not fit {reader.directory}"))
        self.layers = {place.keys[0]: (path, place.transposed) for path, place in places.items()}
        changed = Transform(self._converted, keeps_zeros=False)
        replaced = Transform(lambda key, _: self.whole[key].to(self._stored(key)), keeps_zeros=False)
        self.transforms = {**dict.fromkeys(self.layers, changed), **dict.fromkeys(self.whole, replaced)}

    def _stored(self, key: str) -> torch.dtype:
        return stored_dtype(self.reader, key, self.dtype)

    def _converted(self, key: str, weight: Tensor) -> Tensor:
        path, transposed = self.layers[key]
        state, config = self.state, self.state.config
        weight = weight.to(getattr(torch, state.base_dtype[path]))
        if content_crc32(weight) != state.base_crc32[path]:
            raise AdapterError(
                f"{key} of {self.reader.directory} is not the weight that {state.source} was trained on; the mask "
                f"would be another; {where_it_belongs(state.base_name, self.given)}"
            )
        arithmetic = arithmetic_dtype(weight.dtype)
        factors = tuple(state.tensors[f"{path}.{name}"].to(arithmetic) for name in FACTORS)
        scales = Scales(
            config.weight_scale,
            config.low_rank_scale,
            config.structured_scale,
            state.sparsity[path],
            check_pattern(config.pattern),
        )
        masked, _ = masked_weight(weight.T if transposed else weight, factors, scales)  # type: ignore[arg-type]  # six
        effective = masked.to(weight.dtype)
        if not bool(torch.isfinite(effective).all()):
            raise NonFiniteError(f"{path}: the masked weight is not finite; take an earlier checkpoint")
        result = effective.to(self._stored(key))
        rescue_(result, effective)
        return result.T if transposed else result
