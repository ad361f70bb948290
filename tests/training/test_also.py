"""Training with norms, biases and the head beside the adapter: groups, checkpoints, resuming, mask updates, options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spp
from spp.configs.adapter import ALSO_LR
from spp.configs.tuning import TuneConfig
from spp.errors import ConfigError, WrapError
from spp.training import MaskUpdates, SPPTrainer
from spp.training.data import Collator
from spp.wrapping.wrap import also_trained
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits
from tests.training.helpers import arguments, blocks, config, run_tune, trainer, wrapped


def biased(**options: Any) -> Any:
    model = prune_nm_(tiny_llama(attention_bias=True))
    return spp.wrap(model, **{"r": 4, "seed": 0, "also_train": ("norms", "biases", "head"), **options})


def test_what_also_trains_has_a_group_of_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, biased(), weight_decay=0.1, max_steps=2, warmup_steps=0)
    made.train()
    adapter, also = made.optimizer.param_groups
    model = made.model
    assert [id(p) for p in also["params"]] == [id(one.trained) for one in also_trained(model).values()]
    assert len(adapter["params"]) == len(spp.adapter_parameters(model)) - len(also["params"])
    assert (adapter["initial_lr"], also["initial_lr"]) == (1e-2, ALSO_LR)
    assert (adapter["weight_decay"], also["weight_decay"]) == (0.1, 0.0)


def test_steps_are_of_its_own_rate(tmp_path: Path) -> None:
    made = SPPTrainer(
        biased(),
        arguments(tmp_path, max_steps=3, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.0),
        train_dataset=blocks(),
        data_collator=Collator(2),
        also_lr=3e-3,
    )
    made.train()
    start = also_trained(biased())
    for name, one in also_trained(made.model).items():
        moved = float((one.trained - start[name].trained).detach().abs().max())
        assert 3e-3 * 0.99 < moved <= 3 * 3e-3 * 1.01, (
            name
        )  # AdamW's first step is the rate, where the gradient is not 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(dtype: torch.dtype, tmp_path: Path) -> None:
    def fresh() -> Any:
        model = prune_nm_(tiny_llama(attention_bias=True)).to(dtype)
        return spp.wrap(model, r=4, seed=0, also_train=("norms", "biases", "head"))

    whole = trainer(tmp_path / "whole", fresh())
    whole.train()
    first = trainer(tmp_path / "run", fresh(), save_strategy="steps", save_steps=3, max_steps=6)
    first.train()
    second = trainer(tmp_path / "run", fresh(), save_strategy="steps", save_steps=3, max_steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert second.optimizer.param_groups[1]["initial_lr"] == ALSO_LR
    for one, other in zip(spp.adapter_parameters(whole.model), spp.adapter_parameters(second.model), strict=True):
        assert_same_bits(one, other)
    assert any(one.changed() for one in also_trained(second.model).values()) or dtype == torch.bfloat16


def test_others_that_require_gradients_are_still_refused(tmp_path: Path) -> None:
    model = biased(also_train="norms")
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(WrapError, match=r"such as lm_head\.weight"):
        trainer(tmp_path, model).train()


def test_a_rate_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="also_lr"):
        SPPTrainer(wrapped(), also_lr=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_chunks_trains_the_head_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for chunk in (None, 8):
        model = prune_nm_(tiny_llama()).to(dtype)
        spp.wrap(model, r=4, seed=0, also_train="head")
        made = trainer(tmp_path, model, loss_chunk=chunk, max_steps=1, lr_scheduler_type="constant", max_grad_norm=0.0)
        kept: dict[str, torch.Tensor] = {}
        model.lm_head.weight.register_hook(lambda grad, kept=kept: kept.update(grad=grad.clone()))
        made.train()
        found.append(kept["grad"])
    tolerance = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-3, "rtol": 5e-2}
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], **tolerance)


def test_tune_trains_writes_and_merges_it(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = run_tune(config(text, run, also_train=("norms", "head"), also_lr=1e-3, steps=3))
    values = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert values["also_train"] == ["norms", "head"]
    assert json.loads((run / "config.json").read_text())["tune"]["also_lr"] == 1e-3
    assert all(one.changed() for one in also_trained(result.model).values())
    report = spp.merge(result.model)
    assert len(report.also) == 6


def test_mask_updates_go_with_it(tmp_path: Path) -> None:
    dense = tiny_llama()
    model = spp.wrap(prune_nm_(tiny_llama()), r=4, seed=0, also_train="norms")
    made = trainer(
        tmp_path / "run",
        model,
        mask_updates=MaskUpdates(dense, every=2, fraction=0.2),
        save_strategy="steps",
        save_steps=4,
    )
    made.train()
    spp.save_model(prune_nm_(tiny_llama()), tmp_path / "pruned")
    spp.save_model(dense, tmp_path / "dense")
    report = spp.merge_checkpoint(
        tmp_path / "pruned", tmp_path / "run" / "checkpoint-4", tmp_path / "out", dense=tmp_path / "dense"
    )
    assert len(report.also) == 5 and all(report.also.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"also_train": "norms", "method": "pst", "pattern": "2:4"}, "also_train .* means nothing to method='pst'"),
        ({"also_lr": 1e-3}, "also_lr is 0.001, but nothing trains beside the adapter without also_train"),
        ({"also_train": ("norms", "all")}, "names out of norms, biases, head"),
        ({"also_train": "norms", "also_lr": -1.0}, "also_lr is -1.0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TuneConfig(data="text.txt", output_dir="run", **options)
