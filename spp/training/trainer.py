"""SPPTrainer: transformers' Trainer for a model wrapped by spp.

What differs: checkpoints hold the adapter alone and count only once they are whole; the zero pattern of the base is
compared with the one at the start whenever something is saved; only α and β reach the optimizer; the training log
has the sparsity.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from spp.adapters import base_masks, load_adapter
from spp.errors import CheckpointError, ConfigError, MaskError, WrapError
from spp.files import output_error
from spp.inject import adapter_layers, adapter_parameters, is_wrapped, uncompiled
from spp.layer import SPPLinear
from spp.packed import PackedWeight
from spp.patterns import nonzero_mask
from spp.training.causal_loss import captured_states, check_form, loss_of_states
from spp.training.checkpoints import last_complete, mark_complete, replace_adapter, require_complete, rotate, unmark

logger = logging.getLogger(__name__)

_PEFT_MARK = "_hf_peft_config_loaded"
_WRITER = "PytorchStreamWriter"  # torch.save says RuntimeError where the disk is full


class SPPTrainer(Trainer):
    """Trains the adapter of a wrapped model; takes the arguments of `transformers.Trainer`.

    `train(resume_from_checkpoint=True)` continues from the last whole checkpoint in `args.output_dir`, a path from
    that one; on the same machine the losses and the final adapter are bit for bit those of an uninterrupted run.
    `save_model` and checkpoints write an adapter directory that `spp.load_adapter` reads; with
    `load_best_model_at_end` the best checkpoint's adapter is loaded. `save_total_limit` counts whole checkpoints
    and always keeps the last and the best one.

    Args:
        loss_chunk: take the loss over so many tokens at a time, so that the logits of a batch never exist together
            (spp.training.causal_loss); None leaves it to the model. There are no logits for compute_metrics then.

    Raises:
        WrapError: the model is not wrapped, or parameters other than the adapter's require gradients.
        MaskError: at a save, the base's zero pattern is not the one at the start.
        AdapterError: a checkpoint does not fit the model.
        CheckpointError: a checkpoint to resume from is not whole.

    Example:
        >>> model = spp.wrap(model)  # doctest: +SKIP
        >>> arguments = TrainingArguments("run", learning_rate=4e-3)  # doctest: +SKIP
        >>> SPPTrainer(model, arguments, train_dataset=rows).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        loss_chunk: int | None = None,
        **options: Any,
    ) -> None:
        if model is not None:
            _require_wrapped(model)
        self.loss_chunk = loss_chunk
        self._states: list[Tensor] | None = None
        if loss_chunk is not None:
            _check_loss_chunk(loss_chunk, args, options)
            options["compute_loss_func"] = self._chunked_loss
        with _adapter_is_known(model):
            super().__init__(model, args, *rest, **options)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError("SPPTrainer does not support DeepSpeed or FSDP yet; use one device or plain DDP")
        self._masks_at_start = base_masks(self._bare_model())
        self._zeros = _ZeroCount()

    def compute_loss(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
        """Compute the loss; with `loss_chunk`, without the logits of the whole batch."""
        if self.loss_chunk is None:
            return super().compute_loss(model, inputs, *rest, **options)
        check_form(model, inputs)
        with captured_states(model) as self._states:
            return super().compute_loss(model, inputs, *rest, **options)

    def _chunked_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert self._states is not None and self.loss_chunk is not None
        states, self._states = self._states, None
        return loss_of_states(self._bare_model(), states, labels, self.loss_chunk, num_items_in_batch)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with the order of the data fixed by `args.seed` where `data_seed` is not given.

        Otherwise it hangs on whatever seeded torch last before `train`, and a resumed run would see other batches.
        """
        if self.args.data_seed is None and self.args.accelerator_config.use_seedable_sampler:
            self.args.data_seed = self.args.seed
        super().create_accelerator_and_postprocess()

    def call_model_init(self, trial: Any = None) -> Any:
        """Build the model with `model_init`, which has to wrap it."""
        model = super().call_model_init(trial)
        _require_wrapped(model)
        self._masks_at_start = base_masks(model)
        return model

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the weights that the adapter scales, in [0, 1]."""
        return self._zeros.sparsity(self._bare_model())

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **options: Any) -> Any:
        """Train; see `transformers.Trainer.train`, and above for what resuming means here."""
        if resume_from_checkpoint is True:
            last = last_complete(self.args.output_dir)
            if last is None:
                raise CheckpointError(f"there is no whole checkpoint to resume from in {self.args.output_dir}")
            resume_from_checkpoint = str(last)
        elif resume_from_checkpoint:
            resume_from_checkpoint = str(require_complete(resume_from_checkpoint))
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            if 0 < self.args.max_steps <= state.global_step:  # transformers would train one step too many
                return self._finish(state, resume_from_checkpoint)
        return super().train(resume_from_checkpoint or None, *rest, **options)

    def _finish(self, state: TrainerState, checkpoint: str) -> TrainOutput:
        """Load a checkpoint that has all its steps already."""
        logger.info("%s has all %d steps", checkpoint, state.global_step)
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, sum(logged) / max(len(logged), 1), {})

    def create_optimizer(self, *rest: Any, **options: Any) -> Any:
        """Create the optimizer over α and β alone."""
        ours = {id(p) for p in adapter_parameters(self._bare_model())}
        others = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in ours]
        if others:
            raise WrapError(
                f"{len(others)} parameters besides the adapter's require gradients, such as {others[0]}: a checkpoint "
                "holds the adapter alone, so they would be trained and lost; set requires_grad to False on them"
            )
        return super().create_optimizer(*rest, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of α and β: both are decayed, as the authors do."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Log, with the sparsity beside the training loss."""
        if "loss" in logs or "train_loss" in logs:
            logs["sparsity"] = self.sparsity
        super().log(logs, *rest, **options)

    def check_masks(self) -> None:
        """Compare the zero pattern of the base with the one at the start.

        Raises:
            MaskError: they differ; the message names the layers.
        """
        now = base_masks(self._bare_model())
        changed = sorted(path for path, mask in self._masks_at_start.items() if now.get(path) != mask)
        if changed or len(now) != len(self._masks_at_start):
            listing = ", ".join(changed) or "the wrapped layers are others"
            raise MaskError(
                f"the zero pattern of the base changed during training: {listing}. Nothing was saved; something wrote "
                "to frozen weights: load the base anew and resume from the last checkpoint"
            )

    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        self.check_masks()
        replace_adapter(self._bare_model(), output_dir if output_dir is not None else str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        directory = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and directory.exists():
            self.check_masks()
            unmark(directory)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # rotated below, when this one is whole
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) or _WRITER in str(error):
                raise output_error(error, directory) from error
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            mark_complete(directory, self.state.global_step)
            rotate(run, limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self._bare_model() if model is None else model, require_complete(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_adapter(self._bare_model(), require_complete(self.state.best_model_checkpoint))


class _ZeroCount:
    """Counts zeros, and counts a weight again only after a write to it, so that a log line costs nothing."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int], int, int]] = {}

    def sparsity(self, model: nn.Module) -> float:
        zeros, total = 0, 0
        for path, layer in adapter_layers(model).items():
            packed = layer.held_packed() if isinstance(layer, SPPLinear) else None
            held = layer.weight if packed is None else packed.tensors()[0]
            state = (held.data_ptr(), held._version)  # (0, 0) of one that accelerate has offloaded
            known = self._known.get(path)
            if known is None or known[0] != state:
                weight = packed.values if isinstance(packed, PackedWeight) else layer.dense_weight()
                numel = weight.numel() if packed is None else packed.numel
                known = self._known[path] = state, numel - int(nonzero_mask(weight.detach()).sum()), numel
            zeros, total = zeros + known[1], total + known[2]
        return zeros / total


def _check_loss_chunk(chunk: object, args: Any, options: Mapping[str, Any]) -> None:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"loss_chunk is {chunk!r}; it must be None or an int of at least 1: tokens at a time")
    clashes = [name for name in ("compute_loss_func", "compute_metrics") if options.get(name) is not None]
    if getattr(args, "label_smoothing_factor", 0):
        clashes.append("label_smoothing_factor")
    if clashes:
        raise ConfigError(f"loss_chunk does not go together with {', '.join(clashes)}: there are no logits for it")


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


def _require_wrapped(model: nn.Module) -> None:
    if not is_wrapped(model):
        raise WrapError(
            f"{type(model).__name__} is not wrapped, so there is no adapter to train: call spp.wrap(model) "
            "on the pruned model first, and hand the same object to SPPTrainer"
        )
