"""TuneConfig: every option is checked, and travels through JSON unchanged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spp.errors import ConfigError
from spp.training import RECIPES, TuneConfig


def config(**options: Any) -> TuneConfig:
    return TuneConfig(**{"data": "train.txt", "output_dir": "run", "model": "pruned", **options})


def test_the_defaults_are_the_papers_recipe_without_dropout() -> None:
    c = config()
    assert (c.lr, c.weight_decay, c.warmup_ratio, c.schedule) == (4e-3, 0.001, 0.03, "linear")
    assert (c.r, c.scaling, c.dropout, c.dropout_mode) == (16, 2.0, 0.0, "input")


def test_recipes() -> None:
    assert set(RECIPES) == {"default", "paper", "short", "best", "lean"}
    common = {"data": "train.txt", "output_dir": "run", "model": "pruned"}
    assert TuneConfig.from_recipe(**common) == config()
    assert TuneConfig.from_recipe("paper", **common) == config(dropout=0.05, dropout_mode="input")
    assert TuneConfig.from_recipe("short", **common) == config(lr=2e-2)
    best = TuneConfig.from_recipe("best", **common)
    taught = {"schedule": "cosine", "teacher": "dense", "ce_weight": 0.3, "kl_weight": 0.7}
    assert best == config(rule="full", lr=4e-4, **taught)
    assert TuneConfig.from_recipe("lean", **common) == config(rule="hira", r=8, scaling=1.0, lr=2e-2, **taught)
    with pytest.raises(ConfigError, match="recipe is 'best'; known: default, paper, short"):
        TuneConfig.from_recipe("best", method="pst", pattern="2:4", **common)
    assert TuneConfig.from_recipe("paper", dropout=0.1, **common).dropout == 0.1


def test_round_trip_through_json() -> None:
    c = config(data=(Path("a.txt"), "b.txt"), target_modules=["q_proj"], steps=3)
    assert c.data == ("a.txt", "b.txt")
    assert TuneConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_the_adapter_config_has_the_options() -> None:
    adapter = config(
        r=3, scaling=1.5, dropout=0.25, dropout_mode="alpha", seed=7, target_modules="all-linear", rule="hira"
    ).adapter_config()
    assert (adapter.r, adapter.scaling, adapter.dropout, adapter.dropout_mode) == (3, 1.5, 0.25, "alpha")
    assert adapter.rule == "hira"
    assert (adapter.seed, adapter.target_modules) == (7, "all-linear")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("scaling", -1.0),
        ("dropout", 1.0),
        ("dropout_mode", "output"),
        ("rule", "dora"),
        ("target_modules", ()),
        ("data", ()),
        ("data", ""),
        ("data", 5),
        ("output_dir", ""),
        ("model", ""),
        ("eval_text", 3),
        ("data_format", "parquet"),
        ("data_split", ""),
        ("text_field", 1),
        ("block_length", 1),
        ("block_length", 12.0),
        ("eval_window", 1),
        ("eval_windows", 0),
        ("eval_fraction", 1.0),
        ("eval_fraction", -0.1),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", 1e99),
        ("lr", "4e-3"),
        ("lr", True),
        ("weight_decay", -1.0),
        ("warmup_ratio", 1.0),
        ("schedule", "step"),
        ("max_grad_norm", -1.0),
        ("epochs", 0.0),
        ("steps", 0),
        ("batch_size", 0),
        ("gradient_accumulation", 0),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("seed", -1),
        ("log_every", 0),
        ("save_every", 0),
        ("save_limit", 0),
        ("bf16", 1),
        ("completions_only", None),
        ("gradient_checkpointing", "yes"),
        ("loss_chunk", 0),
        ("loss_chunk", 2.0),
        ("saved_activations", "half"),
        ("overwrite", 1),
        ("resume", "last"),
        ("progress", "no"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        config(**{name: value})


def test_overwrite_and_resume_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="overwrite=True and resume=True exclude"):
        config(overwrite=True, resume=True)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate.*known.*lr"):
        TuneConfig.from_dict({"data": "x", "output_dir": "y", "learning_rate": 1.0})
    with pytest.raises(ConfigError, match="'fast'; known: default, paper, short"):
        TuneConfig.from_recipe("fast", data="x", output_dir="y")
