"""`spp tune` exposes every option of TuneConfig, and its help tells the true defaults."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields

import pytest
import typer

from spp.cli import tune
from spp.cli.main import app
from spp.training import RECIPES, TuneConfig

PARAMETERS = inspect.signature(tune.run).parameters
COMMAND = typer.main.get_group(app).commands["tune"]
HELPS = {parameter.name: parameter.help for parameter in COMMAND.params if parameter.name is not None}
# What is said in words because the default is None, or a flag that is off.
IN_WORDS = {
    "lr",
    "pattern",
    "dense_model",
    "mask_update_every",
    "steps",
    "eval_text",
    "eval_windows",
    "loss_chunk",
    "also_train",
    "also_lr",
    "teacher",
    "teacher_bits",
    "teacher_cache",
    "progress",
    "target_modules",
    "exclude_modules",
    "overwrite",
    "rank_pattern",
    "resume",
    "strict_values",
}


def test_every_field_is_an_option() -> None:
    assert set(PARAMETERS) - {"recipe", "follow_links", "json"} == {f.name for f in fields(TuneConfig)}


@pytest.mark.parametrize("field", [f for f in fields(TuneConfig) if f.default is not MISSING], ids=lambda f: f.name)
def test_the_help_tells_the_default(field) -> None:
    if field.name in IN_WORDS or field.name == "model":
        assert field.default in (None, False, ())
        return
    found = re.search(r"\(default: ([^,)]+)", HELPS[field.name])
    assert found is not None, f"{field.name}: {HELPS[field.name]}"
    assert found[1] == {"True": "on", "False": "off"}.get(str(field.default), str(field.default))


def test_an_option_that_is_not_given_is_left_to_the_recipe() -> None:
    for name, parameter in PARAMETERS.items():
        if name not in ("model", "output_dir", "data", "recipe", "overwrite", "resume", "strict_values"):
            assert parameter.default is None, name


def test_the_help_names_the_recipes() -> None:
    assert all(recipe in HELPS["recipe"] for recipe in RECIPES)
