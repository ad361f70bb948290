"""spp.prune on fused experts: each expert's matrix by the tokens that are routed to it, N:M along its inputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import spp
from spp.errors import NonFiniteError, TargetError
from spp.masks.patterns import is_nm, nonzero_mask
from spp.models.projection import disk_input_axes, find_projections
from spp.pruning import prune
from tests.helpers.models import MOE_ARCHITECTURES, NAMED_OTHERWISE, moe_model
from tests.masks.oracles import dsnot_oracle, sparsegpt_oracle, wanda_oracle

TRANSPOSED = ("gpt_oss", "llama4_text")


def _ids(windows: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))


def _routed(experts: nn.Module, args: tuple[torch.Tensor, ...], e: int) -> torch.Tensor:
    """What expert e reads, from what its module is given."""
    if len(args) == 1:  # Llama 4: every token for every expert, zero where it is not routed
        rows = args[0].view(experts.num_experts, -1, args[0].shape[-1])[e]
        return rows[rows.abs().sum(dim=1) > 0]
    hidden, chosen = args[:2]
    return hidden[(chosen == e).any(dim=1)]


@torch.no_grad()
def _expert_inputs(experts: nn.Module, calls: list[tuple[torch.Tensor, ...]]) -> dict[tuple[str, int], torch.Tensor]:
    """{(parameter, expert): inputs} of a fused module, by its formula in plain matrix products."""
    transposed = experts.gate_up_proj.shape[1] == experts.down_proj.shape[2]
    found = {}
    for e in range(experts.gate_up_proj.shape[0]):
        x = torch.cat([_routed(experts, args, e) for args in calls])
        up = experts.gate_up_proj[e] if transposed else experts.gate_up_proj[e].T
        both = x @ up
        if getattr(experts, "gate_up_proj_bias", None) is not None:
            both = both + experts.gate_up_proj_bias[e]
        if hasattr(experts, "_apply_gate"):
            inner = experts._apply_gate(both)
        else:
            gate, linear = both.chunk(2, dim=-1)
            inner = experts.act_fn(gate) * linear
        found["gate_up_proj", e], found["down_proj", e] = x, inner
    return found


def _fused(model: nn.Module, block: int) -> nn.Module:
    return next(
        m for m in model.model.layers[block].modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter)
    )


def _read_by_experts(model: nn.Module, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """What the experts of the first block read. Routing is the dense block's: it is pruned after its statistics."""
    experts, calls = _fused(model, 0), []
    hook = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    for window in ids:
        model(window[None], use_cache=False)
    hook.remove()
    return _expert_inputs(experts, calls)


def _pairs(architecture: str, model: nn.Module, dense: nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """(dense matrix, pruned matrix, inputs) of each expert in the first block, matrices as (out, in)."""
    pairs = []
    for (name, e), x in _read_by_experts(dense, ids).items():
        matrices = [getattr(_fused(m, 0), name)[e] for m in (dense, model)]
        pairs.append((*(m.T if architecture in TRANSPOSED else m for m in matrices), x))
    return pairs


@pytest.mark.sampled(2)
@torch.no_grad()
@pytest.mark.parametrize(
    "architecture", [name for name in MOE_ARCHITECTURES if name not in ("jetmoe", *NAMED_OTHERWISE)]
)
def test_each_expert_is_pruned_by_the_tokens_routed_to_it(architecture: str) -> None:
    model, dense, ids = moe_model(architecture), moe_model(architecture), _ids()
    used = [getattr(m.config, "_experts_implementation", None) for m in model.modules() if hasattr(m, "config")]
    report = prune(model, "wanda", "2:4", ids)
    pairs = _pairs(architecture, model, dense, ids)
    assert len(pairs) == 8
    for before, after, x in pairs:
        assert len(x) > 0
        assert torch.equal(after, before * wanda_oracle(before, x.double().norm(dim=0), nm=(2, 4)))
    layers = {path: layer for path, layer in report.layers.items() if "experts." in path and layer.shape[:1] == (4,)}
    assert len(layers) == 4  # two a block
    for path, layer in layers.items():
        assert layer.shape == ((4, 48, 32) if path.endswith("gate_up_proj") else (4, 32, 24))
        assert 0 < layer.relative_error < 1
        assert layer.note == ""
    assert layers[next(iter(layers))].tokens == sum(len(x) for _, after, x in pairs if after.shape[0] == 48)
    for projection in find_projections(model):
        if projection.path in report.layers:
            assert all(is_nm(nonzero_mask(matrix), 2, 4) for matrix in projection.matrices()), projection.path
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    json.dumps(report.to_dict())
    assert used == [getattr(m.config, "_experts_implementation", None) for m in model.modules() if hasattr(m, "config")]
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.sampled(2)
@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["sparsegpt", "dsnot"])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_other_methods_on_experts(architecture: str, method: str, pattern: str | float) -> None:
    model, dense, ids = moe_model(architecture), moe_model(architecture), _ids()
    prune(model, method, pattern, ids, target_modules=["gate_up_proj", "down_proj"])
    options: dict[str, Any] = {"nm": (2, 4)} if pattern == "2:4" else {"fraction": 0.5}
    for before, after, x in _pairs(architecture, model, dense, ids):
        if method == "sparsegpt":
            expected = sparsegpt_oracle(before, x.double().T @ x.double() * (2 / len(ids)), **options)[0].float()
        else:
            mask = wanda_oracle(before, x.norm(dim=0), **options)
            refined = dsnot_oracle(before, mask, x, group=4 if pattern == "2:4" else None, threshold=0.1 * 4 / len(x))
            expected = before * refined
        assert torch.equal(nonzero_mask(after), nonzero_mask(expected))
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-5)


def test_modules_that_hold_one_matrix_an_expert() -> None:
    model = moe_model("jetmoe")
    report = prune(model, "wanda", "2:4", _ids(), target_modules="all-linear")
    fused = {path: layer for path, layer in report.layers.items() if len(layer.shape) == 3}
    assert len(fused) == 8  # two of the attention and two of the MLP a block
    assert all(layer.tokens > 0 and 0 < layer.relative_error < 1 for layer in fused.values())
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert not any("router" in path for path in report.layers)


@torch.no_grad()
def test_an_expert_without_tokens_is_pruned_by_magnitude(caplog: pytest.LogCaptureFixture) -> None:
    model = moe_model("mixtral")
    router = model.model.layers[0].mlp.gate.weight
    router[0], router[1] = 9.0, 8.0  # with hidden states of positive sum these two win, else the other two
    router[2:] = -router[:2]
    model.model.layers[0].post_attention_layernorm.weight.zero_()
    model.model.layers[0].post_attention_layernorm.weight[0] = 1.0
    model.model.embed_tokens.weight[:, 0] = 50.0
    dense = copy.deepcopy(model)
    report = prune(model, "wanda", "2:4", _ids())
    layer = report.layers["model.layers.0.mlp.experts.down_proj"]
    assert layer.note == "2 experts (2, 3): no calibration token reached it: pruned by magnitude"
    assert "experts.down_proj: 2 experts (2, 3)" in caplog.text
    for e in (2, 3):
        before, after = (m.model.layers[0].mlp.experts.down_proj[e] for m in (dense, model))
        assert torch.equal(after, before * spp.pruning.magnitude_mask(before, "2:4"))


@torch.no_grad()
def test_an_expert_whose_inputs_are_not_finite_is_named() -> None:
    model = moe_model("mixtral")
    model.model.layers[1].mlp.experts.gate_up_proj[2] *= 1e30
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj\[2\]: its inputs hold NaN"):
        prune(model, "wanda", "2:4", _ids())
    assert model.config._experts_implementation != "eager"


def test_experts_that_multiply_in_another_way_are_refused() -> None:
    model = moe_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.__dict__["forward"] = lambda hidden, chosen, weights: torch.einsum(
        "td,ed->td", hidden, experts.gate_up_proj.sum(1)
    )
    with pytest.raises(TargetError, match=r"layers\.0\.mlp\.experts\.\w+: its experts ran.*exclude_modules"):
        prune(model, "wanda", "2:4", _ids())


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "llama4_text"])
def test_owl_counts_the_outliers_of_every_expert(architecture: str) -> None:
    report = prune(moe_model(architecture), "wanda", 0.5, _ids(), owl=spp.pruning.OWL())
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert len({layer.pattern for layer in report.layers.values()}) == 2


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "llama4_text", "qwen3_moe"])
def test_a_pruned_model_is_certified_along_its_input_axes(architecture: str, tmp_path: Path) -> None:
    model = moe_model(architecture)
    report = prune(model, "wanda", "2:4", _ids())
    memory = spp.sparsity(model)
    assert {memory.tensors[p if p in memory.tensors else p + ".weight"].pattern for p in report.layers} == {"2:4"}
    spp.save_model(model, tmp_path / "pruned")
    disk = spp.verify(tmp_path / "pruned")
    dense = {name for name, tensor in disk.tensors.items() if tensor.pattern != "2:4"}
    assert not dense, dense
    # Transposed storage seen along the wrong axis would be no 2:4.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_layouts() -> None:
    found = {p.path: p for p in find_projections(moe_model("gpt_oss"))}
    one = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert (one.input_axis, one.in_features, one.fused, len(one.matrices())) == (-2, 32, True, 4)
    assert one.matrices()[1].shape == (48, 32)
    assert found["model.layers.0.self_attn.q_proj"].input_axis == -1
    shapes = {"a.gate_up_proj": (4, 32, 48), "a.down_proj": (4, 24, 32), "b.gate_up_proj": (4, 48, 32)}
    shapes |= {"b.down_proj": (4, 32, 24), "c.weight": (8, 4), "n": (4,)}
    expected = {"a.gate_up_proj": 1, "a.down_proj": 1, "b.gate_up_proj": 2, "b.down_proj": 2, "c.weight": 1}
    assert disk_input_axes(shapes, "llama") == expected
    assert disk_input_axes(shapes, "gpt2")["c.weight"] == 0
