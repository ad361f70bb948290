"""The PEFT plug-in on layers that accelerate has offloaded, dispatched before or after the adapter came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import spp
from spp.errors import ConfigError
from spp.integrations.peft import SPPPeftConfig
from spp.integrations.peft.model import tuner_layers
from tests.helpers.models import moe_model
from tests.helpers.offloading import MAP, WAYS, on_meta, to_disk
from tests.helpers.tolerances import assert_same_bits
from tests.integrations.helpers import Q0, logits, pruned, train

INSIDE = {f"base_model.model.{path}": device for path, device in MAP.items()}


def plain_peft(model: Any = None) -> Any:
    model = get_peft_model(pruned() if model is None else model, SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM"))
    for layer in tuner_layers(model).values():
        layer.cache_effective = False
    return model


def offloaded(way: str, first: str, folder: Path) -> Any:
    from accelerate import dispatch_model

    if first == "dispatched":
        return plain_peft(WAYS[way](pruned(), folder))
    if way == "map":
        return dispatch_model(plain_peft(), INSIDE, offload_dir=str(folder / "offloaded"))
    return WAYS[way](plain_peft(), folder)


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "spp_" in name}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("first", ["dispatched", "adapted"])
@pytest.mark.parametrize("way", WAYS)
def test_it_trains_as_the_model_in_memory_does(way: str, first: str, tmp_path: Path) -> None:
    model, reference = offloaded(way, first, tmp_path), plain_peft()
    away = on_meta(model)
    assert away and not any("spp_" in name for name in away)
    train(model)
    train(reference)
    for name, ours in adapter(model).items():
        assert_same_bits(ours, adapter(reference)[name], name)
    assert_same_bits(logits(model), logits(reference))
    assert on_meta(model) == away
    with model.disable_adapter():
        assert_same_bits(logits(model), logits(pruned()))
    model.save_pretrained(tmp_path / "adapter")
    reference.save_pretrained(tmp_path / "expected")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError, match=r"is offloaded by accelerate, .* `spp merge BASE ADAPTER OUT`"):
            merge()
    assert_same_bits(logits(model), logits(reference))
    unloaded = model.unload()
    assert type(unloaded.get_submodule(Q0)) is nn.Linear and not hasattr(unloaded, "peft_config")
    assert on_meta(unloaded) == {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in away}
    assert_same_bits(logits(unloaded), logits(pruned()))


@pytest.mark.skipif(peft.__version__.startswith("0.20."), reason="PEFT 0.20 does not find its base on a disk again")
def test_peft_loads_onto_a_model_that_transformers_dispatched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)  # where PEFT writes offloaded weights under their new names
    reference = train(plain_peft())
    reference.save_pretrained(tmp_path / "adapter")
    spp.save_model(pruned(), tmp_path / "base")
    folder = {"offload_folder": str(tmp_path / "offloaded")}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=MAP, **folder)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map=INSIDE, **folder)
    assert on_meta(model) and not any("spp_" in name for name in on_meta(model))
    assert_same_bits(logits(model), logits(reference))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("first", ["dispatched", "adapted"])
def test_fused_experts(first: str, tmp_path: Path) -> None:
    def make() -> Any:
        model = moe_model("mixtral")
        spp.prune(model, "magnitude", "2:4")
        return model

    reference = plain_peft(make())
    model = plain_peft(to_disk(make(), tmp_path)) if first == "dispatched" else to_disk(plain_peft(make()), tmp_path)
    for one in (model, reference):
        train(one)
    for name, ours in adapter(model).items():
        assert_same_bits(ours, adapter(reference)[name], name)
    assert_same_bits(logits(model), logits(reference))
    assert any(name.endswith("experts.gate_up_proj") for name in on_meta(model))
    with pytest.raises(ConfigError, match="is offloaded by accelerate"):
        model.merge_and_unload()
    assert_same_bits(logits(model.unload()), logits(make()))
