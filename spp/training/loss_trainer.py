"""A Trainer with a loss of its own: taken a chunk of tokens at a time, with or without a teacher.

Whatever trains in the model, an adapter of spp or of PEFT, or all of it: the trainers of spp.training and the
contenders of a comparison have one loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from spp.configs.distillation import Distillation
from spp.errors import ConfigError, arg
from spp.training.causal_loss import captured_states, check_form, loss_of_states
from spp.training.distillation import TaughtBatch
from spp.training.teacher import Teacher, find_teacher

CHUNK = 256  # tokens whose logits exist at once, where there is a teacher and nothing else is said
TEACHER_OPTIONS = tuple(one.name for one in fields(Distillation))


class LossTrainer(Trainer):
    """transformers' Trainer, with the loss in chunks and a teacher; evaluation measures the cross-entropy alone.

    With args.bf16 the teacher and both output heads compute under autocast as the model does.

    Args:
        model, args, rest, options: as in transformers.Trainer.
        loss_chunk: take the loss over so many tokens at a time, so that the logits of a batch never exist together
            (spp.training.causal_loss); None leaves it to the model, or with a teacher takes 256. There are no logits
            for compute_metrics then.
        teacher: a model, directory or hub id, or "dense": the model that this one was pruned from. teacher_bits,
            teacher_cache, ce_weight, kl_weight, temperature, hidden_weight: as in Distillation (spp.configs).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        loss_chunk: int | None = None,
        teacher: Any = None,
        **options: Any,
    ) -> None:
        given = {name: options.pop(name) for name in TEACHER_OPTIONS if name in options}
        in_memory = teacher if isinstance(teacher, (nn.Module, Teacher)) else None
        chosen = Distillation(teacher=None if in_memory is not None else teacher, **given)
        taught = any(one is not None for one in (teacher, chosen.teacher_cache))
        if not isinstance(teacher, Teacher):
            chosen.require_weights(taught)
        self.loss_chunk = CHUNK if taught and loss_chunk is None else loss_chunk
        self.teacher: Teacher | None = None
        self._states: list[Tensor] | None = None
        self._lesson: TaughtBatch | None = None
        if self.loss_chunk is not None:
            _check_loss_chunk(self.loss_chunk, args, options, "teacher" if taught else "loss_chunk")
            options["compute_loss_func"] = self._chunked_loss
        super().__init__(model, args, *rest, **options)
        if isinstance(teacher, Teacher):
            self.teacher = teacher
        elif taught:
            model = in_memory if isinstance(in_memory, nn.Module) else None
            self.teacher = find_teacher(chosen, self._bare_model(), self.processing_class, model=model)
        if self.teacher is not None:
            self.teacher.place(self.args.device)

    def _bare_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def get_train_dataloader(self) -> Any:
        """Return the batches to train on; a DataError comes before the first where a cache lacks a row."""
        if self.teacher is not None:
            self.teacher.check_rows(self.train_dataset)
        return super().get_train_dataloader()

    def compute_loss(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
        """Compute the loss; with `loss_chunk`, without the logits of the whole batch."""
        if self.loss_chunk is None:
            return super().compute_loss(model, inputs, *rest, **options)
        # Float16 has too few exponents for gradients that the scaler has not scaled yet.
        with self.accelerator.autocast() if self.args.bf16 else contextlib.nullcontext():
            check_form(model, inputs)
            if self.teacher is None or not model.training:
                with captured_states(model) as self._states:
                    return super().compute_loss(model, inputs, *rest, **options)
            self._lesson = self.teacher.lesson(inputs)  # before the student's activations are there
            with captured_states(model) as self._states, self._lesson.watching(self._bare_model()):
                return super().compute_loss(model, inputs, *rest, **options)

    def _chunked_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert self._states is not None and self.loss_chunk is not None
        states, self._states = self._states, None
        lesson, self._lesson = self._lesson, None
        return loss_of_states(self._bare_model(), states, labels, self.loss_chunk, num_items_in_batch, lesson)


def _check_loss_chunk(chunk: object, args: Any, options: Mapping[str, Any], cause: str) -> None:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(
            f"{arg('loss_chunk')} is {chunk!r}; it must be None or an int of at least 1: tokens at a time"
        )
    clashes = [name for name in ("compute_loss_func", "compute_metrics") if options.get(name) is not None]
    if getattr(args, "label_smoothing_factor", 0):
        clashes.append("label_smoothing_factor")
    if clashes:
        raise ConfigError(f"{arg(cause)} does not go together with {', '.join(clashes)}: there are no logits for it")
