"""PSTTrainer: the schedule, what it trains and saves, exact resume, encoder classifiers, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

import spp
from spp.errors import CheckpointError, ConfigError, MaskError, WrapError
from spp.pst import pst_layers, sparsity_schedule
from spp.pst.model import trained_parameters
from spp.training import Collator, PSTTrainer, SparsitySchedule
from spp.training.checkpoints import MARKER_NAME
from tests.helpers.models import tiny_llama
from tests.pst.test_model import classifier
from tests.training.helpers import StopAt, arguments, blocks, bytes_of, losses


class Labelled(Dataset[dict[str, Any]]):
    """Rows of the two classes: the first token says which."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.randint(10, 90, (9,), generator=torch.Generator().manual_seed(i))
        ids[0] = 3 + i % 2
        return {"input_ids": ids, "labels": torch.tensor(i % 2)}


def dense(**options: Any) -> Any:
    return spp.pst.wrap(tiny_llama(), **{"weight_rank": 3, "mask_rank": 2, "seed": 0, **options})


def trainer(directory: Path, model: Any = None, data: Any = None, callbacks: Any = None, **options: Any) -> PSTTrainer:
    schedule = {k: options.pop(k) for k in list(options) if k.endswith(("_sparsity", "_warmup"))}
    made = PSTTrainer(
        dense() if model is None else model,
        arguments(directory, **options),
        train_dataset=blocks() if data is None else data,
        eval_dataset=(blocks(4) if data is None else data) if options.get("eval_strategy") else None,
        data_collator=Collator(2) if data is None else None,
        callbacks=callbacks,
        **{"final_sparsity": 0.6, **schedule},
    )
    made.remove_callback(PrinterCallback)
    return made


class Seen(TrainerCallback):
    """The sparsity that each forward pass computed with."""

    def __init__(self, model: Any) -> None:
        self.values: list[float] = []
        layer = next(iter(pst_layers(model).values()))
        layer.register_forward_hook(lambda module, *_: self.values.append(module.sparsity))


@pytest.mark.slow
def test_every_pass_computes_with_the_sparsity_of_its_step(tmp_path: Path) -> None:
    model = dense()
    seen = Seen(model)
    made = trainer(tmp_path, model, max_steps=10, gradient_accumulation_steps=2)
    made.train()
    at = [sparsity_schedule(step, 10, 0.1, 0.3, 0.0, 0.6) for step in range(11)]
    assert seen.values == [at[step] for step in range(10) for _ in range(2)]
    logged = [entry["sparsity"] for entry in made.state.log_history if "loss" in entry]
    total = sum(layer.weight.numel() for layer in pst_layers(model).values())
    assert logged == [
        sum(int(layer.weight.numel() * s + 1e-9) for layer in pst_layers(model).values()) / total for s in at[1:]
    ]
    assert {layer.sparsity for layer in pst_layers(model).values()} == {0.6}
    assert made.sparsity == logged[-1] == sum(int((~m.mask()).sum()) for m in pst_layers(model).values()) / total


def test_a_schedule_takes_the_pattern_of_each_model_that_it_is_given() -> None:
    schedule = SparsitySchedule()
    for pattern, final in (("2:4", 0.5), ("1:4", 0.75), ("2:4", 0.5)):
        schedule.fit(dense(pattern=pattern))
        assert schedule.final_sparsity == final == schedule.at(10, 10)
    given = SparsitySchedule(0.25)
    given.fit(dense(pattern="2:4"))
    assert given.final_sparsity == 0.25


def test_of_an_n_m_pattern_the_final_sparsity_is_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, dense(pattern="1:4"), final_sparsity=None, final_warmup=0.5, initial_sparsity=0.25)
    made.train()
    assert made.sparsity == 0.75
    layers = [layer.weight.numel() for layer in pst_layers(made.model).values()]
    at = [sparsity_schedule(step, 6, 0.1, 0.5, 0.25, 0.75) for step in range(1, 7)]
    pruned = [sum(int(s * numel) for numel in layers) / sum(layers) for s in at]
    assert [e["sparsity"] for e in made.state.log_history if "loss" in e] == pruned
    assert 0.25 < pruned[0] < pruned[1] < 0.75 == pruned[-1]
    converted = spp.pst.convert(made.model)
    assert spp.sparsity(converted).pattern == "1:4"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> PSTTrainer:
    """A run of six steps with a checkpoint every three; for reading only."""
    made = trainer(tmp_path_factory.mktemp("pst"), save_strategy="steps", save_steps=3)
    made.train()
    return made


def test_only_what_pst_trains_changes(finished: PSTTrainer) -> None:
    model, before = finished.model, dict(dense().named_parameters())
    optimized = {id(p) for group in finished.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trained_parameters(model).values()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained_parameters(model)), name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int, pattern: str | None) -> None:
    def options(name: str) -> dict[str, Any]:
        final = 0.5 if pattern is None else None
        model = dense(pattern=pattern)
        return {"model": model, "directory": tmp_path / name, "max_steps": 7, "final_sparsity": final}

    whole = trainer(**options("whole"))
    whole.train()
    whole.save_model(str(tmp_path / "whole" / "final"))
    trainer(**options("cut"), callbacks=[StopAt(stop)]).train()
    torch.manual_seed(999)
    resumed = trainer(**options("cut"))
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(tmp_path / "cut" / "final"))
    assert losses(resumed) == losses(whole)
    assert bytes_of(tmp_path / "cut" / "final") == bytes_of(tmp_path / "whole" / "final")


def test_a_checkpoint_holds_what_is_trained_and_loads(finished: PSTTrainer) -> None:
    run = Path(finished.args.output_dir)
    directory = run / "checkpoint-3"
    assert {file.name for file in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        MARKER_NAME,
    }
    loaded = spp.pst.load(tiny_llama(), run / "checkpoint-6")
    for name, parameter in trained_parameters(finished.model).items():
        assert torch.equal(trained_parameters(loaded)[name], parameter), name
    assert {layer.sparsity for layer in pst_layers(loaded).values()} == {0.6}
    again = trainer(run)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert again.sparsity == finished.sparsity


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_classifiers_train_with_their_heads(kind: str, tmp_path: Path) -> None:
    def made(name: str, callbacks: Any = None) -> PSTTrainer:
        model = spp.pst.wrap(classifier(kind), seed=0)
        options = {"max_steps": 24, "final_sparsity": 0.5, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
        return trainer(tmp_path / name, model, Labelled(), callbacks, **options)

    whole = made("whole")
    whole.train()
    assert sum(losses(whole)[-5:]) < 0.85 * sum(losses(whole)[:5])
    made("cut", [StopAt(16)]).train()
    resumed = made("cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    spp.save_model(spp.pst.convert(whole.model), tmp_path / "model")
    assert spp.verify(tmp_path / "model").sparsity > 0.4


@pytest.mark.slow
def test_the_best_model_is_one_of_the_final_sparsity(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        max_steps=8,
        learning_rate=1.0,  # far too much: without pruning, the first evaluation would be the best
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        final_warmup=0.4,
    )
    made.train()
    assert made.state.best_global_step >= 5
    config = json.loads((Path(made.state.best_model_checkpoint) / "adapter_config.json").read_text())
    assert set(config["sparsity"].values()) == {0.6}
    assert {layer.sparsity for layer in pst_layers(made.model).values()} == {0.6}


def test_gradient_checkpointing_changes_nothing(finished: PSTTrainer, tmp_path: Path) -> None:
    checkpointed = trainer(tmp_path, gradient_checkpointing=True)
    checkpointed.train()
    assert losses(checkpointed) == losses(finished)


def test_frozen_weights_that_were_written_to_are_not_saved(tmp_path: Path) -> None:
    model = dense()

    class Writes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == 3:
                model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1

    made = trainer(tmp_path, model, save_strategy="steps", save_steps=2, callbacks=[Writes()])
    with pytest.raises(MaskError, match=r"model\.layers\.1\.mlp\.up_proj"):
        made.train()
    assert [d.name for d in tmp_path.iterdir()] == ["checkpoint-2"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(WrapError, match=r"spp\.pst\.wrap"):
        trainer(tmp_path, tiny_llama())
    with pytest.raises(ConfigError, match="final_sparsity is None"):
        trainer(tmp_path, final_sparsity=None)
    with pytest.raises(ConfigError, match=r"above the 0\.5 of pattern 2:4"):
        trainer(tmp_path, dense(pattern="2:4"))
    with pytest.raises(ConfigError, match="sparsity only grows"):
        trainer(tmp_path, dense(pattern="2:4"), final_sparsity=None, initial_sparsity=0.7)
    with pytest.raises(ConfigError, match="at most 1"):
        SparsitySchedule(0.5, initial_warmup=0.7, final_warmup=0.7)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
