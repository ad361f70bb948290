"""Reconstruction lowers the error of every region, keeps every zero bit for bit, and never makes a region worse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import spp
import spp.pruning.fitting as fitting
import spp.pruning.loop as loop
import spp.pruning.reconstruction as reconstruction
from spp.certifying.certificate import Certificate
from spp.errors import ConfigError, MaskError, NonFiniteError, SPPWarning
from spp.masks.patterns import nonzero_mask
from spp.models.targets import resolve_projections
from spp.pruning import prune, reconstruct
from spp.pruning.blocks import BlockRunner, find_blocks
from spp.pruning.disk import prune_checkpoint
from spp.pruning.fitting import relative_error
from spp.pruning.reconstruction import reconstruct_checkpoint
from spp.pruning.regions import Region, find_regions
from spp.pruning.values import Weights, _Value
from spp.wrapping.wrap import adapter_config
from tests.helpers.models import assert_same_model, moe_model, projections, prune_nm_, tiny_llama, tiny_tokenizer
from tests.helpers.tolerances import assert_same_bits

FAST = spp.Reconstruction(epochs=12, lr=2e-3, batch_size=16, held_out=0.25)
FASTER = spp.Reconstruction(epochs=2, lr=1e-3, batch_size=16, held_out=0.25)


def _llama(**options: Any) -> nn.Module:
    return tiny_llama(**{"hidden_size": 32, "intermediate_size": 48, **options})


def _ids(windows: int = 16, length: int = 24) -> Tensor:
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(1))


def _masks(model: nn.Module) -> dict[str, Tensor]:
    return {path: nonzero_mask(layer.weight) for path, layer in resolve_projections(model).items()}


def _assert_same_zeros(model: nn.Module, masks: dict[str, Tensor]) -> None:
    found = _masks(model)
    assert found.keys() == masks.keys()
    for path, mask in masks.items():
        assert torch.equal(found[path], mask), path


@pytest.mark.sampled(1)
@pytest.mark.parametrize("region", ["submodule", "block"])
@pytest.mark.parametrize("inputs", ["repaired", "dense"])
def test_every_error_falls_and_every_zero_stays(region: str, inputs: str) -> None:
    dense = _llama().double()
    model = prune_nm_(copy.deepcopy(dense))
    zeros, before = _masks(model), copy.deepcopy(model.state_dict())
    options = spp.Reconstruction(region=region, inputs=inputs, epochs=12, lr=2e-3, batch_size=16, held_out=0.25)
    report = reconstruct(model, dense, _ids(), options=options)
    names = ["self_attn", "mlp"] if region == "submodule" else [""]
    assert [[part.name for part in block.regions] for block in report.blocks] == [names, names]
    for block in report.blocks:
        assert all(part.after < part.before and "rolled" not in part.note for part in block.regions)
        assert block.before == pytest.approx(sum(part.before for part in block.regions) / len(names))
    assert report.after < report.before and (report.windows, report.held_out, report.seqlen) == (16, 4, 24)
    _assert_same_zeros(model, zeros)
    assert_same_model(dense, _llama().double())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    norms = {
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")
    }
    assert changed == {f"{path}.weight" for path in projections(model)} | norms


def test_the_error_is_that_of_the_outputs_on_held_out_windows() -> None:
    dense = _llama().double()
    model = prune_nm_(copy.deepcopy(dense))
    ids, seen = _ids(), dict[str, Tensor]()

    def outputs(one: nn.Module) -> Tensor:
        module = one.get_submodule("model.layers.0.post_attention_layernorm")  # which reads the sum
        handle = module.register_forward_pre_hook(lambda _, args: seen.update(y=args[0]))
        with torch.no_grad():
            one(ids[-4:])
        handle.remove()
        return seen["y"]

    target, before = outputs(dense), outputs(model)
    report = reconstruct(model, dense, ids, options=FAST)
    region = report.blocks[0].regions[0]
    for found, output in ((region.before, before), (region.after, outputs(model))):
        norm = target.square().sum(-1)
        ratios = (output - target).square().sum(-1) / (norm + 0.01 * norm.median())
        assert found == pytest.approx(float(ratios.mean().sqrt()), rel=1e-9)


def test_one_token_does_not_rule_the_error() -> None:
    target = torch.ones(8, 4)
    target[0] *= 1000  # as the first token's activations are
    output = target.clone()
    output[0] *= 1.1
    assert float(relative_error(output, target)) == pytest.approx(0.01 / 8, rel=1e-2)
    assert float((output - target).square().sum() / target.square().sum()) > 0.0099  # the lie: a plain mean square
    assert float(relative_error(torch.zeros(2, 4), torch.zeros(2, 4))) == 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("lr", [1e30, 30.0])
def test_a_region_that_gets_worse_is_rolled_back(lr: float) -> None:
    dense = _llama(num_hidden_layers=1)
    model = prune_nm_(copy.deepcopy(dense))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = copy.deepcopy(model)
    report = reconstruct(model, dense, _ids(), options=spp.Reconstruction(lr=lr, epochs=4, batch_size=4))
    for part in report.blocks[0].regions:
        assert part.note.startswith("rolled back: ") and part.after == part.before
        assert ("diverged" in part.note) == (lr == 1e30) or part.name == "mlp"
    assert_same_model(model, expected)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bits_the_masters_are_float32_and_what_is_stored_is_better(dtype: torch.dtype) -> None:
    dense = _llama(num_hidden_layers=1).to(dtype)
    model = prune_nm_(copy.deepcopy(dense))
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, 0.0, 1.0, 1.0])
    zeros, parameters = _masks(model), list(model.parameters())
    report = reconstruct(model, dense, _ids(), options=FAST)
    assert all(part.after < part.before for part in report.blocks[0].regions)
    _assert_same_zeros(model, zeros)
    assert torch.signbit(weight[0, :2]).tolist() == [True, False]
    assert all(one is other and one.dtype == dtype for one, other in zip(model.parameters(), parameters, strict=True))


def test_a_kept_weight_that_would_round_to_zero_is_rescued() -> None:
    linear = nn.Linear(4, 1, bias=False).half()
    linear.weight.data.copy_(torch.tensor([[1.0, -1.0, 0.0, -0.0]]))
    layer = resolve_projections(nn.ModuleDict({"up_proj": linear}))["up_proj"]
    weights = Weights(Region(linear, "", None, 0, [layer]))
    assert weights.count() == 2
    with weights.training():
        assert linear.weight.dtype == torch.float32 and linear.weight.requires_grad
        linear.weight.data.copy_(torch.tensor([[1e-30, -1e-30, 7.0, 7.0]]))  # and masked ones that were filled
        weights.keep()
        weights.kept = True
    smallest = torch.finfo(torch.float16).smallest_normal * 2**-10
    assert_same_bits(linear.weight.data, torch.tensor([[smallest, -smallest, 0.0, -0.0]]).half(), "weight")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "jetmoe", "deepseek_v3"])
def test_experts(architecture: str) -> None:
    dense = moe_model(architecture)
    model = copy.deepcopy(dense)
    prune(model, "magnitude", "2:4")
    zeros = _masks(model)
    routers = {n: p.clone() for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight"))}
    report = reconstruct(model, dense, _ids(), options=FAST)
    assert all(len(block.regions) == 2 and block.after < block.before for block in report.blocks)  # type: ignore[operator]
    _assert_same_zeros(model, zeros)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in routers.items())


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gpt2", [("attn", "ln_1"), ("mlp", "ln_2")]),
        ("opt", [("self_attn", "self_attn_layer_norm"), ("fc1", "final_layer_norm"), ("fc2", "activation_fn")]),
        ("gpt_neox", [("attention", "input_layernorm"), ("mlp", "post_attention_layernorm")]),
        ("phi", [("self_attn", None), ("mlp", None)]),  # one norm, which both read
        ("gemma2", [("self_attn", "input_layernorm"), ("mlp", "pre_feedforward_layernorm")]),
    ],
)
def test_regions_are_found_by_what_reads_what(architecture: str, expected: list[tuple[str, str | None]]) -> None:
    small: dict[str, Any] = {"vocab_size": 96, "max_position_embeddings": 64, "num_hidden_layers": 1, "hidden_size": 32}
    small |= {"num_attention_heads": 4, "intermediate_size": 48, "ffn_dim": 48, "n_layer": 1, "n_embd": 32, "n_head": 4}
    small |= {"word_embed_proj_dim": 32, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **small)).eval()
    layers = resolve_projections(model)
    root, blocks = find_blocks(model, list(layers))
    with torch.no_grad():
        found = find_regions(BlockRunner(model, root, blocks, _ids(2)), 0, layers.values(), "submodule")
    assert [(region.path, region.norm_path) for region in found] == expected
    residual = {"gpt2": ["attn", "mlp"], "opt": ["self_attn"]}
    assert [region.path for region in found if region.residual] == residual.get(architecture, [])
    assert sorted(layer.path for region in found for layer in region.projections) == sorted(layers)


# ---- In the pruner's own loop, in memory and streamed.


def _source(tmp_path: Path, dtype: torch.dtype = torch.float32) -> Path:
    _llama(num_hidden_layers=3).to(dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_is_what_in_memory_is_and_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    source = _source(tmp_path, dtype)
    report = prune_checkpoint(source, tmp_path / "out", "wanda", "2:4", _ids(), reconstruct=FASTER)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    other = prune(model, "wanda", "2:4", _ids(), reconstruct=FASTER)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), model)
    assert report.reconstruction is not None and other.reconstruction is not None
    errors = [[(part.before, part.after) for part in block.regions] for block in report.reconstruction.blocks]
    assert errors == [[(p.before, p.after) for p in block.regions] for block in other.reconstruction.blocks]
    assert {tensor.pattern for tensor in spp.verify(tmp_path / "out").tensors.values()} == {"2:4"}
    assert len(report.to_dict()["reconstruction"]["blocks"]) == 3
    fitted, real = [], loop.fit_block

    def dying(streams: Any, index: int, *rest: Any) -> Any:
        fitted.append(index)
        if fitted.count(2) == 1 and index == 2:
            raise KeyboardInterrupt
        return real(streams, index, *rest)

    monkeypatch.setattr(loop, "fit_block", dying)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "again", "wanda", "2:4", _ids(), reconstruct=FASTER)
    resumed = prune_checkpoint(source, tmp_path / "again", "wanda", "2:4", _ids(), reconstruct=FASTER)
    assert fitted == [0, 1, 2, 2] and _files(tmp_path / "again") == _files(tmp_path / "out")
    assert resumed.reconstruction is not None
    assert [block.after for block in resumed.reconstruction.blocks] == [b.after for b in report.reconstruction.blocks]


@pytest.mark.slow
def test_other_options_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fitted, real = _source(tmp_path), [], loop.fit_block

    def dying(streams: Any, index: int, *rest: Any) -> Any:
        fitted.append(index)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return real(streams, index, *rest)

    monkeypatch.setattr(loop, "fit_block", dying)
    options = spp.Reconstruction(epochs=1)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4", _ids(4), reconstruct=options)
    prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4", _ids(4), reconstruct=spp.Reconstruction(epochs=2))
    assert fitted == [0, 1, 0, 1, 2]


def test_a_pruned_checkpoint_is_reconstructed_from_disk_to_disk(tmp_path: Path) -> None:
    source = _source(tmp_path)
    prune_checkpoint(source, tmp_path / "pruned", "magnitude", "2:4")
    report = reconstruct_checkpoint(tmp_path / "pruned", tmp_path / "out", source, _ids(), options=FASTER)
    model, dense = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "pruned", source))
    expected = reconstruct(model, dense, _ids(), options=FASTER)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert [block.after for block in report.blocks] == [block.after for block in expected.blocks]
    spp.verify(tmp_path / "pruned", tmp_path / "out")
    spp.verify(tmp_path / "out")
    written = [Certificate.read(tmp_path / name) for name in ("pruned", "out")]
    assert [certificate.origin for certificate in written] == [str(source)] * 2
    base = written[1].base
    assert base is not None and base.name_or_path == str(tmp_path / "pruned")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "pruned"]


@pytest.mark.slow
def test_a_mask_that_was_filled_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(tmp_path)
    prune_checkpoint(source, tmp_path / "pruned", "magnitude", "2:4")
    monkeypatch.setattr(_Value, "keep", lambda self: self.best.copy_(self.value.detach()))
    monkeypatch.setattr(Weights, "mask_gradient", lambda self, parameter: None)
    with pytest.raises(MaskError, match=r"would change the zeros of model\.layers\.0\.mlp"):
        reconstruct_checkpoint(tmp_path / "pruned", tmp_path / "out", source, _ids(), options=FASTER)
    monkeypatch.setattr("spp.pruning.fitting.pack_bits", lambda weight: torch.zeros(1))
    with pytest.raises(MaskError, match="768 became non-zero"):
        reconstruct_checkpoint(tmp_path / "pruned", tmp_path / "out", source, _ids(), options=FASTER)
    assert not (tmp_path / "out").exists()
    model, dense = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "pruned", source))
    reconstruct(model, dense, _ids(), options=FASTER)
    with pytest.raises(MaskError):
        spp.verify(tmp_path / "pruned", model)


# ---- An adapter in place of the weights.

ADAPTER = spp.Reconstruction(train="adapter", rule="hira", r=4, epochs=3, batch_size=4, held_out=0.25)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {path: value.clone() for path, value in model.named_parameters()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rule", ["spp", "hira", "masked_lora"])
def test_an_adapter_is_trained_beside_frozen_weights(rule: str) -> None:
    dense = _llama().double()
    model = prune_nm_(copy.deepcopy(dense))
    before, flags = _parameters(model), {path: p.requires_grad for path, p in model.named_parameters()}
    lr = 5e-4 if rule == "masked_lora" else None  # which adds, where the others scale
    options = spp.Reconstruction(train="adapter", rule=rule, r=4, epochs=6, batch_size=4, held_out=0.25, lr=lr)
    report = reconstruct(model, dense, _ids(), options=options)
    for block in report.blocks:
        assert all(part.after < part.before and part.trained and "rolled" not in part.note for part in block.regions)
    config = adapter_config(model)
    assert (config.rule, config.r, config.scaling, config.seed) == (rule, 4, 2.0, 0)
    found, trained = _parameters(model), {id(p) for p in spp.adapter_parameters(model)}
    assert all(torch.equal(found[path], value) for path, value in before.items())  # norms and biases too
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained and not any(
        p.grad is not None for p in model.parameters()
    )
    ids, seen = _ids(), dict[str, Tensor]()

    def second(one: nn.Module) -> Tensor:  # what the second block reads
        handle = one.model.layers[1].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
        with torch.no_grad():
            one(ids[-4:])
        handle.remove()
        return seen["x"]

    target, adapted = second(dense), second(model)
    assert float(relative_error(adapted, target).sqrt()) == pytest.approx(
        report.blocks[0].regions[1].after, rel=1e-9
    )  # of what the wrapped model gives, and not of what was trained and thrown away
    spp.unwrap(model)
    assert_same_model(model, prune_nm_(_llama().double()))
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags


def test_a_model_whose_adapter_cannot_be_trained_is_left_as_it_was() -> None:
    dense = _llama()
    model = prune_nm_(copy.deepcopy(dense))
    with pytest.raises(ConfigError, match=r"k_proj: r = 24 does not fit .* lower r"):
        reconstruct(model, dense, _ids(2), options=spp.Reconstruction(train="adapter", r=24))
    dense.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.full((32,), float("nan")))
    with pytest.raises(NonFiniteError, match=r"layers\.1 holds NaN or infinity; ((?!repaired).)*$"):
        reconstruct(model, dense, _ids(2), options=ADAPTER)
    assert_same_model(model, prune_nm_(_llama()))
    with pytest.raises(ConfigError, match="reconstruct= is to train an adapter"):
        prune(dense, "wanda", "2:4", _ids(), reconstruct=ADAPTER)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_an_adapter_of_experts(architecture: str) -> None:
    dense = moe_model(architecture)
    model = copy.deepcopy(dense)
    prune(model, "magnitude", "2:4")
    expected = copy.deepcopy(model)
    report = reconstruct(model, dense, _ids(), options=ADAPTER)
    assert all(block.after < block.before for block in report.blocks)  # type: ignore[operator]
    assert_same_model(spp.unwrap(model), expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_streamed_adapter_has_the_bytes_of_one_in_memory_and_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    source, pruned = _source(tmp_path, dtype), tmp_path / "pruned"
    prune_checkpoint(source, pruned, "magnitude", "2:4")
    report = reconstruct_checkpoint(pruned, tmp_path / "out", source, _ids(), options=ADAPTER)
    model, dense = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (pruned, source))
    expected = reconstruct(model, dense, _ids(), options=ADAPTER)
    assert [block.after for block in report.blocks] == [block.after for block in expected.blocks]
    spp.save_adapter(model, tmp_path / "memory")
    assert _files(tmp_path / "out") == _files(tmp_path / "memory")
    fitted, real = [], reconstruction.fit_block

    def dying(streams: Any, index: int, *rest: Any) -> Any:
        fitted.append(index)
        if fitted.count(2) == 1 and index == 2:
            raise KeyboardInterrupt
        return real(streams, index, *rest)

    monkeypatch.setattr(reconstruction, "fit_block", dying)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_checkpoint(pruned, tmp_path / "again", source, _ids(), options=ADAPTER)
    reconstruct_checkpoint(pruned, tmp_path / "again", source, _ids(), options=ADAPTER)
    assert fitted == [0, 1, 2, 2] and _files(tmp_path / "again") == _files(tmp_path / "out")
    spp.merge_checkpoint(pruned, tmp_path / "again", tmp_path / "merged")
    spp.verify(pruned, tmp_path / "merged")
    loaded = spp.load_adapter(AutoModelForCausalLM.from_pretrained(pruned, dtype="auto"), tmp_path / "out")
    spp.merge(loaded)
    assert_same_model(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto"))
    names = ["again", "memory", "merged", "model", "out", "pruned"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


# ---- What a region keeps.


def test_examples_that_do_not_fit_are_computed_anew_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, runs = _llama(num_hidden_layers=1), list[int]()
    real = BlockRunner.visit
    monkeypatch.setattr(BlockRunner, "visit", lambda self, *rest: (runs.append(1), real(self, *rest))[1])
    made = {}
    for room in (fitting._KEPT, 0):
        monkeypatch.setattr(fitting, "_KEPT", room)
        monkeypatch.setattr(Region, "numel", lambda self: 0)
        runs.clear()
        model = prune_nm_(copy.deepcopy(dense))
        reconstruct(model, dense, _ids(), options=FASTER)
        made[room] = model.state_dict(), len(runs)
    (one, kept), (other, anew) = made.values()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert kept == 1 + 2 * 2 + 2 < anew  # regions are found; two models for the attention, one for the MLP, two batches


# ---- Bad input.


def test_one_window_cannot_be_held_out() -> None:
    dense = _llama(num_hidden_layers=1)
    model = prune_nm_(copy.deepcopy(dense))
    with pytest.warns(SPPWarning, match="one calibration window, so that none is held out"):
        report = reconstruct(model, dense, _ids(1), options=spp.Reconstruction(epochs=2))
    assert report.held_out == 0 and report.after < report.before
    with pytest.warns(SPPWarning, match="one calibration window"):
        prune(_llama(num_hidden_layers=1), "wanda", "2:4", _ids(1), reconstruct=spp.Reconstruction(epochs=1))


@pytest.mark.parametrize(
    ("dense", "complaint"),
    [
        ({"intermediate_size": 96}, r"gate_proj is \(48, 32\) in the pruned model and \(96, 32\)"),
        ({"num_hidden_layers": 3}, "has 2 blocks in model.layers, 3 has"),
        ({"num_hidden_layers": 1}, "layers.1.self_attn.q_proj is .* in the pruned model and not there"),
        ({"vocab_size": 128}, "a vocabulary of 128 tokens and the pruned model one of 256"),
    ],
)
def test_another_model_is_not_the_dense_one(dense: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        reconstruct(prune_nm_(_llama()), _llama(**dense), _ids(2))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    source, pruned = _source(tmp_path), tmp_path / "pruned"
    prune_checkpoint(source, pruned, "magnitude", "2:4")
    path = pruned / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"ä"'))
    with pytest.raises(ConfigError, match="has another tokenizer"):
        reconstruct_checkpoint(pruned, tmp_path / "out", source, _ids())


def test_what_makes_no_sense_is_refused() -> None:
    model = _llama(num_hidden_layers=1)
    with pytest.raises(ConfigError, match="is the pruned model itself"):
        reconstruct(model, model, _ids())
    with pytest.raises(ConfigError, match="needs calibration data"):
        prune(model, "magnitude", "2:4", reconstruct=spp.Reconstruction())
    with pytest.raises(ConfigError, match="reconstruct is True"):
        prune(model, "wanda", "2:4", _ids(), reconstruct=True)  # type: ignore[arg-type]
    wrong = ({"region": "layer"}, {"train": "all"}, {"rule": "hira"}, {"r": 4}, {"scaling": 1.0})  # without an adapter
    for options in (*wrong, {"epochs": 0}, {"lr": 0}, {"held_out": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            spp.Reconstruction(**options)  # type: ignore[arg-type]


def test_a_region_without_a_value_to_train_is_left_alone() -> None:
    dense = _llama(num_hidden_layers=1)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for projection in projections(model).values():
            projection.weight.zero_()
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(model.model.layers[0], name, nn.Identity())
    for region in reconstruct(model, dense, _ids(2)).blocks[0].regions:
        assert (region.trained, region.steps, region.before == region.after) == (0, 0, True)


def test_defaults_fit_the_data() -> None:
    options = spp.Reconstruction()
    for windows, length, expected in ((16, 512, (14, 2, 5)), (128, 2048, (112, 16, 3)), (2, 32, (1, 1, 60))):
        train, held = options.split(windows, length)
        assert (sum(train), sum(held), options.epochs_of(len(train))) == expected
        assert len(train) * options.epochs_of(len(train)) >= 60
