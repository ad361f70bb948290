"""An adapter that changes nothing is said to change nothing: when it is saved, merged, and by a trainer once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import spp
from spp.errors import SPPWarning
from spp.wrapping.adapters import without_effect
from spp.wrapping.wrap import adapter_layers
from tests.helpers.checkpoints import pruned_model, wrapped_model
from tests.training.helpers import trainer

NOTHING, ROUNDED = "changes no weight: {} is zero everywhere; was it trained", "changes no weight: it learned an update"


def tiny_update(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A model whose adapter's changes are all smaller than half a step of bfloat16."""
    model = wrapped_model(dtype, **options)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            first, last = layer.adapter_parameters()
            first.clamp_(-1, 1)
            last.fill_(2.0**-13)
    return model


def heard(act: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act()
    return [str(one.message) for one in found if issubclass(one.category, SPPWarning)]


@pytest.mark.parametrize(("rule", "name"), [("spp", "β"), ("hira", "B"), ("masked_lora", "B")])
def test_what_was_not_trained_is_said_once_at_save_and_merge(rule: str, name: str, tmp_path: Path) -> None:
    model = spp.wrap(pruned_model(), r=4, rule=rule, seed=0)
    spp.save_model(pruned_model(), tmp_path / "base")
    with pytest.warns(SPPWarning, match=NOTHING.format(name)) as saved:
        spp.save_adapter(model, tmp_path / "adapter")
    with pytest.warns(SPPWarning, match=NOTHING.format(name)) as merged:
        memory = spp.merge(model)
    with pytest.warns(SPPWarning, match=NOTHING.format(name)) as on_disk:
        disk = spp.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(saved) == len(merged) == len(on_disk) == 1
    assert memory.layers == disk.layers
    for report in (memory, disk):
        assert report.survived is None and report.moved == 0 and "no update" in repr(report)
        assert all(one.survived is None and one.updated == 0 for one in report.layers.values())
        assert json.loads(json.dumps(report.to_dict()))["survived"] is None


def test_what_rounding_takes_is_another_kind(tmp_path: Path) -> None:
    spp.save_model(pruned_model(torch.bfloat16), tmp_path / "base")
    model = tiny_update()
    with pytest.warns(SPPWarning, match=f"{ROUNDED}.*none of it survived.*float32"):
        spp.save_adapter(model, tmp_path / "adapter")
    with pytest.warns(SPPWarning, match=f"{ROUNDED}.*dtype=torch.float32.*stochastic"):
        memory = spp.merge(model)
    with pytest.warns(SPPWarning, match=f"{ROUNDED}.*dtype=torch.float32.*stochastic"):
        disk = spp.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert memory.layers == disk.layers
    assert memory.survived == disk.survived == 0.0 and memory.moved == 0
    assert all(layer.updated and not layer.moved and layer.update_norm > 0 for layer in memory.layers.values())
    assert not heard(lambda: spp.merge(tiny_update(), dtype=torch.float32)), "a wider dtype keeps it"


def test_a_conversion_that_takes_the_update_is_no_update_of_its_own() -> None:
    """Rounding float32 weights to bfloat16 moves nearly all of them, adapter or not."""
    model = spp.wrap(pruned_model(), r=4, seed=0)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.weight.copy_(layer.weight.bfloat16().float() * (1 + 2.0**-10))  # far from where a rounding tips over
            layer.spp_alpha.clamp_(-1, 1)
            layer.spp_beta.fill_(2.0**-16)
    assert without_effect(model) is None, "float32 holds it"
    with pytest.warns(SPPWarning, match=ROUNDED):
        report = spp.merge(model, dtype=torch.bfloat16)
    assert report.survived == 0.0 and report.moved == 0
    assert max(layer.max_relative_change for layer in report.layers.values()) > 2.0**-11


def test_a_layer_without_an_update_does_not_count() -> None:
    model = wrapped_model()
    path = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        adapter_layers(model)[path].spp_beta.zero_()
    report = spp.merge(model)
    assert report.layers[path].survived is None and report.layers[path].update_norm == 0
    assert report.survived == pytest.approx(1, abs=1e-3)


def test_an_update_whose_squares_vanish_is_an_update() -> None:
    """Its squares underflow in float32, but it is not zero, and it was not 'not trained'."""
    model = spp.wrap(pruned_model(), r=4, seed=0)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.spp_alpha.fill_(1.0)
            layer.spp_beta.fill_(1e-30)
    with pytest.warns(SPPWarning, match=ROUNDED):
        report = spp.merge(model)
    assert report.survived == 0.0 and all(layer.updated == layer.kept for layer in report.layers.values())


def test_trained_adapters_are_not_accused(tmp_path: Path) -> None:
    assert without_effect(wrapped_model()) is None
    assert not heard(lambda: spp.save_adapter(wrapped_model(), tmp_path / "adapter"))
    only_one = spp.wrap(pruned_model(), r=4, seed=0)
    with torch.no_grad():
        list(adapter_layers(only_one).values())[-1].spp_beta[-1] = 0.5
    assert without_effect(only_one) is None


def test_a_model_without_values_is_not_judged() -> None:
    assert without_effect(spp.wrap(pruned_model().to("meta"), r=4)) is None


def test_a_trainer_says_it_where_it_is_asked_to_save_and_not_in_checkpoints(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", learning_rate=0.0, max_steps=2, save_strategy="steps", save_steps=1)
    assert not heard(made.train)
    with pytest.warns(SPPWarning, match=NOTHING.format("β")) as found:
        made.save_model(str(tmp_path / "adapter"))
    assert len(found) == 1
