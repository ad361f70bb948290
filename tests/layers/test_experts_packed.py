"""Fused experts on packed weights: bit for bit the dense model, one expert's block decoded at a time."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import spp
from spp.errors import ConfigError, TargetError, WrapError
from spp.layers.experts import ExpertsForward, PackedExperts, SPPExperts, pack_experts
from spp.masks.patterns import nonzero_mask
from spp.models.expert_products import set_experts_implementation
from spp.models.projection import find_projections
from spp.packing.model import packed_layers
from spp.weights import PackedStack
from spp.weights.packed import matrix
from spp.wrapping.wrap import adapter_layers
from tests.helpers.made import Made
from tests.helpers.models import MOE_ARCHITECTURES, assert_same_model, moe_model, train_steps
from tests.helpers.tolerances import assert_matches, assert_same_bits

GPT2: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96, "n_positions": 64}
TRANSPOSED = ["mixtral", "gpt_oss"]  # (E, out, in) and (E, in, out)


def pruned(architecture: str, pattern: str | float = "2:4", dtype: torch.dtype = torch.float32) -> Any:
    """A pruned model without −0.0: packing does not keep its sign."""
    if architecture == "gpt2":  # Conv1D, (in, out)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2)).eval()
    else:
        model = moe_model(architecture)
    spp.prune(model, "magnitude", pattern)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.0)
    return model.to(dtype)


def ids(rows: int = 4, length: int = 16) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(ids(), use_cache=False).logits


def wrapped(base: Any, **options: Any) -> Any:
    """A wrapped copy with an adapter that changes something.

    An untrained one multiplies by W as it lies, and of a weight with inputs first a packed one lies otherwise: another
    order of sums on some CPUs. W_eff is built alike from either.
    """
    model = spp.wrap(copy.deepcopy(base), r=4, seed=0, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.spp_beta.copy_(0.1 * torch.randn(layer.spp_beta.shape, generator=generator))
    return model


def train(model: Any, steps: int = 3) -> list[float]:
    torch.manual_seed(7)
    model.train()
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=2e-2)
    losses = train_steps(model, optimizer, steps, input_ids=ids(), labels=ids(), use_cache=False)
    model.eval()
    return losses


def assert_same_model_and_attributes(found: nn.Module, expected: nn.Module) -> None:
    assert_same_model(found, expected)
    assert [attributes(m) for m in found.modules()] == [attributes(m) for m in expected.modules()]


def assert_same_report(found: Any, expected: Any) -> None:
    """Counts are the same; norms are sums, whose order is that in which a weight lies."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same_report(found[key], expected[key])
    else:
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)


def attributes(module: nn.Module) -> list[str]:
    """Nothing of ours is left but what a merge notes for the certificate."""
    return sorted(name for name in module.__dict__ if name != "_spp_base")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ["gpt2", *MOE_ARCHITECTURES])
def test_packed_is_the_dense_model_bit_for_bit(architecture: str) -> None:
    base = pruned(architecture)
    dense, packed = wrapped(base), wrapped(base, packed=True)
    assert list(adapter_layers(packed)) == list(adapter_layers(dense))
    assert all(layer.packed_layout is not None for layer in adapter_layers(packed).values())
    projections = {p.parameter_path for p in find_projections(base) if p.path in adapter_layers(dense)}
    assert not projections & dict(packed.named_parameters()).keys()
    losses = train(dense)
    assert losses[-1] < losses[0]
    assert train(packed) == losses
    for key, tensor in spp.adapter_state_dict(dense).items():
        assert_same_bits(spp.adapter_state_dict(packed)[key], tensor, key)
    tuned = logits(dense)
    assert_same_bits(logits(packed), tuned)
    twin = copy.deepcopy(packed)
    with spp.disabled(packed):
        assert_matches(logits(packed), logits(base).double(), torch.float32)
    assert spp.sparsity(packed).to_dict() == spp.sparsity(base).to_dict()
    assert spp.verify(base, packed).pattern == "2:4"

    reports = [spp.merge(model) for model in (dense, packed)]
    assert_same_report(reports[1].to_dict(), reports[0].to_dict())
    assert packed._spp_base == dense._spp_base
    assert_same_model_and_attributes(packed, dense)
    assert_same_bits(logits(twin), tuned)  # the copy has everything of its own
    assert_same_model_and_attributes(spp.unwrap(twin), base)


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
@pytest.mark.sampled(3)
@pytest.mark.parametrize("architecture", ["gpt2", *MOE_ARCHITECTURES])
def test_pack_unpack_and_wrap_in_between(architecture: str) -> None:
    base = pruned(architecture)
    model = spp.pack(copy.deepcopy(base))
    layers = packed_layers(model)
    assert {p for p, layer in layers.items() if isinstance(layer, PackedExperts)} == {
        p.path for p in find_projections(base) if p.fused
    }
    assert model.get_memory_footprint() < 0.7 * base.get_memory_footprint()
    assert_matches(logits(model), logits(base).double(), torch.float32)
    assert spp.sparsity(model).to_dict() == spp.sparsity(base).to_dict()
    assert spp.verify(base, model).pattern == "2:4"
    with pytest.raises(ConfigError, match=r"is packed: pass packed=True, or call spp\.unpack"):
        spp.wrap(model, r=4)
    with pytest.raises(WrapError, match=r"is packed: spp\.unpack"):
        spp.prune(model, "magnitude", "1:4")
    spp.wrap(model, r=4, packed=True)
    with pytest.raises(WrapError, match="wrapped"):
        spp.pack(model)
    spp.unwrap(model)
    assert list(packed_layers(model)) == list(layers)
    assert [packed_layers(model)[path] is layer for path, layer in layers.items()]
    spp.pack(model)  # nothing left to pack
    assert_same_model_and_attributes(spp.unpack(model), base)
    spp.merge(spp.wrap(spp.pack(model), r=4, packed=True))  # an untrained adapter: no bit changes
    assert_same_model_and_attributes(model, base)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", TRANSPOSED)
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "any pattern"),
        ({}, "bfloat16"),
        ({}, "autocast"),
        ({"dropout": 0.3, "dropout_mode": "alpha"}, "reentrant"),
        ({"dropout": 0.3, "dropout_mode": "alpha"}, "checkpoint"),
        ({"dropout": 0.3}, "float64"),
    ],
    ids=str,
)
def test_training_in_every_other_way(architecture: str, options: dict[str, Any], how: str) -> None:
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(how, torch.float32)
    base = pruned(architecture, 0.5 if how == "any pattern" else "2:4", dtype)
    implementation = "eager" if how == "float64" else "grouped_mm"  # which does not know float64
    for module in base.modules():
        set_experts_implementation(module, implementation)
    results = []
    for packed in (False, True):
        model = wrapped(base, packed=packed, **options)
        if how in ("reentrant", "checkpoint"):
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            losses = train(model)
        results.append((losses, spp.adapter_state_dict(model), logits(model)))
    assert results[0][0][-1] < results[0][0][0]
    if how == "float64":  # a dense weight is multiplied whole in the branch without an adapter: other sums
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-12)
        return
    assert results[1][0] == results[0][0]
    for key, tensor in results[0][1].items():
        assert_same_bits(results[1][1][key], tensor, key)
    assert_same_bits(results[1][2], results[0][2])


@pytest.mark.parametrize("architecture", TRANSPOSED)
def test_the_paths_of_experts_products_stay(architecture: str) -> None:
    base = pruned(architecture)
    for form in ("eager", "grouped_mm", "batched_mm"):
        model = copy.deepcopy(base)
        for module in model.modules():
            set_experts_implementation(module, form)
        spp.pack(model)
        assert_matches(logits(model), logits(base).double(), torch.float32)
        assert model.config._experts_implementation == form
        spp.unpack(model)
        assert model.config._experts_implementation == form


def test_experts_without_tokens_and_a_part_of_the_weights() -> None:
    base = pruned("jetmoe")
    with torch.no_grad():
        base.model.layers[0].mlp.router.layer.weight[2:] = -9.0  # experts 2 and 3 see nothing
        base.model.layers[0].mlp.router.layer.weight[:2] = 0.0
    dense = spp.wrap(copy.deepcopy(base), r=4, seed=0, target_modules=["output_linear"])
    packed = spp.pack(copy.deepcopy(base))
    spp.wrap(packed, r=4, seed=0, target_modules=["output_linear"], packed=True)
    assert len(adapter_layers(packed)) == 4  # and the others stay packed without an adapter
    losses = train(dense)
    assert train(packed) == pytest.approx(losses, rel=1e-6)
    tuned = logits(packed)
    assert_matches(tuned, logits(dense).double(), torch.float32)
    before = copy.deepcopy(packed)
    spp.merge(packed)
    assert len(packed_layers(packed)) == 6  # input_linear and kv_proj
    assert_matches(logits(packed), tuned.double(), torch.float32)
    spp.unwrap(before)
    assert_same_model_and_attributes(spp.unpack(before), base)
    for module in packed.modules():
        if "output_linear" in getattr(module, "_modules", {}):
            assert "forward" not in module.output_linear.__dict__
            assert isinstance(module.input_linear.__dict__["forward"], ExpertsForward)


def test_no_tokens_at_all() -> None:
    base = pruned("mixtral")
    experts = base.model.layers[0].mlp.experts
    nothing = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)
    for form in ("eager", "grouped_mm"):
        set_experts_implementation(experts, form)
        spp.pack(base)
        assert experts(*nothing).shape == (0, 32)
        spp.unpack(base)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", TRANSPOSED)
def test_files_state_dicts_and_generation(architecture: str, tmp_path: Path) -> None:
    base = pruned(architecture)
    dense, packed = wrapped(base), wrapped(base, packed=True)
    for model in (dense, packed):
        train(model)
    for name, model in (("dense", dense), ("packed", packed)):
        spp.save_adapter(model, tmp_path / name)
    tensors = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("dense", "packed")]
    assert tensors[0] == tensors[1]
    expected = logits(packed)
    for start in (copy.deepcopy(base), spp.pack(copy.deepcopy(base)), spp.wrap(copy.deepcopy(base), r=4)):
        for name in ("packed", "dense"):
            loaded = spp.load_adapter(start if name == "packed" else copy.deepcopy(base), tmp_path / name)
            assert_same_bits(logits(loaded), expected)
    fresh = spp.load_adapter(copy.deepcopy(base), tmp_path / "packed")
    assert all(layer.packed_layout is not None for layer in adapter_layers(fresh).values())

    state = packed.state_dict()
    prefix = "model.layers.0.mlp.experts.down_proj"
    kinds = ("weight_values", "weight_codes", "spp_alpha", "spp_beta")
    assert {key for key in state if key.startswith(f"{prefix}.")} == {f"{prefix}.{kind}" for kind in kinds}
    other = spp.wrap(pruned(architecture), r=4, packed=True)
    with torch.no_grad():
        other.model.layers[0].mlp.experts._modules["down_proj"].weight_values.zero_()
    other.load_state_dict(state)
    assert_same_bits(logits(other), expected)
    wrong = {**state, f"{prefix}.weight_codes": torch.full_like(state[f"{prefix}.weight_codes"], 255)}
    with pytest.raises(RuntimeError, match=r"down_proj\.weight\[0\]: \d+ groups of 4 do not have 2 values"):
        other.load_state_dict(wrong)

    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = dense.generate(ids(2, 5), **options)
    assert torch.equal(packed.generate(ids(2, 5), **options), tokens)
    half = copy.deepcopy(packed).to(torch.bfloat16)
    experts = half.model.layers[0].mlp.experts
    assert experts.down_proj.dtype == experts._modules["down_proj"].weight_values.dtype == torch.bfloat16
    assert_same_bits(logits(half), logits(copy.deepcopy(dense).to(torch.bfloat16)))
    spp.merge(packed)
    spp.save_model(base, tmp_path / "base")
    spp.save_model(packed, tmp_path / "merged")
    assert spp.verify(tmp_path / "base", tmp_path / "merged").pattern == "2:4"
    spp.merge_checkpoint(tmp_path / "base", tmp_path / "packed", tmp_path / "streamed")
    streamed, merged = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("streamed", "merged"))
    assert streamed == merged


def test_a_merge_into_another_dtype_converts_what_stays_packed() -> None:
    for packed in (False, True):
        model = spp.pack(pruned("mixtral")) if packed else pruned("mixtral")
        spp.wrap(model, r=4, seed=0, target_modules=["gate_up_proj"], packed=packed)
        train(model)
        spp.merge(model, dtype=torch.bfloat16, rounding="stochastic", seed=3)
        if not packed:
            expected = model
            continue
        assert model.model.layers[0].mlp.experts._modules["down_proj"].weight_values.dtype == torch.bfloat16
        assert_matches(logits(model).float(), logits(expected).double(), torch.bfloat16, logits(expected).float())
        assert_same_model_and_attributes(spp.unpack(model), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_training_decodes_one_expert_at_a_time(architecture: str) -> None:
    model = spp.wrap(pruned(architecture), r=4, seed=0, packed=True).train()
    fused = [layer for layer in adapter_layers(model).values() if isinstance(layer, SPPExperts)]
    largest = max(layer.out_features * layer.in_features for layer in fused)
    with torch.no_grad():
        for layer in fused:
            layer.spp_beta.normal_(std=0.1)
    few = ids(1, 4)
    with Made() as seen:
        model(input_ids=few, labels=few, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in spp.adapter_parameters(model))
    assert seen.most <= largest
    with pytest.raises(AssertionError), Made() as seen:  # the check can fail
        _ = fused[0].weight
        assert seen.most <= largest


@pytest.fixture
def matrices_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what is packed, in order."""
    shapes: list[tuple[int, ...]] = []
    real = matrix.pack_tensor

    def recording(weight: Tensor, *rest: Any) -> Any:
        shapes.append(tuple(weight.shape))
        return real(weight, *rest)

    monkeypatch.setattr(matrix, "pack_tensor", recording)
    yield shapes


@pytest.mark.parametrize("convert", [spp.pack, lambda m: spp.wrap(m, r=4, packed=True)], ids=["pack", "wrap"])
@pytest.mark.parametrize("architecture", TRANSPOSED)
def test_converting_holds_one_dense_weight_at_a_time(
    architecture: str, convert: Any, matrices_packed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned(architecture)
    fused = [p for p in find_projections(model) if p.fused]
    weights = [weakref.ref(p.weight) for p in fused]
    del fused
    alive, real = [], PackedStack.pack.__func__  # type: ignore[attr-defined]

    def counting(cls: type, *args: Any, **options: Any) -> Any:
        alive.append(sum(w() is not None for w in weights))
        return real(cls, *args, **options)

    monkeypatch.setattr(PackedStack, "pack", classmethod(counting))
    with Made() as seen:
        convert(model)
    assert alive == [4, 3, 2, 1] and all(w() is None for w in weights)
    of_experts = [shape for shape in matrices_packed if shape in {(48, 32), (32, 24)}]
    assert len(of_experts) == 16 and {len(shape) for shape in matrices_packed} == {2}
    assert seen.most <= 4 * 48 * 32 // 2  # what is kept of a weight, and never the whole of a transposed one


def test_an_interrupted_wrap_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (pruned("mixtral"), spp.pack(pruned("mixtral"))):
        before, calls = copy.deepcopy(start), []
        real = SPPExperts.reset_parameters

        def interrupted(self: SPPExperts, *args: Any, real: Any = real, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            real(self, *args)

        monkeypatch.setattr(SPPExperts, "reset_parameters", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spp.wrap(start, r=4, packed=True)
        monkeypatch.setattr(SPPExperts, "reset_parameters", real)
        assert_same_model_and_attributes(start, before)
        assert_same_bits(logits(start), logits(before))


def test_what_cannot_be_packed_leaves_the_model_as_it_was() -> None:
    model = pruned("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(torch.ones(4, 32, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.experts\.down_proj is torch\.int8"):
        spp.pack(model)
    assert not packed_layers(model)
    config = AutoConfig.for_model("mixtral", **MOE_ARCHITECTURES["mixtral"])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    for convert in (spp.pack, lambda m, **names: spp.wrap(m, r=4, packed=True, **names)):
        with pytest.raises(ConfigError, match=r"experts\.gate_up_proj is on the meta device"):
            convert(empty, target_modules=["gate_up_proj"])


def test_saving_and_counting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = spp.pack(pruned("mixtral"), target_modules=["down_proj"])
    for save in (lambda: model.save_pretrained(tmp_path / "x"), lambda: spp.save_model(model, tmp_path / "x")):
        with pytest.raises(WrapError, match=r"is packed.*spp\.unpack"):
            save()
    spp.print_trainable_parameters(spp.wrap(spp.unpack(model), r=4, packed=True))
    spp.print_trainable_parameters(spp.wrap(pruned("mixtral"), r=4))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_pack_experts_keeps_every_bit() -> None:
    for architecture in TRANSPOSED:
        for projection in find_projections(pruned(architecture, 0.7)):
            if projection.fused:
                assert_same_bits(pack_experts(projection).dense(), projection.weight.detach())
                assert nonzero_mask(projection.weight).sum() == pack_experts(projection).values.numel()
