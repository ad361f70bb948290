"""What the tests of training share: a pruned tiny model, data, quiet options, and what stops a run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

import spp
from spp.training import Collator, MaskUpdates, SPPTrainer, TuneConfig, TuneResult, tune
from spp.training.callbacks import ProgressBar
from spp.training.data import TokenBlocks
from tests.helpers.models import prune_nm_, tiny_llama, tiny_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs!",
    "How vexingly quick daft zebras jump?",
]
TEXT = "\n".join(SENTENCES[i * i % 3] for i in range(60))
ROWS = [{"instruction": f"Say {i}.", "output": f"{i}, {i} and again {i}"} for i in range(24)]


def pruned() -> Any:
    return prune_nm_(tiny_llama())


def wrapped(**options: Any) -> Any:
    return spp.wrap(pruned(), **{"r": 4, "seed": 0, **options})


def blocks(count: int = 20, length: int = 16) -> TokenBlocks:
    return TokenBlocks(torch.randint(3, 256, (count, length), generator=torch.Generator().manual_seed(1)))


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(directory),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **options,
        }
    )


def trainer(
    directory: Path,
    model: Any = None,
    *,
    eval_data: bool = False,
    callbacks: Any = None,
    loss_chunk: int | None = None,
    mask_updates: MaskUpdates | None = None,
    **options: Any,
) -> SPPTrainer:
    made = SPPTrainer(
        wrapped() if model is None else model,
        arguments(directory, **options),
        train_dataset=blocks(),
        eval_dataset=blocks(4) if eval_data else None,
        data_collator=Collator(2),
        callbacks=callbacks,
        loss_chunk=loss_chunk,
        mask_updates=mask_updates,
    )
    made.remove_callback(PrinterCallback)
    return made


def losses(made: SPPTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file()}


class StopAt(TrainerCallback):
    """Stops a run as a kill right after a save would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def config(data_file: Path, run: Path, **options: Any) -> TuneConfig:
    defaults: dict[str, Any] = {
        "data": data_file,
        "output_dir": run,
        "block_length": 32,
        "eval_window": 32,
        "steps": 6,
        "lr": 2e-2,
        "r": 4,
        "device": "cpu",
        "progress": False,
    }
    return TuneConfig(**{**defaults, **options})


def run_tune(c: TuneConfig) -> TuneResult:
    return tune(c, model=pruned(), tokenizer=tiny_tokenizer())


class SignalAt(ProgressBar):
    """Stands in for the progress bar and sends this process a signal at a step."""

    step, number, times = 3, signal.SIGINT, 1

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        super().on_step_end(args, state, control, **options)
        if state.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)
