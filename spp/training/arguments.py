"""From TuneConfig to transformers' TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from spp.configs.tuning import TuneConfig


def training_arguments(config: TuneConfig, output_dir: Path, rows: int, *, save: bool = True) -> Any:
    """Return the TrainingArguments of a run.

    Args:
        config: the options.
        output_dir: where checkpoints go.
        rows: of the training data.
        save: False writes no checkpoint at all.
    """
    passes = math.ceil(rows / config.batch_size)  # forward passes of an epoch
    steps = config.steps or math.ceil(config.epochs * math.ceil(passes / config.gradient_accumulation))
    known = {f.name for f in fields(TrainingArguments)}
    # The option was renamed within transformers 5.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_ratio * steps),
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.bf16,
        use_cpu=config.device == "cpu",
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # LogFile stops a run whose loss is not finite
        save_strategy="steps" if save else "no",  # "steps" also saves at the end
        save_steps=config.save_every or steps,
        save_total_limit=config.save_limit,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=config.device != "cpu" and torch.cuda.is_available(),
        **{checkpointing: config.gradient_checkpointing},
    )
