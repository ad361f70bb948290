"""The trainer that every method has, with its own functions for what it trains and how that is written and read.

transformers' Trainer with these differences: a checkpoint holds what the method trains, not the model, and counts only
once it is whole; nothing else reaches the optimizer; what is frozen is compared with the start at every save; the
training log has the sparsity; the loss is that of LossTrainer (spp.training.loss_trainer).
"""

from __future__ import annotations

import contextlib
import logging
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from spp.distributed.sums import together
from spp.errors import CheckpointError, DataError, WrapError
from spp.files import output_error
from spp.models.tokens import check_ids, embedding_rows, position_limit, refuse_ids
from spp.training.checkpoints import (
    last_complete,
    mark_complete,
    replace_files,
    require_complete,
    rotate,
    unmark,
    why_not_written,
)
from spp.training.data import TokenBlocks, TokenRows
from spp.training.loss_trainer import LossTrainer
from spp.training.sharding import (
    Sharding,
    changed_error,
    check_engine,
    check_resumable,
    load_deepspeed,
    load_optimizer,
    save_deepspeed,
    save_optimizer,
)
from spp.wrapping.adapters import whole_adapter

logger = logging.getLogger(__name__)

_WRITER = ("PytorchStreamWriter", "inline_container")  # in torch.save's RuntimeError where it cannot write


class AdapterTrainer(LossTrainer):
    """Trains what a method puts into a model; takes the arguments of `transformers.Trainer` and LossTrainer.

    `train(resume_from_checkpoint=True)` continues from the last whole checkpoint in `args.output_dir`, a path from
    that one; on the same machine the losses and the final state are bit for bit those of an uninterrupted run.
    `save_total_limit` counts whole checkpoints and always keeps the last and the best one.

    Attributes:
        compared: what `expected` has the hashes of, for messages.
        can_shard: whether it trains a model that FSDP2 or DeepSpeed shards.
        sharding: what is known of a base that they shard; None without.
    """

    compared: str
    can_shard = False
    sharding: Sharding | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        **options: Any,
    ) -> None:
        if model is not None:
            self.require_prepared(model)
        super().__init__(model, args, *rest, **options)
        check_engine(self, self.can_shard)
        self.data_collator: Any = _Readable(self.data_collator)
        self.begin(self._bare_model())

    @abstractmethod
    def require_prepared(self, model: nn.Module) -> None:
        """Raise a WrapError unless the model holds what this trainer trains."""

    @abstractmethod
    def begin(self, model: nn.Module) -> None:
        """Remember what a save is compared with; called for every model that is trained, before its first step."""

    @property
    @abstractmethod
    def expected(self) -> Mapping[str, Any]:
        """{path: hash} of what must not change."""

    @abstractmethod
    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """Return what the optimizer gets."""

    @abstractmethod
    def frozen(self, model: nn.Module) -> dict[str, Any]:
        """Return {path: hash} of what must not change, as `expected` has it."""

    @abstractmethod
    def write(self, model: nn.Module, directory: Path, frozen: dict[str, Any]) -> None:
        """Write what is trained into a directory that exists: adapter_config.json, and the files that it describes.

        Args:
            frozen: what `check` has returned.
        """

    @abstractmethod
    def read(self, model: nn.Module, directory: Path) -> None:
        """Load what `write` wrote."""

    def check(self, model: nn.Module) -> dict[str, Any]:
        """Compare what is frozen with what it is to be, and return it: one look at every weight.

        Raises:
            MaskError: they differ; the message names the layers, and nothing is saved.
        """
        if self.is_sharded:
            self.sharding.check(model, self.compared)  # type: ignore[union-attr]
            return dict(self.expected)
        expected, now = self.expected, self.frozen(model)
        changed = [path for path in expected.keys() | now.keys() if expected.get(path) != now.get(path)]
        if changed:
            raise changed_error(self.compared, changed)
        return now

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """The fraction of zeros in the weights that the method adapts, in [0, 1]."""

    def get_train_dataloader(self) -> Any:
        """Return the batches to train on; a DataError comes before the first, or from the loader of a stream."""
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for rows in (self.train_dataset, *held_out):
            self._check_tokens(rows)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches to evaluate on; errors as for training."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        self._check_tokens(self.eval_dataset[rows] if isinstance(rows, str) else rows)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches to predict; errors as for training."""
        self._check_tokens(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _check_tokens(self, rows: Any) -> None:
        """Raise a DataError where the model cannot read some of the rows, as far as they can be looked at before."""
        model = self._bare_model()
        readable = self.data_collator
        if isinstance(readable, _Readable):
            readable.rows, readable.positions = embedding_rows(model), position_limit(model)
        ids = _all_ids(rows)
        if ids is not None:
            check_ids(model, ids, "the data", self.processing_class)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with the order of the data fixed by `args.seed` where `data_seed` is not given.

        Otherwise the order depends on what seeded torch last before `train`, and a resumed run would see other batches.
        """
        if self.args.data_seed is None and self.args.accelerator_config.use_seedable_sampler:
            self.args.data_seed = self.args.seed
        super().create_accelerator_and_postprocess()

    def call_model_init(self, trial: Any = None) -> Any:
        """Build the model with `model_init`, which has to prepare it."""
        model = super().call_model_init(trial)
        self.require_prepared(model)
        self.begin(model)
        return model

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
            check_resumable(self, resume_from_checkpoint)
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
        """Create the optimizer over what the method trains alone."""
        ours = {id(p) for p in self.trained(self._bare_model())}
        others = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in ours]
        if others:
            raise WrapError(
                f"{len(others)} parameters besides the adapter's require gradients, such as {others[0]}: a checkpoint "
                "holds the adapter alone, so they would be trained and lost; set requires_grad to False on them"
            )
        return super().create_optimizer(*rest, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of all that is trained: all of it is decayed, as the authors of the methods do."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Log, with the sparsity beside the training loss."""
        if "loss" in logs or "train_loss" in logs:
            logs["sparsity"] = self.sparsity
        super().log(logs, *rest, **options)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights of the model are sharded by now."""
        return self.sharding is not None and self.sharding.on

    def _prepare_for_training(self, max_steps: Any, batches: Any, checkpoint: Any) -> Any:
        """Prepare as transformers does; what is sharded is loaded before and hashed after."""
        if self.sharding is None:
            return super()._prepare_for_training(max_steps, batches, checkpoint)
        self._shard_soon(checkpoint)
        found = super()._prepare_for_training(max_steps, batches, None if self.is_deepspeed_enabled else checkpoint)
        if self.is_deepspeed_enabled and checkpoint is not None:
            load_deepspeed(self, checkpoint)
            self._load_optimizer_and_scheduler(checkpoint)
            self._load_scaler(checkpoint)
        self.sharding.sharded(self._bare_model())
        return found

    def evaluation_loop(self, *rest: Any, **options: Any) -> Any:
        """Evaluate; a model that is sharded for it is looked at after."""
        if self.sharding is None:
            return super().evaluation_loop(*rest, **options)
        self._shard_soon(None)
        found = super().evaluation_loop(*rest, **options)
        self.sharding.sharded(self._bare_model())
        return found

    def _shard_soon(self, checkpoint: str | None) -> None:
        """Load a checkpoint while the weights are whole, and every check of it is the one of one process."""
        if self.is_sharded:
            return
        if self.is_fsdp_enabled:
            self.sharding.prepare(self._bare_model())  # type: ignore[union-attr]
        with together(named=True):  # a rank without weights has nothing to compare
            if checkpoint is not None:
                self.read(self._bare_model(), require_complete(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; of a sharded model every rank must ask for it, and one writes."""
        if self.sharding is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save and not self.is_sharded:
            return
        model, directory = self._bare_model(), output_dir if output_dir is not None else str(self.args.output_dir)
        frozen = self.check(model)
        with contextlib.ExitStack() as stack:
            if self.is_sharded:  # all ranks are here
                stack.enter_context(whole_adapter(model))
                stack.enter_context(together(named=True))
            if self.args.should_save:
                unmark(directory)  # a checkpoint with another adapter is no whole one
                replace_files(lambda folder: self.write(model, folder, frozen), directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            save_deepspeed(self, output_dir)
            return
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.optimizer.optimizer, self.lr_scheduler, output_dir, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_sharded or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.optimizer.optimizer, self.lr_scheduler, checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        directory = run / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # rotated below, when this one is whole
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise output_error(error, directory) from error
        except RuntimeError as error:
            if any(word in str(error) for word in _WRITER):
                raise output_error(why_not_written(directory) or error, directory) from error
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            mark_complete(directory, self.state.global_step)
            rotate(run, limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self._bare_model() if model is None else model
        if self.sharding is not None:
            self.sharding.sharded(model)
        self.read(model, require_complete(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.read(self._bare_model(), require_complete(self.state.best_model_checkpoint))


class _Readable:
    """A collator whose batches a model can read: it has an embedding and a position for every token.

    Batches are looked at where they are made, on the CPU and in the process that loads data: a stream has no other
    place, and padding is made there.

    Args:
        collate: makes the batches.

    Attributes:
        rows, positions: of the model's embedding, and how many it has; None leaves that unchecked.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.rows: int | None = None
        self.positions: int | None = None

    def __call__(self, items: Any) -> Any:
        """Return one batch."""
        batch = self.collate(items)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(ids, Tensor) and ids.ndim:
            if self.rows is not None:
                refuse_ids(self.rows, ids, "a batch of the data")
            if self.positions is not None and ids.shape[-1] > self.positions:
                raise DataError(
                    f"a batch of the data has rows of {ids.shape[-1]} tokens; the model has {self.positions} positions "
                    f"and cannot compute more: cut the rows"
                )
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collate, name)


def _all_ids(rows: Any) -> Tensor | list[Tensor] | None:
    """Return the token ids of a data set whose rows are in memory or in a table; None of any other."""
    if isinstance(rows, TokenBlocks):
        return rows.blocks
    if isinstance(rows, TokenRows):
        return [ids for ids, _ in rows.rows]
    if isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        return [torch.as_tensor(row["input_ids"]) for row in rows]
    if "input_ids" in (getattr(rows, "column_names", None) or ()) and hasattr(rows, "__len__"):  # of `datasets`
        return [torch.as_tensor(ids) for ids in rows["input_ids"]]
    return None
