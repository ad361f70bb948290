"""transformers' Trainer with an SPP PEFT model: adapter-only checkpoints, exact resume, the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer

import spp
from spp.integrations.peft import SPPPeftConfig
from spp.training import Collator
from tests.helpers.tolerances import assert_same_bits
from tests.integrations.helpers import logits, pruned
from tests.training.helpers import StopAt, arguments, blocks, losses


def make_trainer(directory: Path, callbacks: Any = None, **options: Any) -> Trainer:
    config = SPPPeftConfig(r=4, seed=0, dropout=0.1, task_type="CAUSAL_LM")
    made = Trainer(
        get_peft_model(pruned(), config),
        arguments(directory, data_seed=3, **options),
        train_dataset=blocks(),
        eval_dataset=blocks(4),
        data_collator=Collator(2),
        callbacks=callbacks,
    )
    made.remove_callback(PrinterCallback)
    return made


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "spp_" in name}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    stop = 4
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    make_trainer(tmp_path / "cut", [StopAt(stop)]).train()
    checkpoint = tmp_path / "cut" / f"checkpoint-{stop}"
    assert not list(checkpoint.glob("model*.safetensors")) and (checkpoint / "adapter_model.safetensors").is_file()
    resumed = make_trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    expected = adapter(whole.model)
    for name, tensor in adapter(resumed.model).items():
        assert_same_bits(tensor, expected[name], name)
    assert losses(resumed)[stop:] == losses(whole)[stop:]
    loaded = spp.load_adapter(pruned(), checkpoint)
    assert_same_bits(logits(loaded), logits(PeftModel.from_pretrained(pruned(), checkpoint)))


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    made = make_trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst one, which is not the last
        **options,
    )
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert_same_bits(logits(made.model), logits(PeftModel.from_pretrained(pruned(), best)))
    merged = made.model.merge_and_unload(safe_merge=True)
    assert spp.sparsity(merged).pattern == "2:4"
