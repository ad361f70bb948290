"""Keep the frozen weights of a model packed, without an adapter; unpack them; load a checkpoint straight into them."""

from __future__ import annotations

import logging
import os
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from spp.certifying.sources import checkpoint_directory
from spp.configs.pruning import Names
from spp.errors import ConfigError, TargetError, WrapError, call
from spp.layers.checks import survey, warn_dense
from spp.layers.experts import PackedExperts, adapt_experts, check_packable_experts, release_experts
from spp.layers.host import PackedLinear, check_packable
from spp.models.projection import Projection, find_projections, plain_name
from spp.models.streamed import StreamedModel
from spp.models.targets import resolve_projections
from spp.weights import PackedStack, PackedWeight
from spp.weights.packed.disk import DenseReader
from spp.wrapping.state import guard_saving, replace_modules, uncompiled
from spp.wrapping.wrap import is_wrapped

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


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
        raise WrapError(
            f"the model is wrapped: wrap it with {call('wrap', 'model', packed=True)}, or spp.unwrap(model) first"
        )
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


@torch.inference_mode(False)  # what is made inside it could never be trained
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
    return {plain_name(path): module for path, module in found if isinstance(module, PackedLinear | PackedExperts)}


# ---- A pruned checkpoint, plain or packed, straight into packed weights: the dense model never exists.


def load_packed(
    dir: str | os.PathLike[str],
    *,
    target_modules: Names = None,
    exclude_modules: Names = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Load a pruned checkpoint with its projections packed, as `spp.pack` packs them, one weight after the other.

    Of a plain checkpoint at most one projection is dense at any time, of fused experts one expert's, if the checkpoint
    allows reading them one by one. The weights of a packed one (`spp.export_packed`) are copied as they are. What is
    not packed (embeddings, norms, an output head) is loaded dense.

    Not promised: that the weights are those of the directory's certificate, which is not read, or finite;
    `spp.verify(dir)` looks at both.

    Args:
        dir: a plain or packed checkpoint of safetensors files, or a hub id.
        target_modules, exclude_modules: which projections are packed, as in SPPConfig; without either, of a packed
            checkpoint those that it holds packed.
        dtype: of all floating tensors; None is the checkpoint's own.
        device: where the model is put.

    Returns:
        A transformers model in eval mode: for inference, or for spp.wrap(model, packed=True).

    Raises:
        CheckpointError: the files are bad, or (StreamingError) name or shape the weights otherwise than the model does.
        ConfigError: the checkpoint is quantized. TargetError: nothing matches.

    Example:
        >>> model = spp.load_packed("pruned-2of4")  # doctest: +SKIP
    """
    directory = checkpoint_directory(dir)
    with DenseReader(directory) as reader:
        streamed = StreamedModel(reader, dtype, device)
        model: Any = streamed.model
        if reader.packed and target_modules is None and exclude_modules is None:
            targets = _packed_on_disk(model, streamed, reader)
        else:
            targets = resolve_projections(model, target_modules, exclude_modules)
        stored: dict[str, list[str]] = {target.parameter_path: [] for target in targets.values()}
        rest: list[str] = []  # keys on disk of what is not packed
        for key in reader:
            stored.get(streamed.memory_key(key), rest).append(key)
        streamed.require_floats(stored)
        streamed.load(rest, reader)
        packed = []
        for path, target in tqdm(targets.items(), desc="packing", unit="layer", disable=None):
            keys = stored[target.parameter_path]
            if target.fused:
                _pack_experts(target, keys, streamed, reader)
                packed.append(target)
                continue
            weight = _as_stored(target, keys, streamed, reader)
            if weight is None:
                streamed.load(keys, reader)  # one dense weight, which the layer packs and frees
                layer = PackedLinear(target.module, where=path)
            else:
                copied = PackedWeight(weight.layout, *(part.clone() for part in weight.tensors()))
                layer = PackedLinear(target.module, copied.to(device), where=path)
            layer.weight_requires_grad = True
            packed.append(Projection(path, layer, input_axis=layer.input_axis))
            replace_modules(model, {id(target.module): layer})
    warn_dense({target.path: survey(target) for target in packed}, "pack")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # that of a packed checkpoint: what is saved of the model is a plain one
    model.tie_weights()
    model.to(device)  # buffers that the model's own code computes
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    _take_generation_config(model, directory)
    model.config._name_or_path = os.fspath(dir)
    guard_saving(model)
    logger.info("loaded %s with %d packed layers", directory, len(packed))
    return model.eval()


def _pack_experts(target: Projection, keys: list[str], streamed: StreamedModel, reader: DenseReader) -> None:
    """Have a module of fused experts hold one of its weights packed, read expert by expert where that can be."""
    transposed, experts = target.input_axis == -2, target.shape[0]
    stored, get = _as_stored(target, keys, streamed, reader), streamed.experts(target.parameter_path, keys, reader)
    if stored is not None:
        packed = PackedStack.of_rows(stored, experts, transposed=transposed)
    elif get is not None:
        read = get
        packed = PackedStack.pack(
            lambda expert: read(expert).T if transposed else read(expert),
            experts,
            transposed=transposed,
            where=target.parameter_path,
        )
    else:
        streamed.load(keys, reader)
        packed = None
    layer = PackedExperts(target, packed)
    layer.weight_requires_grad = True
    adapt_experts({target.name: layer})


def _packed_on_disk(model: nn.Module, streamed: StreamedModel, reader: DenseReader) -> dict[str, Projection]:
    """Return {path: projection} of what the disk holds packed: linears as they are, experts fused or apart."""
    stored: dict[str, list[str]] = {}
    for key in reader:
        stored.setdefault(streamed.memory_key(key), []).append(key)
    found = {}
    for projection in find_projections(model):
        keys = stored.get(projection.parameter_path, [])
        whole = projection.fused or [tuple(reader.shape(key)) for key in keys] == [projection.shape]
        if keys and whole and all(key in reader.packed for key in keys):
            found[projection.path] = projection
    return found


def _as_stored(
    target: Projection, keys: list[str], streamed: StreamedModel, reader: DenseReader
) -> PackedWeight | None:
    """Return the packed weight that the disk holds, mapped, where it is the one that the model is to have."""
    if len(keys) != 1 or keys[0] not in reader.packed or streamed.dtype(keys[0]) != reader.dtype(keys[0]):
        return None
    axis = target.input_axis % len(target.shape)
    if reader.packed[keys[0]].input_axis != axis or streamed.is_converted(keys[0]):
        return None
    return reader.packed_weight(keys[0])


def _take_generation_config(model: Any, directory: os.PathLike[str]) -> None:
    from transformers import GenerationConfig

    if os.path.exists(os.path.join(directory, "generation_config.json")) and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(directory)
