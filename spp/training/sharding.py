"""A trainer whose weights are sharded by FSDP2 through accelerate: what is looked at before and after, and when.

    begin      zero patterns and values are hashed whole, before anything is sharded
    sharded    each rank hashes its own shards
    check      the shards are compared with that: no weight is gathered to save
    save       every rank gathers the adapter, rank 0 writes it

The adapter, optimizer.pt and scheduler.pt have the format of one process, so a checkpoint is resumed on any number of
ranks, with FSDP2 or without.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spp.distributed.sharded import agree, full_optimizer_state, holds_shards, load_optimizer_state, local, settle
from spp.errors import ConfigError, MaskError
from spp.files import content_sha256, mask_sha256
from spp.masks.patterns import nonzero_mask
from spp.weights import HoldsWeight
from spp.wrapping.adapters import base_values
from spp.wrapping.wrap import AdapterLayer, adapter_layers

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


def check_engine(trainer: Any, supported: bool) -> None:
    """Raise a ConfigError for an engine that shards in a way that a trainer does not support.

    Args:
        supported: whether the trainer supports FSDP2.
    """
    name = type(trainer).__name__
    if trainer.is_deepspeed_enabled:
        raise ConfigError(f"{name} does not support DeepSpeed: shard with FSDP2 (fsdp_version: 2), or use plain DDP")
    if not trainer.is_fsdp_enabled:
        return
    if not supported:
        raise ConfigError(f"{name} does not support FSDP; use one device or plain DDP")
    if getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ConfigError(
            f"{name} does not support FSDP1, which flattens the weights of a block into one: set fsdp_version to 2 in "
            "accelerate's config, or version to 2 in fsdp_config"
        )
    if trainer.accelerator.mixed_precision != "no":
        raise ConfigError(
            f"with FSDP2, mixed precision ({trainer.accelerator.mixed_precision}) would round the adapter itself, so "
            "that what is trained is not what a merge stores: turn it off and load the model in bfloat16 instead"
        )


class Sharding:
    """What a trainer remembers of a base that it shards.

    Attributes:
        on: whether the model is sharded by now.
        masks: {path: hash of the zero pattern}, whole; of a rank whose weights are on the meta device nothing.
        values: fields of an adapter's config that say what values the base has; rank 0 writes them.
        sparsity: the fraction of zeros.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, str], first: bool) -> None:
        self.on = False
        self.masks = masks
        held = ((path, layer.held()) for path, layer in adapter_layers(model).items())
        self.values = base_values(held) if first else {}
        self.sparsity = 0.0
        self._shards: dict[str, tuple[str, ...]] = {}

    def prepare(self, model: nn.Module) -> None:
        """Have the packed weights sharded too."""
        for module in model.modules():
            if isinstance(module, HoldsWeight):
                module.make_shardable()

    def sharded(self, model: nn.Module) -> None:
        """Take note of the shards; every rank calls it."""
        if self.on or not holds_shards(model):
            return
        settle(model)
        layers = adapter_layers(model)
        self.on, self._shards = True, {path: _hashes(layer) for path, layer in layers.items()}
        kept = sum(int(nonzero_mask(local(layer.held().entries().detach())).sum()) for layer in layers.values())
        total = torch.tensor(kept, device=local(next(iter(layers.values())).stored_weight).device)
        torch.distributed.all_reduce(total)
        numel = sum(layer.held().numel for layer in layers.values())
        self.sparsity = 1 - int(total) / max(numel, 1)

    def check(self, model: nn.Module, compared: str) -> None:
        """Compare this rank's shards with what they were; every rank calls it, and all raise if one has to.

        Raises:
            MaskError: a shard is another; the message names the layers and the rank.
        """
        settle(model)
        changed = [path for path, layer in adapter_layers(model).items() if _hashes(layer) != self._shards.get(path)]
        agree(
            MaskError(
                f"{compared} changed during training: {', '.join(sorted(changed))}. Nothing was saved; something wrote "
                "to frozen weights: load the model anew and resume from the last checkpoint"
            )
            if changed
            else None
        )


def _hashes(layer: AdapterLayer) -> tuple[str, ...]:
    """Return the hashes of this rank's shard of a layer's weight: the zero pattern of values, the contents of codes."""
    parts = [local(t.detach()) for t in layer.held().storage()]
    return tuple(mask_sha256(t) if t.is_floating_point() else content_sha256(t) for t in parts)


def save_optimizer(optimizer: Any, scheduler: Any, directory: str, write: bool) -> None:
    """Write the optimizer and the scheduler in the format of one process; every rank calls it, one with `write`."""
    state = full_optimizer_state(optimizer)
    if write:
        torch.save(state, os.path.join(directory, OPTIMIZER))
        torch.save(scheduler.state_dict(), os.path.join(directory, SCHEDULER))


def load_optimizer(optimizer: Any, scheduler: Any, directory: str) -> None:
    """Load what one process or any number of ranks wrote."""
    saved = torch.load(os.path.join(directory, OPTIMIZER), map_location="cpu", weights_only=True)
    load_optimizer_state(optimizer, saved)
    scheduler.load_state_dict(torch.load(os.path.join(directory, SCHEDULER), weights_only=True))
