"""Fused experts inside PEFT: the arithmetic, files and merge of spp.wrap, several adapters, the mask."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import spp
from spp.errors import ConfigError, MaskError, NonFiniteError, TargetError
from spp.integrations.peft import SPPPeftConfig, SPPPeftExperts
from spp.integrations.peft.model import tuner_layers
from spp.masks.patterns import nonzero_mask
from spp.packing.model import packed_layers
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import moe_model
from tests.helpers.tolerances import LOGITS, assert_matches, assert_same_bits, error
from tests.integrations.helpers import logits, scatter, train

ARCHITECTURES = ["mixtral", "qwen3_moe", "gpt_oss", "jetmoe"]  # gpt_oss stores (E, in, out)


def sparse(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = moe_model(architecture)
    spp.prune(model, "magnitude", "2:4")
    return model.to(dtype)


def adapted(architecture: str, **options: Any) -> PeftModel:
    return get_peft_model(sparse(architecture), SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM", **options))


def experts(model: nn.Module) -> dict[str, SPPPeftExperts]:
    return {path: layer for path, layer in tuner_layers(model).items() if isinstance(layer, SPPPeftExperts)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_files_and_merge_are_those_of_wrap(architecture: str, tmp_path: Path) -> None:
    model, wrapped = adapted(architecture), spp.wrap(sparse(architecture), 4, seed=0)
    assert len(experts(model)) == (8 if architecture == "jetmoe" else 4)
    assert_same_bits(logits(model), logits(wrapped))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains and all("spp_" in name for name in trains)
    train(model)
    train(wrapped)
    layers = tuner_layers(model.get_base_model())
    assert list(layers) == list(adapter_layers(wrapped))
    for path, ours in adapter_layers(wrapped).items():
        assert_same_bits(layers[path].spp_alpha["default"], ours.spp_alpha, path)
        assert_same_bits(layers[path].spp_beta["default"], ours.spp_beta, path)
    tuned = logits(model)
    assert_same_bits(tuned, logits(wrapped))
    assert not torch.equal(tuned, logits(sparse(architecture)))

    model.save_pretrained(tmp_path / "theirs")
    spp.save_adapter(wrapped, tmp_path / "ours")
    name = "adapter_model.safetensors"
    assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert_same_bits(logits(spp.load_adapter(sparse(architecture), tmp_path / "theirs")), tuned)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(sparse(architecture), tmp_path / "ours", **options)
        assert_same_bits(logits(again), tuned)

    merged = model.merge_and_unload(safe_merge=True)
    spp.merge(wrapped)
    assert not experts(merged) and merged.state_dict().keys() == wrapped.state_dict().keys()
    before = sparse(architecture).state_dict()
    for key, tensor in merged.state_dict().items():
        assert_same_bits(tensor, wrapped.state_dict()[key], key)
        assert torch.equal(nonzero_mask(tensor), nonzero_mask(before[key])), key
    assert error(logits(merged), tuned) <= LOGITS[torch.float32]


def test_several_adapters() -> None:
    model = scatter(adapted("mixtral"))
    model.add_adapter("second", SPPPeftConfig(r=2, seed=1))
    scatter(model, "second", seed=1)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert_same_bits(logits(model), first)
    with model.disable_adapter():
        assert_same_bits(logits(model), logits(sparse("mixtral")))
    assert_same_bits(logits(model), first)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "sum")
    model.set_adapter("sum")
    both = logits(model)
    with torch.no_grad():
        for layer in experts(model).values():
            w = layer.weight
            u = [
                layer.spp_beta[n] * layer.spp_alpha[n].repeat_interleave(layer.out_features // r, dim=1)
                for n, r in (("default", 4), ("second", 2))
            ]
            expected = w * (1 + 2.0 * (0.5 * u[0] + 0.25 * u[1]))
            result = layer.merged_weight(["sum"])
            assert result is not None
            torch.testing.assert_close(result[0], expected, rtol=1e-6, atol=1e-7)
    errors = model.base_model.add_weighted_adapter(["default"], [1.0], "same", "svd")
    assert max(errors.values()) < 1e-3
    model.set_adapter("same")
    assert error(logits(model), first) <= LOGITS[torch.float32]
    model.delete_adapter("same")
    model.set_adapter("sum")
    assert_same_bits(logits(model), both)


def test_merging_in_place_and_back() -> None:
    model = scatter(adapted("qwen3_moe"))
    tuned = logits(model)
    weights = {path: layer.weight.clone() for path, layer in experts(model).items()}
    model.merge_adapter(safe_merge=True)
    assert error(logits(model), tuned) <= LOGITS[torch.float32]
    for path, layer in experts(model).items():
        assert torch.equal(nonzero_mask(layer.weight), nonzero_mask(weights[path]))
        assert not torch.equal(layer.weight, weights[path])
    model.unmerge_adapter()
    for path, layer in experts(model).items():
        assert_same_bits(layer.weight, weights[path], path)
    assert_same_bits(logits(model), tuned)
    assert_same_bits(logits(model.unload()), logits(sparse("qwen3_moe")))


def test_a_bad_adapter_or_mask_leaves_the_model(tmp_path: Path) -> None:
    model = scatter(adapted("mixtral"))
    before = copy.deepcopy(model.state_dict())
    last = list(experts(model).values())[-1]
    with torch.no_grad():
        last.spp_beta["default"][0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"experts\.down_proj\[0\]\.spp_beta"):
        model.merge_and_unload(safe_merge=True)
    for key, tensor in model.state_dict().items():
        if "spp_" not in key:
            assert_same_bits(tensor, before[key], key)
    good = scatter(adapted("mixtral"))
    good.save_pretrained(tmp_path)
    other = sparse("mixtral")
    spp.prune(other, "magnitude", "1:4")
    with pytest.raises(MaskError, match="experts"):
        PeftModel.from_pretrained(other, tmp_path)


def test_sixteen_bits_copies_and_targets() -> None:
    model = scatter(adapted("mixtral", target_modules=["gate_up_proj"]))
    assert len(experts(model)) == len(tuner_layers(model)) == 2
    model.to(torch.bfloat16)
    layer = next(iter(experts(model).values()))
    assert layer.weight.dtype == torch.bfloat16 and layer.spp_alpha["default"].dtype == torch.float32
    assert_same_bits(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_packed_experts_are_the_dense_ones(architecture: str, tmp_path: Path) -> None:
    dense, packed = adapted(architecture), adapted(architecture, packed=True)
    assert all(layer.packed_layout is not None for layer in experts(packed).values())
    assert not [name for name, p in packed.named_parameters() if p.dim() == 3 and "spp" not in name]
    assert_matches(logits(packed), logits(dense).double(), torch.float32)  # W as it lies: packed, never inputs first
    for model in (dense, packed):  # from here on W_eff, built alike from either
        train(scatter(model))
    for path, layer in tuner_layers(packed).items():
        assert_same_bits(layer.spp_alpha["default"], tuner_layers(dense)[path].spp_alpha["default"], path)
        assert_same_bits(layer.spp_beta["default"], tuner_layers(dense)[path].spp_beta["default"], path)
    tuned = logits(packed)
    assert_matches(tuned, logits(dense).double(), torch.float32)  # dense linears keep W_eff for so few tokens
    packed.save_pretrained(tmp_path)
    for base, options in ((spp.pack(sparse(architecture)), {}), (sparse(architecture), {"low_cpu_mem_usage": True})):
        assert_same_bits(logits(PeftModel.from_pretrained(base, tmp_path, **options)), tuned)

    for model in (dense, packed):
        model.merge_adapter(safe_merge=True)
    for path, layer in experts(packed).items():
        assert layer.packed_layout is None
        assert_same_bits(layer.weight, experts(dense)[path].weight, path)
        assert_same_bits(layer.base_weight(), experts(dense)[path].base_weight() + 0.0, path)
    packed.unmerge_adapter()
    assert_same_bits(logits(packed), tuned)
    half = logits(copy.deepcopy(packed).to(torch.bfloat16))
    packed.merge_adapter()
    packed.to(torch.bfloat16)
    packed.unmerge_adapter()
    assert all(layer.held().dtype == torch.bfloat16 for layer in experts(packed).values())
    assert_same_bits(logits(packed), half)

    again = PeftModel.from_pretrained(sparse(architecture), tmp_path)
    plain, before = copy.deepcopy(again).unload(), sparse(architecture).state_dict()
    merged, expected = again.merge_and_unload(safe_merge=True).state_dict(), dense.unload().state_dict()
    assert list(merged) == list(expected) == list(plain.state_dict())
    for key, tensor in merged.items():
        assert_same_bits(tensor + 0.0, expected[key] + 0.0, key)
        assert_same_bits(plain.state_dict()[key] + 0.0, before[key] + 0.0, key)


def test_what_was_packed_before_stays_packed() -> None:
    model = get_peft_model(spp.pack(sparse("mixtral")), SPPPeftConfig(r=4, packed=True))
    plain = model.unload()
    assert len(packed_layers(plain)) == 12
    assert_same_bits(logits(spp.unpack(plain)), logits(sparse("mixtral")))
    with pytest.raises(ConfigError, match=r"is packed: pass packed=True"):
        get_peft_model(spp.pack(sparse("mixtral")), SPPPeftConfig(r=4))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "jetmoe"])
def test_transformers_own_loader(architecture: str, tmp_path: Path) -> None:
    wrapped = train(spp.wrap(sparse(architecture), 4, seed=0))
    spp.save_adapter(wrapped, tmp_path / "ours")
    model = sparse(architecture)
    result = model.load_adapter(str(tmp_path / "ours"))
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_bits(logits(model), logits(wrapped))
    for path, layer in tuner_layers(model).items():
        assert model.get_submodule(path) is layer
    with pytest.raises(AttributeError, match="nothing"):
        model.get_submodule("model.nothing")
    model.save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert_same_bits(logits(copy.deepcopy(model)), logits(wrapped))
    model.disable_adapters()
    assert_same_bits(logits(model), logits(sparse(architecture)))


def test_unloading_leaves_nothing() -> None:
    plain = sparse("mixtral")
    kept = [sorted(module.__dict__) for module in plain.modules()]
    unloaded = get_peft_model(plain, SPPPeftConfig(r=4)).unload()
    assert unloaded is plain and [sorted(module.__dict__) for module in unloaded.modules()] == kept


def test_spp_leaves_them_alone() -> None:
    model = scatter(adapted("mixtral", target_modules=["gate_up_proj"]))
    tuned = logits(model)
    for change in (lambda m, **names: spp.wrap(m, 4, **names), spp.pack):
        with pytest.raises(TargetError, match=r"gate_up_proj has a SPPPeftExperts beside it already"):
            change(model, target_modules=["gate_up_proj"])
        assert_same_bits(logits(model), tuned)
