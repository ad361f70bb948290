"""Every architecture by one road: prune, wrap, train, save and load the adapter, merge, save, reload with transformers.

Tiny random models of transformers' own classes; no argument names a module anywhere.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import spp
from spp.files import CheckpointReader
from spp.inject import adapter_layers
from spp.patterns import is_nm, nonzero_mask
from spp.targets_layout import find_projections
from tests.models import MOE_ARCHITECTURES
from tests.tolerances import LOGITS, error

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96, "pad_token_id": 0}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
HEADS = {**GATED, "head_dim": 8}
DENSE: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 16},
    "qwen2": GATED,
    "qwen3": HEADS,
    "gemma2": {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {**HEADS, "sliding_window": 16},
    "phi3": GATED,
    "olmo2": GATED,
    "cohere": GATED,
    "starcoder2": GATED,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96, "n_positions": 64},
    "gpt_neox": {**SMALL, "intermediate_size": 64},
    "falcon": {**SMALL, "alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "expansion_ratio": 2, "max_seq_len": 64},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96, "rotary_dim": 8, "n_positions": 64},
}
ARCHITECTURES = {**DENSE, **{name: MOE_ARCHITECTURES[name] for name in MOE_ARCHITECTURES if name != "jetmoe"}}
UNTOUCHED = ("router", "lm_head", "embed", "wte", "wpe", "mlp.gate.", "norm", "ln_")


def _model(architecture: str) -> nn.Module:
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # far enough from zero that three steps show
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=0.1)
    return model


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))


def _train(model: nn.Module, ids: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=2e-2)
    losses = []
    model.train()
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return [*losses, model(input_ids=ids, labels=ids, use_cache=False).loss.item()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_road(architecture: str, tmp_path: Path) -> None:
    model, ids = _model(architecture), _ids()
    before = copy.deepcopy(model.state_dict())
    report = spp.prune(model, "wanda", "2:4", ids)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    pruned = copy.deepcopy(model)
    masks = {name: nonzero_mask(t) for name, t in model.state_dict().items()}

    spp.wrap(model, r=4, seed=0)
    assert list(adapter_layers(model)) == list(report.layers)
    with torch.no_grad():
        assert error(model(ids, use_cache=False).logits, pruned(ids, use_cache=False).logits) <= LOGITS[torch.float32]
    losses = _train(model, ids)
    assert losses[-1] < losses[0]
    spp.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        tuned = model(ids, use_cache=False).logits
    again = spp.load_adapter(copy.deepcopy(pruned), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, tuned)
        assert error(tuned, pruned(ids, use_cache=False).logits) > 1e-3

    spp.merge(model)
    assert not adapter_layers(model)
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        merged = model(ids, use_cache=False).logits
    assert error(merged, tuned) <= LOGITS[torch.float32]
    for name, tensor in model.state_dict().items():
        assert torch.equal(nonzero_mask(tensor), masks[name]), name
        if any(part in name for part in UNTOUCHED):
            assert torch.equal(tensor, before[name]), name
    for projection in find_projections(model):
        if projection.path in report.layers:
            assert all(is_nm(nonzero_mask(matrix), 2, 4) for matrix in projection.matrices()), projection.path

    spp.save_model(model, tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    disk = spp.verify(tmp_path / "merged")
    assert {tensor.pattern for tensor in disk.tensors.values()} == {"2:4"}
    spp.save_model(pruned, tmp_path / "pruned")
    spp.verify(tmp_path / "pruned", tmp_path / "merged")
    spp.merge_checkpoint(tmp_path / "pruned", tmp_path / "adapter", tmp_path / "streamed")
    with CheckpointReader(tmp_path / "merged") as one, CheckpointReader(tmp_path / "streamed") as other:
        assert one.keys() == other.keys()
        for key in one:
            assert one.raw(key) == other.raw(key), key
    unwrapped = spp.unwrap(again)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(unwrapped.state_dict()[name], tensor), name
