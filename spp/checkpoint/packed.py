"""Load a pruned checkpoint straight into packed weights: the dense model never exists."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spp.calibrate.plan import Names
from spp.checkpoint.sources import checkpoint_directory
from spp.checkpoint_prune_model import StreamedModel
from spp.errors import TargetError
from spp.files import CheckpointReader
from spp.inject import replace_modules
from spp.inject_dense import warn_dense
from spp.inject_guards import guard_saving
from spp.layer_packed import PackedLinear
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

    At any time at most one projection is dense. What is not packed (embeddings, norms, an output
    head) is loaded as it is.

    Args:
        dir: a checkpoint of safetensors files, or a hub id.
        target_modules, exclude_modules: which linears are packed, as in SPPConfig.
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
    with CheckpointReader(directory) as reader:
        streamed = StreamedModel(reader, dtype, device)
        model: Any = streamed.model
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
            streamed.load(stored[f"{path}.weight"], reader)  # one dense weight, which the layer packs and lets go of
            assert isinstance(module, nn.Linear)
            layer = PackedLinear(module, where=path)
            layer.weight_requires_grad = True
            packed.append(Projection(path, layer))
            replace_modules(model, {id(module): layer})
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


def _take_generation_config(model: Any, directory: os.PathLike[str]) -> None:
    from transformers import GenerationConfig

    if os.path.exists(os.path.join(directory, "generation_config.json")) and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(directory)
