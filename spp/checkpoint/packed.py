"""Load a pruned checkpoint, plain or packed, straight into packed weights: the dense model never exists."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spp.calibrate.plan import Names
from spp.checkpoint.sources import checkpoint_directory
from spp.checkpoint_prune_model import StreamedModel
from spp.errors import TargetError
from spp.inject import replace_modules
from spp.inject_dense import warn_dense
from spp.inject_guards import guard_saving
from spp.layer_packed import PackedLinear
from spp.packed import PackedWeight
from spp.packed.disk import DenseReader
from spp.targets import resolve_targets
from spp.targets_layout import Projection

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

    Of a plain checkpoint at most one projection is dense at any time. The weights of a packed one (`spp.export_packed`)
    are copied as they are. What is not packed (embeddings, norms, an output head, experts) is loaded dense.

    Args:
        dir: a plain or packed checkpoint of safetensors files, or a hub id.
        target_modules, exclude_modules: which linears are packed, as in SPPConfig; without either, of a packed
            checkpoint those that it holds packed.
        dtype: of all floating tensors; None is the checkpoint's own.
        device: where the model is put.

    Returns:
        A transformers model in eval mode: for inference, or for spp.wrap(model, packed=True).

    Raises:
        CheckpointError: the files are bad, or (StreamingError) name or shape the weights otherwise than the model does.
        ConfigError: the checkpoint is quantized. TargetError: nothing matches, or a match is no nn.Linear.

    Example:
        >>> model = spp.load_packed("pruned-2of4")  # doctest: +SKIP
    """
    directory = checkpoint_directory(dir)
    with DenseReader(directory) as reader:
        streamed = StreamedModel(reader, dtype, device)
        model: Any = streamed.model
        if reader.packed and target_modules is None and exclude_modules is None:
            targets = _packed_linears(model, {streamed.memory_key(key): reader.shape(key) for key in reader.packed})
        else:
            targets = resolve_targets(model, target_modules, exclude_modules)
        others = [path for path, module in targets if not isinstance(module, nn.Linear)]
        if others:
            raise TargetError(f"{others[0]} is no torch.nn.Linear; those and their subclasses are packed")
        stored: dict[str, list[str]] = {f"{path}.weight": [] for path, _ in targets}  # {name in memory: keys on disk}
        rest: list[str] = []
        for key in reader:
            stored.get(streamed.memory_key(key), rest).append(key)
        streamed.require_floats(stored)
        streamed.load(rest, reader)
        packed = []
        for path, module in tqdm(targets, desc="packing", unit="layer", disable=None):
            assert isinstance(module, nn.Linear)
            keys = stored[f"{path}.weight"]
            weight = _as_stored(reader, streamed, keys)
            if weight is None:
                streamed.load(keys, reader)  # one dense weight, which the layer packs and lets go of
                layer = PackedLinear(module, where=path)
            else:
                layer = PackedLinear(module, weight.to(device), where=path)
            layer.weight_requires_grad = True
            packed.append(Projection(path, layer))
            replace_modules(model, {id(module): layer})
    warn_dense(packed, "pack")
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


def _packed_linears(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of the linears whose weights are packed on disk; `shapes` by their names in memory."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and shapes.get(f"{path}.weight") == (module.out_features, module.in_features)
    ]


def _as_stored(reader: DenseReader, streamed: StreamedModel, keys: list[str]) -> PackedWeight | None:
    """Return a copy of the packed weight that the disk holds, where it is the one that the model is to have."""
    if len(keys) != 1 or keys[0] not in reader.packed or streamed.dtype(keys[0]) != reader.dtype(keys[0]):
        return None
    if reader.packed[keys[0]].input_axis != 1 or streamed.is_converted(keys[0]):
        return None
    weight = reader.packed_weight(keys[0])
    return PackedWeight(weight.layout, *(part.clone() for part in weight.tensors()))


def _take_generation_config(model: Any, directory: os.PathLike[str]) -> None:
    from transformers import GenerationConfig

    if os.path.exists(os.path.join(directory, "generation_config.json")) and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(directory)
