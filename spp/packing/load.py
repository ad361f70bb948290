"""Load a pruned checkpoint, plain or packed, straight into packed weights: the dense model never exists."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spp.certifying.sources import checkpoint_directory
from spp.configs.pruning import Names
from spp.layers.checks import survey, warn_dense
from spp.layers.experts import PackedExperts, adapt_experts
from spp.layers.host import PackedLinear
from spp.models.projection import Projection, find_projections
from spp.models.streamed import StreamedModel
from spp.models.targets import resolve_projections
from spp.weights import PackedStack, PackedWeight
from spp.weights.packed.disk import DenseReader
from spp.wrapping.state import guard_saving, replace_modules

logger = logging.getLogger(__name__)


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
