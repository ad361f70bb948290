"""What the tests of training share: a pruned tiny model, token data and quiet arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import spp
from spp.training import Collator, MaskUpdates, SPPTrainer
from spp.training.data import TokenBlocks
from tests.helpers.models import prune_nm_, tiny_llama


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
    from transformers import PrinterCallback

    made.remove_callback(PrinterCallback)
    return made


def losses(made: SPPTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file()}
