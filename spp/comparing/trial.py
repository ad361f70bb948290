"""One trial: a contender, a learning rate and a seed; trained, merged its own way, and measured as a plain model.

And the cost of a contender's step, in a process of its own. A teacher speaks to all contenders alike; its own time and
memory are no part of that cost.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from spp.certifying.scan import report_from_tensors
from spp.comparing import measure
from spp.comparing.data import CompareData
from spp.comparing.methods import Goal, adapt, masks_of
from spp.configs.adapter import ALSO_LR
from spp.configs.comparing import REFERENCE, CompareConfig, Contender, parse_contender
from spp.configs.distillation import DENSE as PRUNED_FROM
from spp.errors import NonFiniteError, SPPError
from spp.masks.patterns import DENSE, Pattern, detect_pattern, is_nm, nonzero_mask
from spp.models.targets import projection_weights
from spp.training.loading import load_model
from spp.training.loss_trainer import LossTrainer
from spp.training.teacher import Teacher, dense_of, find_teacher
from spp.training.trainer import set_also_rate, without_also
from spp.training.tuning import training_arguments
from spp.wrapping.wrap import is_wrapped

MEMORY_STEPS = 3  # the first makes the optimizer's state
WARMUP = 1


@dataclass(frozen=True)
class Trial:
    """The facts that tell a row from others of the same conditions."""

    contender: str
    lr: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """The row's name, also of a file."""
        return f"{self.contender}, lr {self.lr:g}, seed {self.seed}, {self.steps} steps"


def run_trial(
    config: CompareConfig,
    contender: Contender,
    trial: Trial,
    data: CompareData,
    worth_testing: Callable[[float], bool] = lambda loss: True,
) -> dict[str, Any]:
    """Return the row of a trial; training that diverges makes a row too, which says so.

    Args:
        worth_testing: told the validation loss, whether the test part is to be measured as well.
    """
    gc.collect()  # a trainer is a knot of references; the model of the trial before hangs in it
    model = load_model(config.model, config.dtype)
    masks, goal = masks_of(model), Goal.of(model)
    if contender.traits.from_dense:
        assert config.dense is not None, "checked by CompareConfig"
        model = load_model(config.dense, config.dtype)
    adapted = adapt(contender, model, trial.seed, goal, config.dense)
    row: dict[str, Any] = {
        **asdict(trial),
        "options": dict(contender.options),
        "trainable": adapted.trainable(),
        "diverged": False,
    }
    environment = measure.environment(device_of(config), next(model.parameters()).dtype).to_dict()
    try:
        row |= _train(config, trial, data, adapted.model, adapted.callbacks)
        with torch.random.fork_rng(devices=[]):
            plain = adapted.finish()
        row["validation"] = data.validation.measure(plain).to_dict()
        if worth_testing(row["validation"]["loss"]):
            row["test"] = data.test.measure(plain).to_dict()
    except NonFiniteError as error:
        return {**row, "diverged": True, "reason": str(error), "environment": environment}
    return {**row, **zeros(plain, masks), "environment": environment}


def zeros(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Any]:
    """Return which of the zeros that `masks` says there were are zeros still, and whether N:M groups are whole."""
    weights = {name: (weight.detach().cpu(), axis) for name, weight, axis in projection_weights(model)}
    before = kept = 0
    groups: list[bool] = []
    for name, mask in masks.items():
        weight, axis = weights[name]
        pruned = ~mask
        before += int(pruned.sum())
        kept += int((pruned & ~nonzero_mask(weight)).sum())
        pattern = Pattern.parse(found) if ":" in (found := _pattern(mask, axis)) else None
        if pattern is not None and pattern.kept is not None and pattern.group is not None:
            groups.append(is_nm(weight, pattern.kept, pattern.group, axis))
    report = report_from_tensors((name, weight, axis) for name, (weight, axis) in weights.items())
    return {
        "zeros_kept": kept / before if before else None,
        "sparsity": report.sparsity,
        "pattern_valid": all(groups) if groups else None,
    }


def measure_baseline(config: CompareConfig, name: Any, data: CompareData) -> dict[str, Any]:
    """Return the perplexities of a model that is not trained at all."""
    model = load_model(name, config.dtype).to(device_of(config))
    report = report_from_tensors(projection_weights(model))
    measured = {part: getattr(data, part).measure(model).to_dict() for part in ("validation", "test")}
    return {**measured, "sparsity": report.sparsity, "pattern": report.pattern}


def teacher_of(config: CompareConfig, model: nn.Module, tokenizer: Any = None) -> Teacher | None:
    """Return the teacher of every contender, checked against a model; None where there is none."""
    dense = None if config.dense is None else os.fspath(config.dense)
    if config.teacher == PRUNED_FROM and dense is None:
        dense = dense_of(os.fspath(config.model))
    return find_teacher(config, model, tokenizer, dense=dense)


def device_of(config: CompareConfig) -> str:
    """Return the device that trials run on, as transformers' Trainer chooses it."""
    return "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"


class _Clock(TrainerCallback):
    """Takes the time of every step, and stops a run whose loss is not finite."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.process: list[float] = []
        self.loss = math.nan

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Start the clocks."""
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Stop them."""
        wall, process = self._start
        self.wall.append(time.perf_counter() - wall)
        self.process.append(time.process_time() - process)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **options: Any) -> None:
        """Look at the loss."""
        if logs and "loss" in logs:
            self.loss = logs["loss"]
            if not math.isfinite(self.loss):
                raise NonFiniteError(f"the training loss is {self.loss} at step {state.global_step}")


def _train(
    config: CompareConfig, trial: Trial, data: CompareData, model: nn.Module, callbacks: list[Any]
) -> dict[str, Any]:
    model.train()
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="spp-compare-") as directory, _quiet():
        recipe = config.recipe(trial.lr, trial.seed, trial.steps)
        arguments = training_arguments(recipe, Path(directory), len(data.train), save=False)
        arguments.data_seed = trial.seed  # else the order of the data hangs on what a contender has drawn before
        arguments.logging_steps = max(1, trial.steps // 20)
        trainer = (_AlsoTrainer if is_wrapped(model) else LossTrainer)(
            model,
            arguments,
            train_dataset=data.train,
            data_collator=data.collate,
            callbacks=[clock, *callbacks],
            teacher=teacher_of(config, model),
        )
        for shown in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(shown)
        trainer.train()
    return {
        "train_loss": clock.loss,
        "step_wall_s": measure.spread(clock.wall).median,
        "step_process_s": measure.spread(clock.process).median,
    }


class _AlsoTrainer(LossTrainer):
    """Trains what a contender of spp trains beside its adapter at the rate that SPPTrainer has for it."""

    def create_optimizer(self, *rest: Any, **options: Any) -> Any:
        """Create the optimizer, with a group of its own for that."""
        made = super().create_optimizer(*rest, **options)
        set_also_rate(made, self.accelerator.unwrap_model(self.model, keep_torch_compile=False), ALSO_LR)
        return made

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of what is decayed."""
        return without_also(super().get_decay_parameter_names(model), model)


def _pattern(mask: Tensor, axis: int) -> str:
    return DENSE if bool(mask.all()) else detect_pattern(mask, axis)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers says of every run out of the output of a hundred of them."""
    names = ("transformers.trainer", "accelerate")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


# ---- The cost of a contender's step against the reference's: its time in interleaved rounds, its peak memory.
#
# One contender is measured in one fresh process: first its memory alone, then the reference beside it for the rounds.
# Tokens are random; a step is forward, backward, AdamW. Mask updates, which come in one step of many, are not measured.


def measure_cost(config: CompareConfig, contender: Contender) -> dict[str, Any]:
    """Return the entry of a contender, measured in a process of its own."""
    given = {
        "model": os.fspath(config.model),
        "dense": None if config.dense is None else os.fspath(config.dense),
        "contender": contender.name,
        "batch_size": config.batch_size,
        "block_length": config.block_length,
        "dtype": config.dtype,
        "rounds": config.cost_rounds,
        "threads": torch.get_num_threads(),
        "device": device_of(config),
    }
    return measure.in_child("spp.comparing.trial", [json.dumps(given)])


class _Step:
    """A contender and its training step."""

    def __init__(self, options: SimpleNamespace, contender: Contender) -> None:
        model = load_model(options.model, options.dtype).to(options.device)
        model.config.use_cache = False
        self.adapted = adapt(contender, model, 0, dense=options.dense)
        self.adapted.settle()
        self.model: Any = self.adapted.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch_size, options.block_length)
        self.tokens = torch.randint(model.config.vocab_size, shape, generator=generator, device="cpu").to(
            options.device
        )

    def __call__(self) -> None:
        """Take one."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()


def cost_of(**given: Any) -> dict[str, Any]:
    """Return the entry of a contender, measured in this process, of what `measure_cost` gives."""
    options = SimpleNamespace(**given)
    torch.set_num_threads(options.threads)
    contender, reference = parse_contender(options.contender), parse_contender(REFERENCE)
    step = _Step(options, contender)
    memory = measure.measure_memory(step, calls=MEMORY_STEPS, device=options.device)
    steps = {reference.name: step if contender == reference else _Step(options, reference), contender.name: step}
    samples = measure.interleave(steps, rounds=options.rounds, warmup=WARMUP, device=options.device)
    row = measure.compare(samples)[contender.name]
    row |= {"peak_bytes": memory.peak, "rest_bytes": memory.rest, "trainable": step.adapted.trainable()}
    row["environment"] = measure.environment(options.device, next(step.model.parameters()).dtype).to_dict()
    return row


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(cost_of(**json.loads(sys.argv[1]))))
    except SPPError as error:
        sys.exit(f"error: {error}")
