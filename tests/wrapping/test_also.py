"""Norms, biases and the output head that train beside the adapter: gradients, ways back, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spp
from spp.errors import AdapterError, ConfigError, NonFiniteError, SPPWarning
from spp.wrapping.adapters import without_effect
from spp.wrapping.wrap import also_trained
from tests.helpers.models import moe_model, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits

IDS = torch.arange(3, 35).view(2, 16)
ALL = ("norms", "biases", "head")
DTYPES = [torch.float32, torch.bfloat16]


def pruned(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return prune_nm_(tiny_llama(attention_bias=True, **options)).to(dtype)


def trained(dtype: torch.dtype = torch.float32, also: Any = ALL, **options: Any) -> Any:
    """Wrapped, every parameter away from its start."""
    model = spp.wrap(pruned(dtype), r=2, seed=0, also_train=also, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, expected[name], name)


def test_what_trains_comes_after_the_adapter_in_module_order() -> None:
    model = spp.wrap(pruned(), r=2, also_train=ALL)
    adapter = [n for n, _ in model.named_parameters() if ".spp_" in n]
    others = [n for n, p in model.named_parameters() if ".spp_" not in n and p.requires_grad]
    assert others == [n for n in others if "norm" in n or n.endswith("_proj.bias") or n == "lm_head.weight"]
    assert len(others) == 5 + 2 * 4 + 1
    named = {id(p): n for n, p in model.named_parameters()}
    found = [named[id(p)] for p in spp.adapter_parameters(model)]
    assert found[: len(adapter)] == adapter and sorted(found[len(adapter) :]) == sorted(others)
    assert found[len(adapter) :] == [n for n in also_trained(model)] and found[-1] == "lm_head.weight"
    assert list(spp.adapter_state_dict(model)) == found


def test_norms_of_queries_and_keys_and_of_experts_models_count() -> None:
    model = spp.wrap(prune_nm_(moe_model("qwen3_moe")), r=1, also_train="norms", target_modules=["q_proj"])
    kinds = {name.split(".")[-2] for name in also_trained(model)}
    assert kinds == {"norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"}
    model(IDS, labels=IDS).loss.backward()
    assert all(bool(one.trained.grad.any()) for one in also_trained(model).values())


def test_a_norm_is_known_by_its_form_and_a_shared_one_trains_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    class ScaleNorm(Odd):
        pass

    class Normed(nn.Linear):
        """No norm, whatever it is called."""

    first, second = ScaleNorm(), ScaleNorm()
    second.weight = first.weight
    bare = nn.LayerNorm(8, elementwise_affine=False)
    model = nn.Sequential(Odd(), first, Normed(8, 8), second, nn.LayerNorm(8), nn.PReLU(8), bare)
    nn.init.eye_(model[2].weight)
    spp.wrap(model, r=1, also_train="norms", target_modules="all-linear")
    assert list(also_trained(model)) == ["1.weight", "4.weight", "4.bias"]
    assert model[1].weight is model[3].weight and len(spp.adapter_parameters(model)) == 2 + 3
    weight = model[1].weight
    model(torch.ones(2, 8)).sum().backward()
    assert weight.grad is not None
    spp.unwrap(model)
    assert model[1].weight is model[3].weight is not weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_plain_autograd(dtype: torch.dtype) -> None:
    """Those of a plain model with the adapter's effective weights, and with the rounded values in place."""
    model = trained(dtype)
    model(IDS, labels=IDS).loss.backward()
    plain = pruned(dtype)
    with torch.no_grad():
        for path, module in model.named_modules():
            if hasattr(module, "effective_weight"):
                plain.get_submodule(path).weight.copy_(module.effective_weight())
        for name, one in also_trained(model).items():
            plain.get_parameter(name).copy_(one.trained)
    plain(IDS, labels=IDS).loss.backward()
    assert_same_bits(logits(model), logits(plain))
    for name, one in also_trained(model).items():
        grad = plain.get_parameter(name).grad
        tolerance = {"atol": 1e-6, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
        torch.testing.assert_close(one.trained.grad, grad.float(), **tolerance)
        assert bool(one.trained.grad.any()) and one.trained.dtype == torch.float32


def test_small_steps_of_a_16_bit_base_are_not_lost() -> None:
    model = spp.wrap(pruned(torch.bfloat16), r=2, also_train="norms")
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=1e-4, weight_decay=0.0)
    for _ in range(25):  # each smaller than half a step of bfloat16 at 1
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert any(one.changed() for one in also_trained(model).values())
    spp.merge(model)
    assert any(bool((p != 1).any()) for n, p in model.named_parameters() if "norm" in n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unwrap_and_disabled_give_the_originals_back(dtype: torch.dtype) -> None:
    model = pruned(dtype)
    model.model.norm.weight.requires_grad_(False)
    before, parameters = {n: t.clone() for n, t in model.state_dict().items()}, dict(model.named_parameters())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    start = logits(model)
    spp.wrap(model, r=2, also_train=ALL)
    assert_same_bits(logits(model), start)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.25)
    tuned = logits(model)
    assert not torch.equal(tuned, start)
    with pytest.raises(KeyError), spp.disabled(model):
        with spp.disabled(model):
            assert_same_bits(logits(model), start)
        assert_same_bits(logits(model), start)
        raise KeyError
    assert_same_bits(logits(model), tuned)
    other = spp.unwrap(copy.deepcopy(model))
    assert_state(other, before)
    assert_same_bits(logits(model), tuned)
    spp.unwrap(model)
    assert_state(model, before)
    assert dict(model.named_parameters()) == parameters, "the same objects"
    assert not model.model.norm.weight.requires_grad and model.lm_head.weight.requires_grad
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_an_error_in_a_forward_leaves_the_parameters() -> None:
    model = trained(torch.bfloat16)
    norm, before = model.model.norm, model.model.norm.weight
    with pytest.raises(RuntimeError):
        norm(torch.ones(2, 3, dtype=torch.bfloat16))
    assert norm.weight is before


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = trained(torch.bfloat16).train()
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in spp.adapter_parameters(model)])
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_hold_it_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(dtype)
    spp.save_adapter(model, tmp_path / "a")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert values["also_train"] == list(ALL)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert_same_bits(stored["base_model.model.model.norm.weight"], also_trained(model)["model.norm.weight"].trained)
    loaded = spp.load_adapter(pruned(dtype), tmp_path / "a")
    assert_same_bits(logits(loaded), logits(model))
    spp.save_adapter(loaded, tmp_path / "b")
    again = spp.load_adapter(spp.wrap(pruned(dtype), r=2, seed=9, also_train="norms+biases+head"), tmp_path / "b")
    assert_same_bits(logits(again), logits(model))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_without_it_has_the_config_that_it_had(tmp_path: Path) -> None:
    spp.save_adapter(trained(also=()), tmp_path / "a")
    assert "also_train" not in json.loads((tmp_path / "a" / "adapter_config.json").read_text())


def altered(folder: Path, change: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


NORM = "base_model.model.model.norm.weight"


def _set(key: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda tensors: tensors.pop(NORM), AdapterError, "missing model.norm.weight"),
        (_set("base_model.model.model.more.weight", torch.ones(2)), AdapterError, "unexpected model.more.weight"),
        (_set(NORM, torch.ones(3)), AdapterError, "misshapen model.norm.weight"),
        (_set(NORM, torch.full((64,), torch.nan)), NonFiniteError, "model.norm.weight"),
        (lambda tensors: [tensors.pop(k) for k in list(tensors) if "spp_" not in k], AdapterError, "no such tensor"),
    ],
)
def test_files_that_lie_are_refused(change: Any, error: type[Exception], said: str, tmp_path: Path) -> None:
    spp.save_adapter(trained(), tmp_path / "a")
    model = pruned()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=said):
        spp.load_adapter(model, altered(tmp_path / "a", change))
    assert_state(model, before)


def test_a_config_that_does_not_say_it_makes_its_tensors_strangers(tmp_path: Path) -> None:
    spp.save_adapter(trained(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in values.items() if k != "also_train"}))
    with pytest.raises(AdapterError, match=r"unexpected keys .*norm\.weight"):
        spp.load_adapter(pruned(), tmp_path / "a")


def test_an_adapter_for_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    spp.save_adapter(trained(), tmp_path / "a")
    with pytest.raises(AdapterError, match=r"not for this model: .*biases"):
        spp.load_adapter(prune_nm_(tiny_llama()), tmp_path / "a")
    with pytest.raises(AdapterError, match=r"wrapped otherwise .*also_train"):
        spp.load_adapter(spp.wrap(pruned(), r=2), tmp_path / "a")


def untied_in_memory() -> Any:
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return prune_nm_(model)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (lambda: pruned(tie_word_embeddings=True), {"also_train": "head"}, "tied to its input embedding.*untie"),
        (untied_in_memory, {"also_train": "head"}, "tie_word_embeddings = False"),
        (pruned, {"also_train": "head", "target_modules": ["lm_head", "q_proj"]}, "lm_head is among target_modules"),
        (lambda: prune_nm_(tiny_llama()), {"also_train": ("norms", "biases")}, "names biases, .*norms: 5, such as"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), {"also_train": "norms"}, "biases: 1, such as 0.bias"),
        (pruned, {"also_train": "embeddings"}, "norms, biases, head"),
        (pruned, {"also_train": 3}, "norms, biases, head"),
    ],
)
def test_what_cannot_train_is_refused_and_nothing_is_changed(model: Any, options: dict[str, Any], said: str) -> None:
    model = model()
    if isinstance(model, nn.Sequential):
        options = {**options, "target_modules": "all-linear"}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        spp.wrap(model, r=1, **options)
    assert_state(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_pruned_head_is_warned_of() -> None:
    model = pruned()
    with torch.no_grad():
        model.lm_head.weight[:40] = 0
    with pytest.warns(SPPWarning, match="16% of the output head's weights are zero"):
        spp.wrap(model, r=1, also_train="head")


@pytest.mark.parametrize("packed", [False, True])
def test_packed_bases(packed: bool) -> None:
    model = pruned(torch.bfloat16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    if packed:
        spp.pack(model)
    spp.wrap(model, r=2, packed=True, also_train=ALL)
    model(IDS, labels=IDS).loss.backward()
    assert all(bool(one.trained.grad.any()) for one in also_trained(model).values())
    spp.unwrap(model)
    assert_state(spp.unpack(model) if packed else model, before)


def test_a_model_that_was_converted_in_between_comes_back_in_its_new_dtype() -> None:
    model = spp.unwrap(trained().to(torch.float64))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    expected = pruned().double().state_dict()
    assert_state(model, expected)


def test_the_share_that_trains_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = spp.wrap(pruned(), r=2, also_train="norms")
    spp.print_trainable_parameters(model)
    count = sum(p.numel() for p in spp.adapter_parameters(model))
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    assert count == sum(p.numel() for n, p in model.named_parameters() if "norm" in n or "spp_" in n)


def test_norms_alone_are_an_effect() -> None:
    model = spp.wrap(pruned(torch.bfloat16), r=2, also_train="norms")
    assert "changes no weight" in (without_effect(model) or "")
    with torch.no_grad():
        model.model.norm.weight.add_(1e-5)  # rounded away
    assert "changes no weight" in (without_effect(model) or "")
    with torch.no_grad():
        model.model.norm.weight.add_(1e-1)
    assert without_effect(model) is None


def test_a_model_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = trained(also=("norms",))
    spp.save_adapter(model, tmp_path / "a")
    loaded = spp.load_adapter(pruned().to("meta"), tmp_path / "a")
    assert_same_bits(loaded.model.norm.weight, model.model.norm.weight)
    assert loaded.model.norm.weight.requires_grad
