"""The values of the base in PEFT: recorded when it saves, kept when it loads, warned of where they are others."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import spp
from spp.errors import ConfigError, SPPWarning
from spp.integrations.peft import SPPPeftConfig
from spp.weights.base_values import SAME, UNKNOWN
from spp.wrapping.wrap import base_verdict
from tests.helpers.models import moe_model
from tests.helpers.offloading import WAYS
from tests.helpers.quantized import quantized_llama
from tests.integrations.helpers import Q0, pruned, scatter
from tests.weights.test_base_values import Counted, config_of, edit, scaled
from tests.wrapping.test_wrap import stir


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    return scatter(get_peft_model(model, SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM", **options)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted(pruned()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_peft_records_what_spp_records(saved: Path, tmp_path: Path) -> None:
    ours = config_of(spp.save_adapter(stir(spp.wrap(pruned(), r=4)), tmp_path / "ours"))
    theirs = config_of(saved)
    assert len(ours["base_values"]) == 14
    for name in ("base_masks", "base_values", "base_forms"):
        assert theirs[name] == ours[name]
    packed = adapted(pruned(), packed=True)
    packed.save_pretrained(tmp_path / "packed")
    packed.merge_adapter()
    packed.save_pretrained(tmp_path / "merged")
    for name in ("packed", "merged"):
        assert config_of(tmp_path / name)["base_values"] == ours["base_values"]
    assert base_verdict(spp.load_adapter(pruned(), saved, strict_values=True)).state == SAME


def test_the_same_base_is_silent_and_another_is_warned_of(saved: Path, tmp_path: Path) -> None:
    again = PeftModel.from_pretrained(pruned(), saved, is_trainable=True)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() != b""
    assert config_of(tmp_path / "again")["base_values"] == config_of(saved)["base_values"]
    again.merge_adapter()
    again.load_adapter(saved, "second")  # onto the base that was there before the merge
    PeftModel.from_pretrained(spp.pack(pruned()), saved, config=_packed(saved))
    edit(saved, base_model_name_or_path="the/base")
    with pytest.warns(SPPWarning, match="14 of 14 layers, first in .*the/base"):
        PeftModel.from_pretrained(scaled(pruned()), saved)


@pytest.mark.filterwarnings("ignore:the base's values are not those")
def test_saving_from_another_base_launders_nothing_and_training_there_is_training_there(
    saved: Path, tmp_path: Path
) -> None:
    for trainable in (False, True):
        elsewhere = PeftModel.from_pretrained(scaled(pruned()), saved, is_trainable=trainable)
        elsewhere.load_adapter(saved, "second")
        elsewhere.save_pretrained(tmp_path / f"again-{trainable}")
        for again in (tmp_path / f"again-{trainable}", tmp_path / f"again-{trainable}" / "second"):
            for name in ("base_masks", "base_values", "base_forms"):
                assert config_of(again)[name] == config_of(saved)[name]
    with torch.no_grad():
        next(p for p in elsewhere.parameters() if p.requires_grad).view(-1)[0] += 1
    elsewhere.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    assert base_verdict(spp.load_adapter(scaled(pruned()), tmp_path / "trained", strict_values=True)).state == SAME


def test_one_that_says_nothing_says_nothing_when_it_is_saved_again(saved: Path, tmp_path: Path) -> None:
    config = config_of(saved)
    del config["base_values"], config["base_forms"]
    (saved / "adapter_config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(scaled(pruned()), saved).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["base_values"] is None
    assert base_verdict(spp.load_adapter(scaled(pruned()), tmp_path / "again", strict_values=True)).state == UNKNOWN


def _packed(saved: Path) -> PeftConfig:
    config = PeftConfig.from_pretrained(saved)
    config.packed = True
    return config


def test_one_bit_swaps_and_edits(saved: Path) -> None:
    model = pruned()
    weight = model.get_submodule(Q0).weight.data
    weight.view(torch.int32).view(-1)[weight.view(-1).nonzero()[0]] ^= 1
    with pytest.warns(SPPWarning, match=f"1 of 14 layers, first in {Q0}"):
        PeftModel.from_pretrained(model, saved)
    edit(saved, base_values={**config_of(saved)["base_values"], Q0: "0" * 64})
    with pytest.warns(SPPWarning, match=f"1 of 14 layers, first in {Q0}"):
        PeftModel.from_pretrained(pruned(), saved)
    edit(saved, base_values={Q0: "short"})
    with pytest.raises(ConfigError, match="base_values must be the 64 hexadecimal digits"):
        PeftModel.from_pretrained(pruned(), saved)


def test_older_configs_and_skipped_checks(saved: Path) -> None:
    config = PeftConfig.from_pretrained(saved)
    config.base_masks = None
    PeftModel.from_pretrained(scaled(pruned()), saved, config=config)
    values = config_of(saved)
    del values["base_values"], values["base_forms"]
    (saved / "adapter_config.json").write_text(json.dumps(values))
    PeftModel.from_pretrained(scaled(pruned()), saved)


def test_experts(tmp_path: Path) -> None:
    model = moe_model("mixtral")
    spp.prune(model, "magnitude", "2:4")
    adapted(copy.deepcopy(model)).save_pretrained(tmp_path / "adapter")
    ours = spp.save_adapter(stir(spp.wrap(copy.deepcopy(model), r=2)), tmp_path / "ours")
    assert config_of(tmp_path / "adapter")["base_values"] == config_of(ours)["base_values"]
    name = next(name for name, _ in model.named_parameters() if name.endswith("experts.down_proj"))
    PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").load_adapter(tmp_path / "adapter", "second")
    model.get_parameter(name).data[1].mul_(2)
    with pytest.warns(SPPWarning, match=rf"1 of \d+ layers, first in {name}"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_base(way: str, saved: Path, tmp_path: Path) -> None:
    adapted(WAYS[way](pruned(), tmp_path)).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["base_values"] == config_of(saved)["base_values"]


def test_a_quantized_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    adapted(quantized_llama("nf4")).save_pretrained(tmp_path / "adapter")
    ours = spp.save_adapter(stir(spp.wrap(quantized_llama("nf4"), r=4)), tmp_path / "ours")
    assert config_of(tmp_path / "adapter")["base_values"] == config_of(ours)["base_values"]
    PeftModel.from_pretrained(quantized_llama("nf4"), tmp_path / "adapter")
    edit(tmp_path / "adapter", base_forms=dict.fromkeys(config_of(ours)["base_values"], "float32"))
    with caplog.at_level(logging.INFO, "spp"):
        PeftModel.from_pretrained(quantized_llama("nf4"), tmp_path / "adapter")
    assert "trained on float32, this one is nf4 in blocks of 64" in caplog.text


def test_a_second_save_hashes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, model = Counted(monkeypatch), adapted(pruned())
    for number in range(3):
        model.save_pretrained(tmp_path / str(number))
    assert count.calls == 14
