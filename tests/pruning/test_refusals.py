"""spp.prune refuses what cannot be pruned, says why, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

import spp
from spp.errors import ConfigError, DataError, NonFiniteError, PatternError, TargetError, WrapError
from spp.pruning import prune
from tests.helpers.models import prune_nm_, tiny_llama


def _ids(windows: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))


def _learned() -> nn.Module:
    """A model that has learned its 512 positions one by one."""
    return AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=512))


def _bad_layer(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    return model


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ConfigError, "known: magnitude, wanda", lambda m: prune(m, "wander", "2:4", _ids())),
        (ConfigError, "needs calibration data", lambda m: prune(m)),
        (PatternError, "1 <= N < M", lambda m: prune(m, "wanda", "4:4", _ids())),
        (PatternError, "did you mean 0.5", lambda m: prune(m, "wanda", 50, _ids())),
        (PatternError, r"layers\.0\.self_attn.q_proj has 64.*nearest", lambda m: prune(m, "wanda", "2:6", _ids())),
        (PatternError, r"matches model\.layers\.0", lambda m: prune(m, "wanda", {"up_proj": 0.5}, _ids())),
        (PatternError, "no target module: nonsense", lambda m: prune(m, "magnitude", {".*": 0.5, "nonsense": 0.5})),
        (TargetError, "matches no linear", lambda m: prune(m, "wanda", "2:4", _ids(), target_modules=["x"])),
        (TargetError, "lm_head", lambda m: prune(m, "wanda", "2:4", _ids(), target_modules=["lm_head", "up_proj"])),
        (DataError, "id 256.*256", lambda m: prune(m, "wanda", "2:4", torch.full((2, 8), 256))),
        (DataError, "id -1", lambda m: prune(m, "wanda", "2:4", torch.full((2, 8), -1))),
        (
            DataError,
            "513 tokens.*512",
            lambda m: prune(_learned(), "wanda", "2:4", torch.ones(1, 513, dtype=torch.int64)),
        ),
        (DataError, "tokenizer", lambda m: prune(m, "wanda", "2:4", ["some text"])),
        (NonFiniteError, r"layers\.1\.mlp\.up_proj", lambda m: prune(_bad_layer(m, torch.nan), "magnitude", "2:4")),
        (NonFiniteError, r"layers\.1\.mlp\.up_proj", lambda m: prune(_bad_layer(m, torch.inf), "wanda", 0.5, _ids())),
        (ConfigError, "float8", lambda m: prune(m.to(torch.float8_e4m3fn), "magnitude", "2:4")),
        (ConfigError, "meta", lambda m: prune(m.to("meta"), "magnitude", "2:4")),
        (WrapError, "merge", lambda m: prune(spp.wrap(m, r=2), "magnitude", "2:4")),
        (ConfigError, "one fraction", lambda m: prune(m, "wanda", "2:4", _ids(), owl=spp.pruning.OWL())),
        (ConfigError, "one fraction", lambda m: prune(m, "wanda", {".*": 0.5}, _ids(), owl=spp.pruning.OWL())),
        (ConfigError, "owl= needs calibration", lambda m: prune(m, "magnitude", 0.5, owl=spp.pruning.OWL())),
        (PatternError, "spread below", lambda m: prune(m, "wanda", 0.9, _ids(), owl=spp.pruning.OWL(spread=0.4))),
        (ConfigError, r"method is \['wanda'\]", lambda m: prune(m, ["wanda"], "2:4", _ids())),
        (ConfigError, "seed.*below", lambda m: prune(m, "wanda", "2:4", _ids(), seed=1 << 64)),
        (ConfigError, "seed is -1", lambda m: prune(m, "wanda", "2:4", _ids(), seed=-1)),
        (ConfigError, r"OWL\(\)", lambda m: prune(m, "wanda", 0.5, _ids(), owl=True)),
        (DataError, "tokenizer is 'gpt2'", lambda m: prune(m, "wanda", "2:4", ["text"], tokenizer="gpt2")),
        (ConfigError, "nsamples", lambda m: prune(m, "wanda", "2:4", _ids(), nsamples=0)),
        (ConfigError, "seqlen", lambda m: prune(m, "wanda", "2:4", _ids(), seqlen=True)),
    ],
)
def test_bad_input_is_refused_before_anything_is_changed(
    error: type[Exception], match: str, call: Callable[[nn.Module], object]
) -> None:
    model = prune_nm_(tiny_llama(), 3, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        call(model)
    for name, p in model.named_parameters():
        if "spp_" not in name and p.device.type != "meta" and p.dtype == torch.float32:
            same = (p == before[name]) | ~torch.isfinite(p)
            assert same.all(), name


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot", "sparsegpt+dsnot"])
def test_a_fraction_of_0_leaves_every_weight(method: str) -> None:
    model, before = tiny_llama(), tiny_llama()
    report = prune(model, method, {"down_proj": 0.5, ".*": 0}, _ids())
    for name, p in model.named_parameters():
        assert torch.equal(p, before.get_parameter(name)) == ("down_proj" not in name)
    assert {layer.pattern for layer in report.layers.values()} == {"0.5", "0.0"}


def test_activations_that_are_not_finite_name_block_and_layer() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs"):
        prune(model, "wanda", "2:4", _ids())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[:] = 1e30
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0.* (inputs|output)"):
        prune(model, "wanda", "2:4", _ids())


class _NoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(96, 16), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(ids))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(16, 16)
        self.embedding, self.blocks = nn.Embedding(96, 16), nn.ModuleList([block, block])


def test_models_that_cannot_go_block_by_block() -> None:
    with pytest.raises(TargetError, match="no list of blocks"):
        prune(_NoBlocks(), "wanda", "2:4", _ids(), target_modules="all-linear")
    assert prune(_NoBlocks(), "magnitude", "2:4", target_modules="all-linear").sparsity == 0.5
    twice = _Twice()
    with pytest.raises(TargetError, match="same module"):
        prune(twice, "wanda", "2:4", _ids(), target_modules="all-linear")
