"""SPPTrainer: transformers' Trainer for a model wrapped by spp."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from spp.configs.adapter import ALSO_LR
from spp.configs.checks import check_number
from spp.errors import CheckpointError, ConfigError, WrapError, arg
from spp.masks.patterns import nonzero_mask
from spp.training.adapter_trainer import AdapterTrainer
from spp.training.mask_updates import MaskUpdates
from spp.training.sharding import Sharding
from spp.wrapping.adapter_files import MASKS_STATE_NAME
from spp.wrapping.adapters import base_masks, load_adapter, refill, warn_without_effect, write_adapter
from spp.wrapping.state import uncompiled
from spp.wrapping.wrap import adapter_layers, adapter_parameters, also_trained, is_wrapped

_PEFT_MARK = "_hf_peft_config_loaded"


class SPPTrainer(AdapterTrainer):
    """Trains the adapter of a wrapped model, as AdapterTrainer does: resuming is exact, and α and β train, with what
    `also_train` of spp.wrap names at a rate of its own and without weight decay.

    `save_model` and checkpoints write an adapter directory that `spp.load_adapter` reads, after a look at the base's
    zeros; with `load_best_model_at_end` the best checkpoint's adapter is loaded.

    Args:
        model: wrapped by `spp.wrap`.
        args: TrainingArguments; rest, options: as in transformers.Trainer.
        loss_chunk, teacher, teacher_bits, teacher_cache, ce_weight, kl_weight, temperature, hidden_weight: as in
            LossTrainer (spp.training.loss_trainer): a loss in chunks, and a teacher beside the labels.
        mask_updates: prune and regrow a few weights now and then (spp.training.mask_updates); None keeps every zero.
            Checkpoints hold the masks then, and the adapter belongs to the pruned model as it is at the end.
        strict_values: as in `spp.load_adapter`, for a checkpoint that is resumed.
        also_lr: peak learning rate of what trains beside the adapter; None is 1e-3 (spp.configs.adapter.ALSO_LR).

    Raises:
        WrapError: the model is not wrapped, or parameters other than the adapter's require gradients.
        MaskError: at a save, the base's zero pattern is not the one at the start, or of the last mask update.
        ConfigError: FSDP1, FSDP2 with mixed precision, or DeepSpeed in another dtype than the base's.
        AdapterError: a checkpoint does not fit the model.
        CheckpointError: a checkpoint to resume from is not whole.

    Example:
        >>> model = spp.wrap(model)  # doctest: +SKIP
        >>> arguments = TrainingArguments("run", learning_rate=4e-3)  # doctest: +SKIP
        >>> SPPTrainer(model, arguments, train_dataset=rows).train()  # doctest: +SKIP
    """

    compared = "the zero pattern of the base"
    can_shard = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        mask_updates: MaskUpdates | None = None,
        strict_values: bool = False,
        also_lr: float | None = None,
        **options: Any,
    ) -> None:
        if also_lr is not None:
            check_number("also_lr", also_lr, above=0.0)
        self.also_lr = ALSO_LR if also_lr is None else also_lr
        self.mask_updates = mask_updates
        self.strict_values = strict_values
        with _adapter_is_known(model):
            super().__init__(model, args, *rest, **options)
        if mask_updates is not None:
            if self.args.world_size > 1 or self.args.n_gpu > 1:
                raise ConfigError("mask updates work in one process on one device: elsewhere each would choose its own")
            self.add_callback(mask_updates)

    def require_prepared(self, model: nn.Module) -> None:
        """Raise a WrapError unless the model is wrapped."""
        if not is_wrapped(model):
            raise WrapError(
                f"{type(model).__name__} is not wrapped, so there is no adapter to train: call spp.wrap(model) "
                f"on the pruned model first, and hand the same object to {type(self).__name__}"
            )

    def begin(self, model: nn.Module) -> None:
        """Remember the zero pattern."""
        self._zeros = _ZeroCount()
        if self.mask_updates is None:
            self._masks = base_masks(model)
        else:
            self.mask_updates.attach(model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.sharding = Sharding(model, self.expected, self.args.should_save)

    @property
    def expected(self) -> dict[str, str]:
        """The hash of every zero pattern, at the start or after the last mask update."""
        return self._masks if self.mask_updates is None else self.mask_updates.state.hashes()

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """Return α and β of every layer, and what trains beside them."""
        return adapter_parameters(model)

    def create_optimizer(self, *rest: Any, **options: Any) -> Any:
        """Create the optimizer, with a group of its own for what trains beside the adapter."""
        given = self.optimizer is not None
        made = super().create_optimizer(*rest, **options)
        if not given:
            set_also_rate(made, self._bare_model(), self.also_lr)
        return made

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of all that is decayed: the adapter's, which puts what trains beside it into a group."""
        return without_also(super().get_decay_parameter_names(model), model)

    def frozen(self, model: nn.Module) -> dict[str, Any]:
        """Return the hash of every layer's zero pattern."""
        return base_masks(model)

    def write(self, model: nn.Module, directory: Path, frozen: dict[str, Any]) -> None:
        """Write the adapter, and the masks where they are updated."""
        write_adapter(model, directory, frozen, self.sharding.values if self.sharding is not None else None)
        if self.mask_updates is not None:
            self.mask_updates.state.save(directory)

    def read(self, model: nn.Module, directory: Path) -> None:
        """Load the adapter, after the masks that it was trained on."""
        if self.sharding is not None and self.sharding.on:
            refill(model, directory, self.sharding.masks)
            return
        has_masks = (directory / MASKS_STATE_NAME).exists()
        if has_masks != (self.mask_updates is not None):
            raise CheckpointError(
                f"{directory} was written {'with' if has_masks else 'without'} mask updates; resume it likewise "
                f"({arg('mask_updates', ...)})"
            )
        if self.mask_updates is not None:
            self.mask_updates.state.load(directory)
        load_adapter(model, directory, strict_values=self.strict_values)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; unless the Trainer itself asks, for a checkpoint, warn if it changes no weight."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save and not self.is_sharded:
            warn_without_effect(self._bare_model())

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the weights that the adapter scales, in [0, 1]."""
        if self.sharding is not None and self.sharding.on:
            return self.sharding.sparsity
        return self._zeros.sparsity(self._bare_model())


def without_also(names: Iterable[str], model: nn.Module) -> list[str]:
    """Return the names of parameters of a wrapped model, but those that train beside the adapter."""
    also = {id(one.trained) for one in also_trained(model).values()}
    parameters = dict(model.named_parameters())
    return [name for name in names if id(parameters[name]) not in also]


def set_also_rate(optimizer: Any, model: nn.Module, lr: float) -> None:
    """Give the groups of an optimizer that hold nothing but what trains beside the adapter a rate of their own."""
    also = {id(one.trained) for one in also_trained(model).values()}
    for group in optimizer.param_groups:
        if group["params"] and all(id(parameter) in also for parameter in group["params"]):
            group["lr"] = lr


class _ZeroCount:
    """Counts zeros, and counts a weight again only after a write to it, so that a log line costs nothing."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int], int, int]] = {}

    def sparsity(self, model: nn.Module) -> float:
        zeros, total = 0, 0
        for path, layer in adapter_layers(model).items():
            stored = layer.stored_weight
            state = (stored.data_ptr(), stored._version)  # (0, 0) of one that accelerate has offloaded
            known = self._known.get(path)
            if known is None or known[0] != state:
                weight = layer.held()
                kept = int(nonzero_mask(weight.entries()).sum())
                known = self._known[path] = state, weight.numel - kept, weight.numel
            zeros, total = zeros + known[1], total + known[2]
        return zeros / total


@contextlib.contextmanager
def _adapter_is_known(model: nn.Module | None) -> Iterator[None]:
    """Meet Trainer's guard against training quantized weights: a wrapped model has an adapter, which alone trains.

    The guard asks for the mark that PEFT leaves. It is set while Trainer is made and no longer: elsewhere it would have
    transformers look for PEFT's adapters. wrap has refused what is quantized by a method that it does not know.
    """
    bare: Any = None if model is None else uncompiled(model)
    if not getattr(bare, "is_quantized", False) or getattr(bare, _PEFT_MARK, False):
        yield
        return
    before = bare.__dict__.get(_PEFT_MARK)
    setattr(bare, _PEFT_MARK, True)
    try:
        yield
    finally:
        if before is None:
            delattr(bare, _PEFT_MARK)
        else:
            setattr(bare, _PEFT_MARK, before)
