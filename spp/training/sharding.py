"""A trainer whose weights are sharded, by FSDP2 through accelerate or by DeepSpeed: what is looked at, and when.

    begin      zero patterns and values are hashed whole, before anything is sharded
    sharded    each rank hashes its own shards
    check      the shards are compared with that: no weight is gathered to save
    save       every rank gathers the adapter, rank 0 writes it

With FSDP2 the adapter, optimizer.pt and scheduler.pt have the format of one process, so a checkpoint is resumed on any
number of ranks, with FSDP2 or without. DeepSpeed's optimizer has its own files, global_stepN/, without the frozen
weights: they are resumed by DeepSpeed on as many ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spp.distributed.sharded import (
    full_optimizer_state,
    holds_shards,
    is_sharded,
    load_optimizer_state,
    local,
    settle,
)
from spp.distributed.sums import together, total
from spp.errors import CheckpointError, ConfigError, MaskError, arg
from spp.files import content_sha256, dtype_name, mask_sha256
from spp.masks.patterns import nonzero_mask
from spp.weights import HoldsWeight
from spp.wrapping.adapters import base_values, fill_layers
from spp.wrapping.wrap import AdapterLayer, adapter_layers, also_trained

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


def check_engine(trainer: Any, supported: bool) -> None:
    """Raise a ConfigError for an engine that shards in a way that a trainer does not support.

    Args:
        supported: whether the trainer supports FSDP2 and DeepSpeed.
    """
    name = type(trainer).__name__
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return
    if not supported:
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
        raise ConfigError(f"{name} does not support {engine}; use one device or plain DDP")
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 3
    if trainer.loss_chunk is not None and stage == 3:
        raise ConfigError(
            "a loss in chunks, which a teacher needs too, reads the output head after the forward, when a sharded one "
            f"is not whole: leave {arg('loss_chunk')} and {arg('teacher')} out, or use plain DDP or ZeRO-2"
        )
    if trainer.is_deepspeed_enabled:
        _check_dtypes(trainer)
        return
    if getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "fsdp_version", 1) != 2:
        raise ConfigError(
            f"{name} does not support FSDP1, which flattens the weights of a block into one: set fsdp_version to 2 in "
            "accelerate's config, or version to 2 in fsdp_config"
        )
    if trainer.accelerator.mixed_precision != "no":
        raise ConfigError(
            f"with FSDP2, mixed precision ({trainer.accelerator.mixed_precision}) would round the adapter itself, so "
            "that what is trained is not what a merge stores: turn it off and load the model in bfloat16 instead"
        )


def _check_dtypes(trainer: Any) -> None:
    """Raise a ConfigError where DeepSpeed would round the base: what is trained is to be what a merge stores."""
    precision = trainer.accelerator.mixed_precision
    wanted = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    dtypes = {layer.held().dtype for layer in adapter_layers(trainer._bare_model()).values()}
    if dtypes - {wanted}:
        found = ", ".join(sorted(dtype_name(dtype) for dtype in dtypes))
        raise ConfigError(
            f"DeepSpeed would convert the base, which is {found}, to its precision ({precision}): load the model in "
            "the dtype that DeepSpeed computes in, or set bf16 in its config for a base in bfloat16"
        )


def check_resumable(trainer: Any, checkpoint: str) -> None:
    """Raise a CheckpointError for a checkpoint whose optimizer another engine wrote, or another number of ranks."""
    steps = sorted(Path(checkpoint).glob("global_step*"))
    if not trainer.is_deepspeed_enabled and steps:
        raise CheckpointError(
            f"the optimizer in {checkpoint} is DeepSpeed's, which no other engine reads: resume with DeepSpeed, or "
            "start anew from its adapter with spp.load_adapter"
        )
    if not trainer.is_deepspeed_enabled:
        return
    if not steps:
        raise CheckpointError(
            f"{checkpoint} was written without DeepSpeed, which cannot read its optimizer: resume without DeepSpeed"
        )
    ranks = len(list(steps[-1].glob("*optim_states.pt")))
    if ranks != trainer.args.world_size:
        raise CheckpointError(
            f"{checkpoint} was written by {ranks} ranks of DeepSpeed and these are {trainer.args.world_size}: resume "
            f"it on {ranks}"
        )


class Sharding:
    """The facts that a trainer remembers of a base that it shards.

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
        self._numel = sum(layer.held().numel for layer in adapter_layers(model).values())
        self._shards: dict[str, tuple[str, ...]] = {}

    def prepare(self, model: nn.Module) -> None:
        """Have the packed weights sharded too, and on a rank whose weights rank 0 sends, an adapter in memory.

        accelerate tells the optimizer's parameters apart by their addresses, and those on the meta device have none.
        """
        for module in model.modules():
            if isinstance(module, HoldsWeight):
                module.make_shardable()
        for path, layer in adapter_layers(model).items():
            named = zip(layer.resident_names(), layer.adapter_parameters(), strict=True)
            empty = {f"{path}.{name}": torch.zeros_like(p, device="cpu") for name, p in named if p.is_meta}
            fill_layers({path: layer}, empty)
        for one in also_trained(model).values():
            if one.trained.is_meta:
                one.fill(torch.zeros_like(one.trained, device="cpu"))

    def sharded(self, model: nn.Module) -> None:
        """Take note of the shards; every rank calls it."""
        if self.on or not holds_shards(model):
            return
        settle(model)
        layers = adapter_layers(model)
        self.on, self._shards = True, {path: _hashes(layer) for path, layer in layers.items()}
        stored = [layer.stored_weight for layer in layers.values()]
        kept = [int(nonzero_mask(local(one).detach()).sum()) for one in stored]
        whole = sum(count for count, one in zip(kept, stored, strict=True) if not is_sharded(one))  # packed, in buffers
        self.sparsity = 1 - (int(total(sum(kept) - whole)) + whole) / max(self._numel, 1)

    def check(self, model: nn.Module, compared: str) -> None:
        """Compare this rank's shards with what they were; every rank calls it, and all raise if one has to.

        Raises:
            MaskError: a shard is another; the message names the layers and the rank.
        """
        settle(model)
        changed = [path for path, layer in adapter_layers(model).items() if _hashes(layer) != self._shards.get(path)]
        with together(named=True):
            if changed:
                raise changed_error(compared, changed)


def changed_error(compared: str, changed: Iterable[str]) -> MaskError:
    """Return the error of a save that finds frozen weights changed.

    Args:
        compared: a name of what was. changed: the paths of the layers.
    """
    return MaskError(
        f"{compared} changed during training: {', '.join(sorted(changed))}. Nothing was saved; something wrote to "
        "frozen weights: load the model anew and resume from the last checkpoint"
    )


def _hashes(layer: AdapterLayer) -> tuple[str, ...]:
    """Return the hashes of this rank's shard of a layer's weight: the zero pattern of values, the contents of codes."""
    parts = [local(t).detach() for t in layer.stored_tensors()]
    return tuple(mask_sha256(t) if t.is_floating_point() else content_sha256(t) for t in parts)


def save_optimizer(optimizer: Any, scheduler: Any, directory: str, write: bool) -> None:
    """Write the optimizer and the scheduler in the format of one process; every rank calls it, one with `write`."""
    state = full_optimizer_state(optimizer)
    if write:
        torch.save(state, os.path.join(directory, OPTIMIZER))
        torch.save(scheduler.state_dict(), os.path.join(directory, SCHEDULER))


def save_deepspeed(trainer: Any, directory: str) -> None:
    """Write DeepSpeed's optimizer, without the frozen weights, and the scheduler beside it; every rank calls it."""
    from accelerate.utils import DeepSpeedSchedulerWrapper

    trainer.model_wrapped.save_checkpoint(directory, exclude_frozen_parameters=True)
    if trainer.args.should_save and not isinstance(trainer.lr_scheduler, DeepSpeedSchedulerWrapper):
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(directory, SCHEDULER))


def load_deepspeed(trainer: Any, directory: str) -> None:
    """Load what `save_deepspeed` wrote; the frozen weights are not in it."""
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    deepspeed_load_checkpoint(trainer.model_wrapped, directory, load_module_strict=False)


def load_optimizer(optimizer: Any, scheduler: Any, directory: str) -> None:
    """Load what one process or any number of ranks wrote."""
    saved = torch.load(os.path.join(directory, OPTIMIZER), map_location="cpu", weights_only=True)
    load_optimizer_state(optimizer, saved)
    scheduler.load_state_dict(torch.load(os.path.join(directory, SCHEDULER), weights_only=True))
