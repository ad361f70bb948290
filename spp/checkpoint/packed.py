"""Load a pruned checkpoint straight into packed weights: the dense model never exists."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from tqdm import tqdm

from spp.calibrate.plan import Names
from spp.checkpoint.sources import checkpoint_directory
from spp.checkpoint_prune_model import StreamedModel
from spp.experts_forward import adapt_experts
from spp.experts_packed import PackedExperts
from spp.files import CheckpointReader
from spp.inject import replace_modules
from spp.inject_dense import warn_dense
from spp.inject_guards import guard_saving
from spp.layer_packed import PackedLinear
from spp.packed import PackedStack
from spp.targets import resolve_projections
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

    At any time at most one projection is dense, of fused experts one expert's, if the checkpoint allows reading them
    one by one. What is not packed (embeddings, norms, an output head) is loaded as it is.

    Args:
        dir: a checkpoint of safetensors files, or a hub id.
        target_modules, exclude_modules: which projections are packed, as in SPPConfig.
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
    with CheckpointReader(directory) as reader:
        streamed = StreamedModel(reader, dtype, device)
        model: Any = streamed.model
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
            streamed.load(keys, reader)  # one dense weight, which the layer packs and lets go of
            layer = PackedLinear(target.module, where=path)
            layer.weight_requires_grad = True
            packed.append(Projection(path, layer, input_axis=layer.input_axis))
            replace_modules(model, {id(target.module): layer})
    warn_dense(packed, "pack")
    model.tie_weights()
    model.to(device)  # buffers that the model's own code computes
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    _take_generation_config(model, directory)
    model.config._name_or_path = os.fspath(dir)
    guard_saving(model)
    logger.info("loaded %s with %d packed layers", directory, len(packed))
    return model.eval()


def _pack_experts(target: Projection, keys: list[str], streamed: StreamedModel, reader: CheckpointReader) -> None:
    """Have a module of fused experts hold one of its weights packed, read expert by expert where that can be."""
    get, packed = streamed.experts(target.parameter_path, keys, reader), None
    if get is None:
        streamed.load(keys, reader)
    else:
        transposed = target.input_axis == -2
        packed = PackedStack.pack(
            lambda expert: get(expert).T if transposed else get(expert),
            target.shape[0],
            transposed=transposed,
            where=target.parameter_path,
        )
    experts = PackedExperts(target, packed)
    experts.weight_requires_grad = True
    adapt_experts({target.name: experts})


def _take_generation_config(model: Any, directory: os.PathLike[str]) -> None:
    from transformers import GenerationConfig

    if os.path.exists(os.path.join(directory, "generation_config.json")) and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(directory)
