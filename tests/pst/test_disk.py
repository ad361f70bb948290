"""What PST learned, made permanent on disk: the bits of the conversion in memory, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import spp
from spp.errors import AdapterError, CheckpointError, ConfigError, NonFiniteError, OutputExistsError
from spp.files import CheckpointReader
from spp.pst import pst_layers
from tests.helpers.checkpoints import UP1, same_tensors, trained_by_pst
from tests.helpers.models import tiny_llama
from tests.pst.test_model import classifier


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=256, n_positions=64)).eval()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bfloat16", "sharded"])
def test_the_same_bits_as_in_memory(kind: str, pattern: str | None, tmp_path: Path) -> None:
    dense = gpt2() if kind == "gpt2" else tiny_llama()
    dense = dense.bfloat16() if kind == "bfloat16" else dense
    dense.save_pretrained(tmp_path / "dense", **({"max_shard_size": "100KB"} if kind == "sharded" else {}))
    model = trained_by_pst(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), 0.37 if pattern is None else 0.5)
    if pattern is not None:
        spp.pst.unwrap(model)
        trained_by_pst(model, 0.5, pattern=pattern)
    spp.pst.save(model, tmp_path / "state")
    masks = {path: layer.mask() for path, layer in pst_layers(model).items()}
    found = spp.convert_checkpoint(tmp_path / "dense", tmp_path / "state", tmp_path / "disk")
    spp.save_model(spp.pst.convert(model), tmp_path / "memory")
    assert same_tensors(tmp_path / "disk", tmp_path / "memory")
    assert found == spp.verify(tmp_path / "disk") == spp.sparsity(tmp_path / "memory")
    assert json.loads((tmp_path / "disk" / "sparsity.json").read_text())["base"] is None
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    for path, mask in masks.items():
        weight = reloaded.get_submodule(path).weight
        assert torch.equal((weight if kind != "gpt2" else weight.T) != 0, mask), path


def test_a_dry_run_finds_everything_and_writes_nothing(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    spp.pst.save(trained_by_pst(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), 0.5), tmp_path / "state")
    places = tmp_path / "dense", tmp_path / "state", tmp_path / "new" / "out"
    found = spp.convert_checkpoint(*places, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "state"]
    assert found == spp.convert_checkpoint(*places)
    with pytest.raises(OutputExistsError):
        spp.convert_checkpoint(*places, dry_run=True)
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=rf"{UP1} of .*other is not the weight"):
        spp.convert_checkpoint(tmp_path / "other", tmp_path / "state", tmp_path / "out", dry_run=True)


def test_what_trained_as_a_whole_must_fit_the_dtype(tmp_path: Path) -> None:
    classifier("bert").save_pretrained(tmp_path / "dense")
    model = trained_by_pst(classifier("bert"), 0.5)
    with torch.no_grad():
        model.classifier.weight.fill_(1e6)
    spp.pst.save(model, tmp_path / "state")
    with pytest.raises(NonFiniteError, match=r"classifier\.weight overflows in torch\.float16"):
        spp.convert_checkpoint(tmp_path / "dense", tmp_path / "state", tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_trained_in_another_dtype_than_the_disk_has(tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "dense")
    model = trained_by_pst(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32), 0.5)
    spp.pst.save(model, tmp_path / "state")
    mask = pst_layers(model)[UP1.removesuffix(".weight")].mask()
    with CheckpointReader(tmp_path / "dense") as reader:
        assert reader.dtype(UP1) == torch.bfloat16
    spp.convert_checkpoint(tmp_path / "dense", tmp_path / "state", tmp_path / "same")
    spp.convert_checkpoint(tmp_path / "dense", tmp_path / "state", tmp_path / "wide", dtype=torch.float32)
    expected = spp.pst.convert(model).get_parameter(UP1)
    with CheckpointReader(tmp_path / "same") as same, CheckpointReader(tmp_path / "wide") as wide:
        assert torch.equal(wide.tensor(UP1), expected)
        assert same.dtype(UP1) == torch.bfloat16 and torch.equal(same.tensor(UP1) != 0, mask)
        assert torch.equal(same.tensor(UP1), expected.bfloat16())


def test_a_classifier_with_its_head(tmp_path: Path) -> None:
    classifier("bert").save_pretrained(tmp_path / "dense")
    model = trained_by_pst(classifier("bert"), 0.5)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    spp.pst.save(model, tmp_path / "state")
    spp.convert_checkpoint(tmp_path / "dense", tmp_path / "state", tmp_path / "disk")
    reloaded = type(model).from_pretrained(tmp_path / "disk").eval()
    assert torch.equal(reloaded(input_ids=ids).logits, spp.pst.convert(model)(input_ids=ids).logits)
    with CheckpointReader(tmp_path / "dense") as reader:
        without = {key: reader.tensor(key).clone() for key in reader if not key.startswith("classifier")}
    save_file(without, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"classifier\.bias, which trained as a whole, is not in the base"):
        spp.convert_checkpoint(tmp_path / "dense", tmp_path / "state", tmp_path / "none")


class TestRefused:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        tiny_llama().save_pretrained(tmp_path / "dense")
        model = trained_by_pst(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), 0.5)
        return tmp_path / "dense", spp.pst.save(model, tmp_path / "state")

    def test_other_weights(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        other = tiny_llama()
        other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(AdapterError, match=rf"{UP1} of .*other is not the weight"):
            spp.convert_checkpoint(tmp_path / "other", pair[1], tmp_path / "out")
        tiny_llama(hidden_size=32, intermediate_size=96).save_pretrained(tmp_path / "small")
        with pytest.raises(AdapterError, match=r"misshapen model\.layers\.0"):
            spp.convert_checkpoint(tmp_path / "small", pair[1], tmp_path / "out")
        tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
        with pytest.raises(AdapterError, match=r"the base has no model\.layers\.1\.mlp"):
            spp.convert_checkpoint(tmp_path / "short", pair[1], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_bad_states(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        dense, state = pair
        config, weights = state / "adapter_config.json", state / "adapter_model.safetensors"
        good, tensors = json.loads(config.read_text()), load_file(weights)
        path = next(iter(good["sparsity"]))
        for name, bad in (("sparsity", 1.5), ("sparsity", "NaN"), ("base_crc32", "x"), ("base_dtype", "save")):
            config.write_text(json.dumps({**good, name: {**good[name], path: bad}}))
            with pytest.raises(CheckpointError, match=name):
                spp.convert_checkpoint(dense, state, tmp_path / "out")
        config.write_text(json.dumps({**good, "base_crc32": {}}))
        with pytest.raises(AdapterError, match="base_crc32 lacks"):
            spp.convert_checkpoint(dense, state, tmp_path / "out")
        config.write_text(json.dumps({**good, "peft_type": "LORA"}))
        with pytest.raises(AdapterError, match="'LORA', not PST"):
            spp.convert_checkpoint(dense, state, tmp_path / "out")
        config.write_text(json.dumps(good))
        save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("score_R")}, weights)
        with pytest.raises(AdapterError, match=r"missing .*score_R"):
            spp.convert_checkpoint(dense, state, tmp_path / "out")
        tensors[f"{path}.weight_U"][0, 0] = torch.inf
        save_file(tensors, weights)
        with pytest.raises(NonFiniteError, match="weight_U"):
            spp.convert_checkpoint(dense, state, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_places(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        dense, state = pair
        with pytest.raises(ConfigError, match="lies inside the base"):
            spp.convert_checkpoint(dense, state, dense / "out")
        shutil.copytree(dense, tmp_path / "out")
        with pytest.raises(OutputExistsError):
            spp.convert_checkpoint(dense, state, tmp_path / "out")
        spp.convert_checkpoint(dense, state, tmp_path / "out", overwrite=True)
        assert spp.verify(tmp_path / "out").sparsity == 0.5
        with pytest.raises(AdapterError, match=r"'PST', not SPP; load it with spp\.pst\.load"):
            spp.merge_checkpoint(dense, state, tmp_path / "merged")
