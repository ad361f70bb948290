"""Models of which parts are compiled by torch.compile(module), block by block or one linear alone.

Its module has `_orig_mod` in the names of all below it: files with such names load as if nothing had been trained
(pytorch/pytorch#101107, MakazhanAlpamys/Soup#335).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spp
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits

IDS = torch.arange(3, 35).view(2, 16)


def pruned() -> Any:
    return prune_nm_(tiny_llama(num_hidden_layers=1))


def compiled(model: Any) -> Any:
    """Compile each block, as accelerate's compile_regions does; nothing is traced before the first call."""
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block, backend="eager")
    return model


def wrapped(model: nn.Module) -> nn.Module:
    """A wrapped model with an adapter off its start, the same for the same layers."""
    generator = torch.Generator().manual_seed(0)
    spp.wrap(model, r=4, seed=0)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_same_files(found: Path, expected: Path) -> None:
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    for file in expected.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def test_files_are_those_of_the_model_that_is_not_compiled(tmp_path: Path) -> None:
    """Whether blocks are compiled before the wrap or after it; the model stays compiled."""
    plain = wrapped(pruned())
    spp.save_adapter(plain, tmp_path / "plain")
    for name, model in {
        "before": wrapped(compiled(pruned())),
        "after": compiled(wrapped(pruned())),
    }.items():
        spp.save_adapter(model, tmp_path / name)
        assert_same_files(tmp_path / name, tmp_path / "plain")
    spp.merge(model)
    spp.merge(plain)
    spp.save_model(plain, tmp_path / "merged")
    spp.save_model(model, tmp_path / "merged compiled")
    assert_same_files(tmp_path / "merged compiled", tmp_path / "merged")
    assert spp.verify(tmp_path / "merged", model).pattern == "2:4"
    assert all(type(block).__name__ == "OptimizedModule" for block in model.model.layers)


def test_adapters_load_in_both_directions(tmp_path: Path) -> None:
    plain = wrapped(pruned())
    spp.save_adapter(plain, tmp_path / "a")
    found = spp.adapter_state_dict(spp.load_adapter(compiled(pruned()), tmp_path / "a"))
    # one that another writer saved with the names of compiled blocks
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k.replace("layers.0.", "layers.0._orig_mod."): t for k, t in load_file(file).items()}, file)
    again = spp.adapter_state_dict(spp.load_adapter(pruned(), tmp_path / "a"))
    for key, tensor in spp.adapter_state_dict(plain).items():
        assert_same_bits(found[key], tensor, key)
        assert_same_bits(again[key], tensor, key)


def test_unwrap_restores_the_flags_of_a_model_that_was_compiled_since() -> None:
    model = pruned()
    model.get_submodule("model.layers.0.input_layernorm").requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    spp.unwrap(compiled(spp.wrap(model, r=4)))
    after = {name.replace("._orig_mod", ""): p.requires_grad for name, p in model.named_parameters()}
    assert after == before and len(set(after.values())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_pruned_as_the_model_that_is_not_compiled(method: str) -> None:
    ids = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(5))
    model, plain = compiled(tiny_llama(num_hidden_layers=1)), tiny_llama(num_hidden_layers=1)
    report, expected = (spp.prune(m, method, "2:4", ids) for m in (model, plain))
    assert list(report.layers) == list(expected.layers)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_bits(one, other)


def test_a_linear_that_is_compiled_alone() -> None:
    """Its compiled form would go on calling the linear without the adapter: it is no longer compiled."""
    model, plain = pruned(), wrapped(pruned())
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    mlp.up_proj = torch.compile(mlp.up_proj, backend="eager")
    assert spp.sparsity(model).pattern == "2:4"
    wrapped(model)
    assert spp.adapter_state_dict(model).keys() == spp.adapter_state_dict(plain).keys()
    assert_same_bits(model(IDS).logits, plain(IDS).logits)
    assert type(spp.unwrap(model).get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_block_of_changing_lengths_and_modes(packed: bool) -> None:
    """huggingface/peft#1199, #3020: graphs of one length, mode or adapter that are used for others."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    model = spp.wrap(pruned(), r=4, seed=0, packed=packed, dropout=0.1)
    mlp, parameters = model.get_submodule("model.layers.0.mlp"), spp.adapter_parameters(model)
    used = list(mlp.parameters())
    fast = torch.compile(mlp, backend="aot_eager", dynamic=True)
    for length in (16, 9):
        x = torch.randn(2, length, 64, generator=generator)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            model.eval()
            assert_same_bits(fast(x), mlp(x))
            with spp.disabled(model):
                assert_same_bits(fast(x), mlp(x))
        model.train()
        gradients = []
        for run in (fast, mlp):
            torch.manual_seed(1)
            run(x).square().sum().backward()
            gradients.append([p.grad for p in used if p.requires_grad])
            model.zero_grad()
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
