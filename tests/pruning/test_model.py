"""spp.prune: the masks of a literal block-by-block procedure, on many architectures; what it leaves; refusals."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import spp
from spp.errors import SPPWarning, TargetError
from spp.masks.patterns import is_nm, nonzero_mask
from spp.pruning import PruneReport, prune
from tests.helpers.models import projections, prune_nm_, tiny_llama
from tests.masks.oracles import dsnot_oracle, sparsegpt_oracle, wanda_oracle

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 96}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "mistral": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 7},
    "gemma3_text": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {**SMALL, "intermediate_size": 64},
    "falcon": {**SMALL, "alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 3, "vocab_size": 96},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 96, "n_positions": 64},
    "olmo2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
}


def _model(architecture: str) -> nn.Module:
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def _ids(windows: int = 5, length: int = 24, vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(3, vocabulary, (windows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _literal(
    model: nn.Module,
    layers: Collection[str],
    ids: torch.Tensor,
    solve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> nn.Module:
    """Block after block: the whole model forward, window by window, remembering what the block's linears read."""
    for i in range(3):
        targets = {n: m for n, m in model.named_modules() if n in layers and f".{i}." in n}
        read: dict[str, list[torch.Tensor]] = {n: [] for n in targets}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, seen=read[name]: seen.append(args[0].flatten(0, -2)))
            for name, module in targets.items()
        ]
        for window in ids:
            model(window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, module in targets.items():
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T  # GPT-2 stores (in, out)
            weight.copy_(solve(weight, torch.cat(read[name])))
    return model


def _wanda(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return w * wanda_oracle(w, x.double().norm(dim=0), nm=(2, 4))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wanda_equals_the_literal_procedure(architecture: str) -> None:
    model, ids = _model(architecture), _ids()
    dense = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    report = prune(model, "wanda", "2:4", ids)
    assert len(report.layers) >= 6
    expected = _literal(dense, report.layers, ids, _wanda)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, expected.get_parameter(name)), name
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(0 < layer.relative_error < 1 for layer in report.layers.values())
    # Nothing stays behind: no hooks, no exchanged forward, and the model still runs and learns.
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    model(ids, labels=ids).loss.backward()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["sparsegpt", "dsnot", "magnitude+dsnot", "sparsegpt+dsnot"])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
@pytest.mark.parametrize("earlier", [0.0, 0.4])
def test_other_methods_equal_the_literal_procedure(method: str, pattern: str | float, earlier: float) -> None:
    options: dict[str, Any] = {"nm": (2, 4)} if pattern == "2:4" else {"fraction": 0.5}
    options["keep_zeros"] = True
    group = 4 if pattern == "2:4" else None

    def solve(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hessian = x.double().T @ x.double() * (2 / 5)
        if method == "sparsegpt":
            return sparsegpt_oracle(w, hessian, **options)[0].float()
        if method == "dsnot":
            mask = wanda_oracle(w, x.norm(dim=0), **options)
        elif method == "magnitude+dsnot":
            mask = spp.pruning.magnitude_mask(w, pattern)
        else:
            mask = sparsegpt_oracle(w, hessian, **options)[1]
        return w * dsnot_oracle(w, mask, x, group=group, threshold=0.1 * 5 / len(x))  # a window's sum, not a mean

    model, ids = _model("llama"), _ids()
    prune(model, "magnitude", earlier)
    dense = copy.deepcopy(model)
    report = prune(model, method, pattern, ids)
    expected = _literal(dense, report.layers, ids, solve)
    spp.verify(dense, model, more_zeros_allowed=True)
    for name, module in projections(model).items():
        other = expected.get_submodule(name).weight
        assert torch.equal(nonzero_mask(module.weight), nonzero_mask(other)), name
        torch.testing.assert_close(module.weight, other, rtol=1e-3, atol=1e-5)
    assert report.method == method


@pytest.mark.parametrize(
    ("base", "pattern"), [("wanda", "2:4"), ("magnitude", 0.5), ("sparsegpt", "2:4"), ("dsnot", 0.6)]
)
def test_exchanges_and_fitted_values_lower_the_error_of_every_layer(base: str, pattern: str | float) -> None:
    dense, ids = _model("llama"), _ids()
    models = {after: copy.deepcopy(dense) for after in ("", "+swap", "+lsq", "+swap+lsq")}
    reports = {after: prune(model, base + after, pattern, ids) for after, model in models.items()}
    first = [path for path in reports[""].layers if ".0." in path]  # later blocks read what other weights made
    errors = {after: [report.layers[path].relative_error for path in first] for after, report in reports.items()}
    for lower, upper in (("+lsq", ""), ("+swap+lsq", "+swap"), *([] if base == "sparsegpt" else [("+swap", "")])):
        assert all(low < high for low, high in zip(errors[lower], errors[upper], strict=True)), (lower, upper)
    weights = {after: [model.get_submodule(path).weight for path in first] for after, model in models.items()}
    for one, other, original in zip(weights[""], weights["+lsq"], map(dense.get_submodule, first), strict=True):
        assert torch.equal(nonzero_mask(one), nonzero_mask(other))  # the same mask, other values
        assert not torch.equal(one, other)
        assert base == "sparsegpt" or torch.equal(one, original.weight * (one != 0))
    for one, other in zip(weights["+swap"], map(dense.get_submodule, first), strict=True):
        assert torch.equal(one, other.weight * (one != 0))  # exchanges change no value
    for report in reports.values():
        assert report.sparsity == pytest.approx(reports[""].sparsity, abs=1e-6)
    if pattern == "2:4":
        assert spp.sparsity(models["+swap+lsq"]).pattern == "2:4"


def test_the_comparison_can_fail() -> None:
    model, ids = _model("llama"), _ids()
    one = _literal(copy.deepcopy(model), projections(model), ids, _wanda)
    other = _literal(copy.deepcopy(model), projections(model), ids[:1], _wanda)
    assert not torch.equal(one.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_the_reported_error_is_the_output_error() -> None:
    model, ids = tiny_llama(), _ids(vocabulary=256)
    read: list[torch.Tensor] = []
    layer = model.model.layers[0].mlp.up_proj
    dense = layer.weight.detach().clone()
    hook = layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(ids)
    hook.remove()
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruned = copy.deepcopy(model)
        reported = prune(pruned, method, "2:4", ids).layers["model.layers.0.mlp.up_proj"]
        x, now = read[0].reshape(-1, 64), pruned.model.layers[0].mlp.up_proj.weight
        error = float(((x @ (dense - now).T).norm() / (x @ dense.T).norm()).detach())
        assert reported.relative_error == pytest.approx(error, rel=1e-3)
        assert reported.tokens == 120


def test_magnitude_needs_no_calibration_and_reports_no_error() -> None:
    model, expected = tiny_llama(), prune_nm_(tiny_llama())
    report = prune(model, "magnitude", "2:4")
    for name, module in projections(expected).items():
        assert torch.equal(nonzero_mask(model.get_submodule(name).weight), nonzero_mask(module.weight))
        assert report.layers[name].relative_error is None
    assert (report.windows, report.seqlen) == (0, 0)


def test_the_report_is_frozen_and_serialisable() -> None:
    report = prune(tiny_llama(), "wanda", 0.5, _ids(), seed=3)
    values = json.loads(json.dumps(report.to_dict()))
    assert list(values["layers"]) == list(report.layers)
    first = values["layers"]["model.layers.0.self_attn.q_proj"]
    assert (first["shape"], first["pattern"], first["sparsity"], first["note"]) == ([64, 64], "0.5", 0.5, "")
    assert (values["pattern"], values["windows"], values["seqlen"], values["seed"]) == ("0.5", 5, 24, 3)
    with pytest.raises(AttributeError):
        report.seed = 4  # type: ignore[misc]
    assert isinstance(report, PruneReport)


def test_patterns_by_name() -> None:
    model = tiny_llama()
    pattern = {"down_proj": "1:4", r".*\.0\.mlp\..*": 0.75, ".*": "2:4"}
    report = prune(model, "wanda", pattern, _ids())
    assert report.layers["model.layers.0.mlp.down_proj"].pattern == "1:4"
    assert report.layers["model.layers.0.mlp.up_proj"].pattern == "0.75"
    assert report.layers["model.layers.1.mlp.up_proj"].pattern == "2:4"
    assert is_nm(model.model.layers[1].mlp.down_proj.weight, 1, 4)
    assert report.pattern == {"down_proj": "1:4", r".*\.0\.mlp\..*": "0.75", ".*": "2:4"}


def test_experts_of_an_unknown_form_are_said() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.experts_table = nn.Parameter(torch.ones(2, 8, 8))
    with pytest.warns(SPPWarning, match=r"1 three-dimensional parameters.*experts_table.*stay dense"):
        prune(model, "wanda", "2:4", _ids())


def test_owl_gives_blocks_with_more_outliers_less_sparsity() -> None:
    model, ids = tiny_llama(num_hidden_layers=3), _ids()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[:, :2] *= 30
    dense, reads = copy.deepcopy(model), {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: reads.update({name: args[0]}))
        for name, module in projections(dense).items()
    ]
    dense(ids)
    shares = []
    for i in range(3):
        scores = torch.cat(
            [
                (module.weight.abs() * reads[name].flatten(0, -2).norm(dim=0)).flatten()
                for name, module in projections(dense).items()
                if f"layers.{i}." in name
            ]
        )
        shares.append(float((scores > 5 * scores.mean()).double().mean()))
    del hooks
    report = prune(model, "wanda", 0.6, ids, owl=spp.pruning.OWL(spread=0.1))
    relative = [(share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    for path, layer in report.layers.items():
        expected = 0.6 - 0.2 * (relative[int(path.split(".")[2])] - sum(relative) / 3)
        assert float(layer.pattern) == pytest.approx(expected, abs=1e-5)
        assert layer.sparsity == pytest.approx(expected, abs=0.02)
    assert report.sparsity == pytest.approx(0.6, abs=0.02)
    assert max(shares) == shares[1]
    by_magnitude = prune(tiny_llama(), "magnitude", 0.6, ids, owl=spp.pruning.OWL())
    assert len({layer.pattern for layer in by_magnitude.layers.values()}) == 2


def test_some_targets_only() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model)
    report = prune(model, "wanda", "2:4", _ids(), target_modules=["up_proj"], exclude_modules=r".*\.0\..*")
    assert list(report.layers) == ["model.layers.1.mlp.up_proj"]
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]


def test_embeddings_and_a_tied_head_stay() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    prune(model, "magnitude", 0.9)
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(TargetError, match="tied"):
        prune(model, "magnitude", 0.9, target_modules=["lm_head"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_other_dtypes(dtype: torch.dtype, method: str) -> None:
    model = tiny_llama().to(dtype)
    prune(model, method, "2:4", _ids())
    for module in projections(model).values():
        assert module.weight.dtype == dtype
        assert is_nm(module.weight, 2, 4)


def test_training_mode_and_gradients_come_back() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    prune(model, "wanda", "2:4", _ids())
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_accelerate_hooks() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, plain = tiny_llama(), tiny_llama()
    for block in model.model.layers:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
    forwards = [block.forward for block in model.model.layers]
    prune(model, "wanda", "2:4", _ids())
    prune(plain, "wanda", "2:4", _ids())
    assert [block.forward for block in model.model.layers] == forwards
    for name, module in projections(plain).items():
        assert torch.equal(model.get_submodule(name).weight, module.weight)


def test_pruning_again_adds_nothing_and_says_what_it_found(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_llama(), _ids()
    prune(model, "wanda", "2:4", ids)
    once = copy.deepcopy(model)
    with caplog.at_level(logging.INFO):
        report = prune(model, "wanda", "2:4", ids)
    assert "50.00 % of the weights were zero before; these stay zeros" in caplog.text
    assert report.layers["model.layers.0.mlp.up_proj"].sparsity_before == 0.5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, once.get_parameter(name))
    model = tiny_llama()
    prune(model, "magnitude", 0.5)
    other = copy.deepcopy(model)
    assert prune(other, "wanda", "2:4", ids).sparsity > 0.55  # zeros stay, where a group has three of them too
    caplog.clear()
    with caplog.at_level(logging.INFO):
        report = prune(model, "sparsegpt", "2:4", ids, keep_zeros=False)
    assert "may have been filled" in caplog.text and not report.keeps_zeros
    assert 0.5 <= report.sparsity < 0.53  # all but the first groups, which no error reaches


class _Routed(nn.Module):
    """Two experts; the second gets no token at all, the first every other one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.out = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        part = self.experts[0](hidden[:, ::2].contiguous())
        nothing = self.experts[1](hidden[:, :0])
        return hidden + self.out(torch.cat([part, nothing], 1)).repeat_interleave(2, 1)


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 16)
        self.blocks = nn.ModuleList([_Routed(), _Routed()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_a_model_of_ones_own_and_an_expert_without_tokens(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = _Plain()
    magnitude = spp.pruning.magnitude_mask(model.blocks[0].experts[1].weight, "2:4")
    report = prune(model, "wanda", "2:4", _ids(), target_modules="all-linear")
    assert list(report.layers) == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("experts.0", "experts.1", "out")]
    empty = report.layers["blocks.0.experts.1"]
    assert (empty.tokens, empty.relative_error) == (0, None)
    assert "no calibration token reached it" in empty.note
    assert "blocks.0.experts.1, blocks.1.experts.1: no calibration token reached it" in caplog.text
    assert torch.equal(nonzero_mask(model.blocks[0].experts[1].weight), magnitude)
    assert report.layers["blocks.0.experts.0"].tokens == 60


class _Fickle(nn.Module):
    """Both linears read one tensor in the first call, two different ones afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.calls = nn.Linear(16, 16), nn.Linear(16, 16), 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.one(hidden) + self.two(hidden if self.calls == 1 else hidden * 2)


def test_inputs_that_are_shared_only_at_first_are_told_apart() -> None:
    torch.manual_seed(0)
    model = _Plain()
    model.blocks = nn.ModuleList([_Fickle()])
    report = prune(model, "wanda", "2:4", _ids(200, 24), nsamples=200, target_modules="all-linear")
    assert {layer.tokens for layer in report.layers.values()} == {4800}
