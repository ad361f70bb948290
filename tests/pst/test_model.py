"""Whole models: causal language models and encoder classifiers, wrapped, trained, saved, loaded, converted."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import spp
from spp.errors import AdapterError, ConfigError, NonFiniteError, TargetError, WrapError
from spp.pst import PSTConfig, PSTLinear, pst_layers
from spp.pst.model import trained_parameters
from tests.helpers.models import moe_model, prune_nm_, tiny_llama, train_steps
from tests.helpers.tolerances import assert_same_bits

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64, "pad_token_id": 0}
ENCODERS = {
    "bert": (SMALL, 12),
    "roberta": (SMALL, 12),
    "gpt2": (GPT2, 8),
    "distilbert": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 96}, 12),
}
IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))


def classifier(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ENCODERS[kind][0], num_labels=2)
    return AutoModelForSequenceClassification.from_config(config).eval()


def train_a_little(model: Any, labels: Tensor, steps: int = 4) -> list[float]:
    parameters = list(trained_parameters(model).values())
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    return train_steps(model, optimizer, steps, input_ids=IDS, labels=labels)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ENCODERS)
def test_classifiers(kind: str, tmp_path: Path) -> None:
    model = classifier(kind)
    before = model(input_ids=IDS).logits
    linears = copy.deepcopy(model)
    spp.pst.wrap(model, seed=0)
    layers = pst_layers(model)
    assert len(layers) == ENCODERS[kind][1]
    assert_same_bits(model(input_ids=IDS).logits, before)
    spp.pst.set_sparsity(model, 0.5)
    losses = train_a_little(model, torch.tensor([0, 1, 0, 1]), 8)
    assert losses[-1] < losses[0]
    wrapped, masks = model(input_ids=IDS).logits, {path: layer.mask() for path, layer in layers.items()}
    spp.pst.convert(model)
    assert not pst_layers(model) and all(p.requires_grad for p in model.parameters())
    assert_same_bits(model(input_ids=IDS).logits, wrapped)
    for path, mask in masks.items():
        module, original = model.get_submodule(path), linears.get_submodule(path)
        assert type(module) is type(original)
        weight = module.weight if kind != "gpt2" else module.weight.T
        assert int((~mask).sum()) == mask.numel() // 2 and torch.equal(weight != 0, mask)
    spp.save_model(model, tmp_path / "model")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert_same_bits(reloaded(input_ids=IDS).logits, wrapped)
    weights = [f"{path}.weight" for path in masks]
    report = spp.verify(tmp_path / "model")
    assert set(weights) <= report.tensors.keys()
    for name in weights:
        assert report.tensors[name].zeros == reloaded.get_parameter(name).numel() // 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "opt"])
def test_causal_language_models_at_2_of_4(kind: str, tmp_path: Path) -> None:
    if kind == "llama":
        model: Any = tiny_llama()
    else:
        torch.manual_seed(0)
        small = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 64, "word_embed_proj_dim": 32}
        config = AutoConfig.for_model(kind, **(GPT2 if kind == "gpt2" else small))
        model = AutoModelForCausalLM.from_config(config).eval()
    spp.pst.wrap(model, pattern="2:4", seed=0)
    spp.pst.set_sparsity(model, 0.5)
    losses = train_a_little(model, IDS, 6)
    assert losses[-1] < losses[0]
    with pytest.raises(WrapError, match=r"spp\.pst\.convert"):
        spp.save_model(model, tmp_path / "model")
    spp.save_model(spp.pst.convert(model), tmp_path / "model")
    report = spp.verify(tmp_path / "model")
    paths = [name for name, tensor in report.tensors.items() if tensor.pattern == "2:4"]
    assert len(paths) == {"llama": 14, "qwen3": 14, "opt": 12, "gpt2": 8}[kind] and report.sparsity == 0.5


def test_zeros_that_it_will_fill_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        spp.pst.wrap(tiny_llama())
        assert not caplog.text
        spp.pst.wrap(prune_nm_(tiny_llama()))
    assert "fills the zeros of 14 layers" in caplog.text


def test_unwrap_gives_the_dense_model_back() -> None:
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.lm_head.requires_grad_(False)
    spp.pst.wrap(model)
    spp.pst.set_sparsity(model, 0.7)
    train_a_little(model, IDS)
    spp.pst.unwrap(model)
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.detach(), before[name].detach())
        assert parameter.requires_grad == (name != "lm_head.weight")
    assert "save_pretrained" not in model.__dict__


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_saved_state_is_exact(kind: str, tmp_path: Path) -> None:
    make = tiny_llama if kind == "llama" else lambda: classifier("bert")
    model = spp.pst.wrap(make(), 3, mask_rank=2, seed=0)
    spp.pst.set_sparsity(model, 0.37)
    train_a_little(model, IDS if kind == "llama" else torch.tensor([0, 1, 0, 1]))
    spp.pst.save(model, tmp_path / "state")
    random = torch.get_rng_state()
    loaded = spp.pst.load(make(), tmp_path / "state")
    assert torch.equal(random, torch.get_rng_state())
    assert_same_bits(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert {layer.sparsity for layer in pst_layers(loaded).values()} == {0.37}
    spp.pst.save(loaded, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "state" / name).read_bytes()


def test_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    spp.pst.save(spp.pst.wrap(tiny_llama(), seed=0), tmp_path / "state")
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj"):
        spp.pst.load(other, tmp_path / "state")
    assert not pst_layers(other) and all(p.requires_grad for p in other.parameters())
    with pytest.raises(AdapterError, match="does not fit"):
        spp.pst.load(tiny_llama(hidden_size=32), tmp_path / "state")
    with pytest.raises(AdapterError, match="weight_rank=3"):
        spp.pst.load(spp.pst.wrap(tiny_llama(), 3), tmp_path / "state")
    with pytest.raises(AdapterError, match="'PST', not SPP"):
        spp.load_adapter(tiny_llama(), tmp_path / "state")
    file = tmp_path / "state" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.score_R"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(NonFiniteError, match="score_R"):
        spp.pst.load(tiny_llama(), tmp_path / "state")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(spp.SPPError, match="adapter_model"):
        spp.pst.load(tiny_llama(), tmp_path / "state")


def test_options_reach_the_layers() -> None:
    given = {"weight_rank": 2, "weight_scale": 0.5, "mask_rank": 3, "low_rank_scale": 0.25, "structured_scale": 4.0}
    for config in (given, {"weight_rank": PSTConfig(**given)}):
        for layer in pst_layers(spp.pst.wrap(tiny_llama(), **config)).values():
            assert {name: getattr(layer, name) for name in given} == given
            assert layer.weight_U.shape[1] == 2 and layer.score_A.shape[1] == 3


def test_a_state_goes_onto_any_model_whose_layers_compute_alike(tmp_path: Path) -> None:
    model = spp.pst.wrap(tiny_llama(), 2, seed=0)
    spp.pst.set_sparsity(model, 0.3)
    spp.pst.save(model, tmp_path / "state")
    names = sorted({path.rpartition(".")[2] for path in pst_layers(model)})
    other = spp.pst.wrap(tiny_llama(), 2, seed=1, target_modules=names)
    spp.pst.load(other, tmp_path / "state")
    assert_same_bits(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(AdapterError, match="unwrap it first"):
        spp.pst.load(spp.pst.wrap(tiny_llama(), 2, structured_scale=2.0), tmp_path / "state")
    with pytest.raises(AdapterError, match="unexpected"):
        spp.pst.load(spp.pst.wrap(tiny_llama(), 2, target_modules=names[1:]), tmp_path / "state")


def test_seeds_are_keyed_by_path() -> None:
    first, second = spp.pst.wrap(tiny_llama(), seed=1), spp.pst.wrap(tiny_llama(), seed=1, target_modules=["up_proj"])
    path = "model.layers.1.mlp.up_proj"
    assert_same_bits(first.get_submodule(path).weight_U.detach(), second.get_submodule(path).weight_U.detach())


def test_copies_and_checkpointing() -> None:
    model = spp.pst.wrap(tiny_llama(), seed=0)
    spp.pst.set_sparsity(model, 0.5)
    twin = copy.deepcopy(model)
    twin.train().gradient_checkpointing_enable({"use_reentrant": True})
    for one in (model.train(), twin):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert_same_bits(parameter.grad, other.grad, name)
    before = {path: layer.weight.clone() for path, layer in pst_layers(model).items()}
    spp.pst.convert(twin)
    for path, layer in pst_layers(model).items():
        assert_same_bits(layer.weight, before[path])


def test_refusals() -> None:
    model = tiny_llama()
    with pytest.raises(WrapError, match="not wrapped"):
        spp.pst.convert(model)
    with pytest.raises(TargetError, match="nothing_like_it"):
        spp.pst.wrap(model, modules_to_save=["nothing_like_it"])
    with pytest.raises(TargetError, match="only be one"):
        spp.pst.wrap(model, modules_to_save=["mlp"])
    with pytest.raises(ConfigError, match="whole PSTConfig"):
        spp.pst.wrap(model, PSTConfig(), mask_rank=4)
    with pytest.raises(TargetError, match="fused experts"):
        spp.pst.wrap(moe_model("qwen3_moe"))
    assert all(p.requires_grad for p in model.parameters()) and not pst_layers(model)
    spp.pst.wrap(model)
    with pytest.raises(WrapError, match="already"):
        spp.pst.wrap(model)
    with pytest.raises(WrapError, match="already"):
        spp.pst.wrap(spp.wrap(prune_nm_(tiny_llama()), r=2))
    assert isinstance(model.model.layers[0].mlp.up_proj, PSTLinear)


def test_the_other_method_is_told_the_way_out_of_this_one() -> None:
    model = spp.pst.wrap(tiny_llama())
    tries = (spp.wrap, spp.pack, lambda m: spp.prune(m, "magnitude", "2:4"), lambda m: spp.prune(m, "wanda", 0.5, IDS))
    for attempt in tries:
        with pytest.raises(WrapError, match=r"another method \(model\.layers\.0\..*PSTLinear\).*spp\.pst\.convert"):
            attempt(model)
    assert spp.wrap(prune_nm_(spp.pst.unwrap(model)), r=2) is model and not pst_layers(model)
