"""Calibration follows the model's own forward: what it does between blocks, what blocks share, what they change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from spp.pruning import blocks, prune
from tests.helpers.models import tiny_llama
from tests.masks.oracles import wanda_oracle

N = 16


def _ids(windows: int = 5, length: int = 24) -> Tensor:
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))


class _Block(nn.Module):
    """Returns a tensor, a pair of which the second counts too, or a tensor that depends on a mapping all blocks use."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.up_proj, self.form = nn.Linear(N, N), form

    def forward(self, hidden: Tensor, memory: dict[str, Tensor]) -> Any:
        if self.form == "changes its input":
            return hidden.add_(torch.tanh(self.up_proj(hidden * 2)))
        made = hidden + torch.tanh(self.up_proj(hidden))
        if self.form == "pair":
            return made, made.flip(-1)
        if self.form == "memory":
            made = made + memory["first"] if "first" in memory else made
            memory.setdefault("first", made.flip(-1))
        return made


class _Model(nn.Module):
    def __init__(self, form: str, *, between: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, N)
        self.layers = nn.ModuleList([_Block(form) for _ in range(4)])
        self.between = between

    def forward(self, ids: Tensor) -> Tensor:
        hidden, memory = self.embedding(ids), {}
        for block in self.layers:
            output = block(hidden, memory=memory)
            hidden = output[0] + output[1] if isinstance(output, tuple) else output
            if self.between:
                hidden *= torch.arange(1.0, N + 1)
                hidden += torch.arange(N).flip(0)
        return hidden


@torch.no_grad()
def _literal(model: nn.Module, layers: list[str], ids: Tensor) -> nn.Module:
    """One layer after another: the whole model, window by window, then the mask of what the layer read."""
    for name in layers:
        module, read = model.get_submodule(name), []
        hook = module.register_forward_pre_hook(lambda _, args, seen=read: seen.append(args[0].flatten(0, -2).clone()))
        for window in ids:
            model(window[None])
        hook.remove()
        module.weight.mul_(wanda_oracle(module.weight, torch.cat(read).double().norm(dim=0), nm=(2, 4)))
    return model


@pytest.mark.parametrize(
    ("form", "between"),
    [("tensor", True), ("pair", False), ("pair", True), ("memory", False), ("changes its input", False)],
)
def test_each_block_reads_what_the_model_gives_it(form: str, between: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 48)  # batches of 2, 2 and 1 windows
    model, ids = _Model(form, between=between), _ids()
    expected = copy.deepcopy(model)
    report = prune(model, "wanda", "2:4", ids)
    _literal(expected, list(report.layers), ids)
    for name in report.layers:
        assert torch.equal(model.get_submodule(name).weight, expected.get_submodule(name).weight), name


class _ChangedBetween(nn.Module):
    """Two linears read one tensor object, which is changed in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, hidden: Tensor, memory: dict[str, Tensor]) -> Tensor:
        hidden = hidden.clone()
        first = self.q_proj(hidden)
        hidden *= torch.arange(N)
        return first + self.k_proj(hidden)


def test_an_input_that_is_changed_in_place_is_another_one() -> None:
    model, ids = _Model("tensor"), _ids()
    model.layers = nn.ModuleList([_ChangedBetween()])
    dense = copy.deepcopy(model.layers[0])
    prune(model, "wanda", "2:4", ids)
    x = model.embedding(ids).detach().flatten(0, -2)
    for name, read in (("q_proj", x), ("k_proj", x * torch.arange(N))):
        weight = dense.get_submodule(name).weight.detach()
        expected = weight * wanda_oracle(weight, read.double().norm(dim=0), nm=(2, 4))
        assert torch.equal(model.layers[0].get_submodule(name).weight, expected), name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ["gemma3n_text", "gemma4_text"])
def test_layers_that_use_keys_and_values_of_earlier_ones(architecture: str) -> None:
    config = AutoConfig.for_model(
        architecture,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        **({"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4} if architecture == "gemma3n_text" else {}),
    )
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).float().eval(), _ids(3)
    shared = "model.layers.{}.self_attn.q_proj"
    before = [model.get_submodule(shared.format(i)).weight.detach().clone() for i in (2, 3)]
    dense = copy.deepcopy(model)
    report = prune(model, "wanda", "2:4", ids)
    for i, weight in zip((2, 3), before, strict=True):  # the inputs of layer i do not depend on its own weights
        for name in report.layers:
            if int(name.split(".")[2]) < i:
                dense.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
        read: list[Tensor] = []
        hook = dense.get_submodule(shared.format(i)).register_forward_pre_hook(
            lambda _, args, seen=read: seen.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            for window in ids:
                dense(window[None], use_cache=False)
        hook.remove()
        expected = weight * wanda_oracle(weight, torch.cat(read).double().norm(dim=0), nm=(2, 4))
        assert torch.equal(model.get_submodule(shared.format(i)).weight, expected)


@pytest.mark.parametrize("tokens", [1, 24, 60, 100])
def test_batches_do_not_matter(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tiny_llama(), tiny_llama()
    prune(whole, "wanda", "2:4", _ids())
    monkeypatch.setattr(blocks, "BATCH_TOKENS", tokens)
    prune(parts, "wanda", "2:4", _ids())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, parts.get_parameter(name)), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot", "sparsegpt+dsnot"])
def test_one_window_of_one_token(method: str) -> None:
    report = prune(tiny_llama(), method, "2:4", torch.tensor([[5]]))
    assert report.sparsity == 0.5
    assert {layer.tokens for layer in report.layers.values()} == {1}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_a_fraction_of_zero_leaves_a_layer_as_it_is(method: str) -> None:
    model, dense = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for each in (model, dense):
            each.model.layers[0].input_layernorm.weight[::4] = 0  # dead inputs too
    report = prune(model, method, {r".*layers\.0\..*": 0.0, ".*": 0.5}, _ids())
    for name, layer in report.layers.items():
        same = torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
        assert same == (".0." in name) == (layer.sparsity == 0)
        assert layer.pattern == ("0.0" if same else "0.5")
