"""Merging in PEFT: the bits of spp.merge, exact unmerging, several adapters, weighted sums; zeros stay zeros."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import spp
from spp.errors import AdapterError, ConfigError, MaskError, NonFiniteError, SPPWarning
from spp.integrations.peft import SPPPeftConfig
from spp.integrations.peft.model import tuner_layers
from spp.kernels import use_kernels
from spp.rules.spp import row_groups
from tests.helpers.models import projections
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros
from tests.integrations.helpers import IDS, Q0, logits, pruned, scatter, train

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def two_adapters(dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A model with the adapters "default" (r = 4, s = 2, all projections) and "b" (r = 3, s = 0.5, fewer)."""
    model = get_peft_model(pruned(dtype), SPPPeftConfig(r=4, **options))  # type: ignore[arg-type]
    model.add_adapter("b", SPPPeftConfig(r=3, scaling=0.5, target_modules=["q_proj", "up_proj"], **options))  # type: ignore[arg-type]
    return scatter(scatter(model), "b", seed=9)  # type: ignore[return-value]


def change(model: PeftModel, path: str, adapter: str) -> Tensor:
    """(s·β) · A of one adapter, by the formula."""
    layer = tuner_layers(model.get_base_model())[path]
    alpha, beta = layer.spp_alpha[adapter].detach(), layer.spp_beta[adapter].detach()
    scaling = model.peft_config[adapter].scaling
    return (beta * scaling) * alpha[row_groups(len(beta), len(alpha))]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix(".base_layer"): m.weight.detach().clone() for name, m in projections(model).items()}  # type: ignore[operator]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_and_unload_stores_what_spp_merge_stores(dtype: torch.dtype, safe: bool, tmp_path: Path) -> None:
    wrapped = train(spp.wrap(pruned(dtype), 4, seed=0))
    spp.save_adapter(wrapped, tmp_path / "adapter")
    model = PeftModel.from_pretrained(pruned(dtype), tmp_path / "adapter")
    unmerged = logits(model)
    layers = tuner_layers(model.get_base_model())
    merged = model.merge_and_unload(safe_merge=safe)
    report = spp.merge(wrapped)
    assert report.layers == {path: layer.spp_merge for path, layer in layers.items()}
    assert type(merged) is type(wrapped) and not hasattr(merged, "peft_config")
    for (name, ours), theirs in zip(wrapped.state_dict().items(), merged.state_dict().values(), strict=True):
        assert_same_bits(theirs, ours, name)
    assert report.sparsity_report.pattern == spp.sparsity(merged).pattern == "2:4"
    assert_matches(logits(merged).float(), unmerged.double(), torch.float32)
    spp.save_model(merged, tmp_path / "theirs")
    spp.save_model(wrapped, tmp_path / "ours")
    assert (tmp_path / "theirs/sparsity.json").read_bytes() == (tmp_path / "ours/sparsity.json").read_bytes()
    spp.verify(pruned(dtype), tmp_path / "theirs")


@pytest.mark.parametrize("beta", [0.0, 2.0**-13])
def test_adapters_that_change_nothing_are_said_to_as_spp_merge_says_it(beta: float) -> None:
    model = get_peft_model(pruned(torch.bfloat16), SPPPeftConfig(r=4))
    wrapped = spp.wrap(pruned(torch.bfloat16), 4)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *wrapped.named_parameters()]:
            if "spp_beta" in name:
                parameter.fill_(beta)
    said = []
    for merge in (model.merge_and_unload, lambda: spp.merge(wrapped)):
        with pytest.warns(SPPWarning, match="changes no weight") as found:
            merge()
        said.append([str(one.message) for one in found])
    assert said[0] == said[1] and len(said[0]) == 1
    assert ("β is zero everywhere" in said[0][0]) == (beta == 0)


def test_unmerging_puts_the_same_weights_back() -> None:
    model = two_adapters(torch.bfloat16)
    before, tuned = weights(model.get_base_model()), logits(model)
    parameter = model.get_base_model().get_submodule(Q0).base_layer.weight
    address = parameter.data_ptr()
    model.merge_adapter(safe_merge=True)
    assert model.get_base_model().get_submodule(Q0).merged_adapters == ["default"]
    assert not torch.equal(parameter, before[Q0])
    assert_same_zeros(parameter, before[Q0])
    model.unmerge_adapter()
    assert parameter.data_ptr() == address
    for path, weight in weights(model.get_base_model()).items():
        assert_same_bits(weight, before[path], path)
    assert_same_bits(logits(model), tuned)
    model.merge_adapter()
    with model.disable_adapter():  # PEFT unmerges where a merged adapter is disabled
        assert_same_bits(logits(model), logits(pruned(torch.bfloat16)))
    assert_same_bits(logits(model), tuned)


def test_switching_adding_and_deleting() -> None:
    model = two_adapters()
    first = logits(model)
    model.set_adapter("b")
    second = logits(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trains) == 8 and all(name.endswith(".b") for name in trains)
    plain = pruned()
    with torch.no_grad():
        for path in [p for p in projections(plain) if p.endswith(("q_proj", "up_proj"))]:
            weight = plain.get_submodule(path).weight
            weight.mul_(1 + change(model, path, "b"))  # type: ignore[operator]
    assert_same_bits(second, logits(plain))
    model.set_adapter("default")
    assert_same_bits(logits(model), first)
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert_same_bits(logits(model), second)
    assert not [name for name in model.state_dict() if "default" in name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_active_adapters_are_one_sum_rounded_once(dtype: torch.dtype) -> None:
    model = two_adapters(dtype)
    model.base_model.set_adapter(["default", "b"])
    plain = pruned(dtype)
    with torch.no_grad():
        for path in projections(plain):
            weight = plain.get_submodule(path).weight
            total = change(model, path, "default")
            if path.endswith(("q_proj", "up_proj")):
                total = total + change(model, path, "b")
            weight.copy_((weight.float() * (1 + total)).to(dtype))  # type: ignore[operator]
    assert_same_bits(logits(model), logits(plain))
    one_by_one = copy.deepcopy(model)
    merged = model.merge_and_unload(safe_merge=True)
    for (name, ours), theirs in zip(plain.state_dict().items(), merged.state_dict().values(), strict=True):
        assert_same_bits(theirs, ours, name)
    one_by_one.base_model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        one_by_one.base_model.merge_adapter(["b"])
    merged = one_by_one.unload()
    for (name, ours), theirs in zip(plain.state_dict().items(), merged.state_dict().values(), strict=True):
        assert_same_bits(theirs, ours, name)


def test_two_active_adapters_train_together() -> None:
    model = two_adapters(dropout=0.1)
    model.base_model.set_adapter(["default", "b"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 36
    train(model, steps=1)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    layer = tuner_layers(model.get_base_model())[Q0]
    layer.spp_dropout["b"] = (0.5, "input")
    with pytest.raises(ConfigError, match="different dropout"):
        model.train()(input_ids=IDS)


def test_a_stack_is_the_weighted_sum_exactly() -> None:
    model = two_adapters(torch.bfloat16)
    errors = model.add_weighted_adapter(["default", "b"], [0.75, -1.5], "sum")
    assert set(errors.values()) == {0.0} and len(errors) == 14
    model.set_adapter("sum")
    plain = pruned(torch.bfloat16)
    with torch.no_grad():
        for path in projections(plain):
            weight = plain.get_submodule(path).weight
            layer = tuner_layers(model.get_base_model())[path]
            total = torch.zeros(weight.shape)
            for adapter, scaling in (("default", 0.75 * 2.0), ("b", -1.5 * 0.5)):
                if adapter in layer.spp_alpha:
                    alpha, beta = layer.spp_alpha[adapter].detach(), layer.spp_beta[adapter].detach()
                    total = total + (beta * scaling) * alpha[row_groups(len(beta), len(alpha))]
            weight.copy_((weight.float() * (1 + total)).bfloat16())  # type: ignore[operator]
    assert_same_bits(logits(model), logits(plain))
    assert model.add_weighted_adapter(["sum", "default"], [2.0, 1.0], "nested")[Q0] == 0.0
    assert [t.scaling for t in tuner_layers(model.get_base_model())[Q0].spp_terms["nested"]] == [3.0, -1.5, 2.0]
    merged = model.merge_and_unload(safe_merge=True)
    for (name, ours), theirs in zip(plain.state_dict().items(), merged.state_dict().values(), strict=True):
        assert_same_bits(theirs, ours, name)


def test_a_stack_of_one_is_that_adapter_and_trains() -> None:
    model = two_adapters()
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    assert_same_bits(logits(model), expected)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    members = logits(model)
    train(model, steps=1)
    assert not torch.equal(logits(model), members)
    model.set_adapter("default")
    assert_same_bits(logits(model), expected)


def test_a_stack_cannot_be_saved(tmp_path: Path) -> None:
    model = two_adapters()
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    with pytest.raises(AdapterError, match="'sum' is a sum of several"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "members", selected_adapters=["default", "b"])
    assert (tmp_path / "members/b/adapter_model.safetensors").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("r", [None, 7, 64])
def test_svd_is_the_best_adapter_of_its_rank(r: int | None, tmp_path: Path) -> None:
    model = two_adapters()
    errors = model.add_weighted_adapter(["default", "b"], [0.75, -1.5], "sum", "svd", r)
    for path, layer in tuner_layers(model.get_base_model()).items():
        total = 0.75 * change(model, path, "default").double()
        if "b" in layer.spp_alpha:
            total = total - 1.5 * change(model, path, "b").double()
        rank = min(r or 4, layer.out_features)
        alpha, beta = layer.spp_alpha["sum"].detach().double(), layer.spp_beta["sum"].detach().double()
        assert alpha.shape[0] == rank
        found = 2.0 * beta * alpha[row_groups(layer.out_features, rank)]
        best = torch.zeros_like(total)
        for k in range(rank):
            rows = slice(k * len(total) // rank, (k + 1) * len(total) // rank)
            u, sigma, vh = torch.linalg.svd(total[rows], full_matrices=False)
            best[rows] = sigma[0] * u[:, :1] @ vh[:1]
        assert_matches(found.float(), best, torch.float32)
        error = float((total - best).norm() / total.norm())
        assert errors[path] == pytest.approx(error, abs=1e-6)
    if r is None:
        assert errors[Q0] > 0.1 and max(e for p, e in errors.items() if p.endswith("k_proj")) < 1e-6
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = spp.load_adapter(pruned(), tmp_path / "sum")
    assert_same_bits(logits(loaded), logits(model))


def test_svd_of_nothing() -> None:
    model = get_peft_model(pruned(), SPPPeftConfig(r=4))
    errors = model.add_weighted_adapter(["default"], [1.0], "zero", "svd")
    model.set_adapter("zero")
    assert set(errors.values()) == {0.0}
    assert_same_bits(logits(model), logits(pruned()))


def test_combinations_that_make_no_sense() -> None:
    model = two_adapters()
    for arguments, message in [
        ((["default", "c"], [1.0, 1.0], "sum"), "there is no c"),
        (([], [], "sum"), "there is no name given"),
        ((["default", "default"], [1.0, 1.0], "sum"), "comes twice"),
        ((["default", "b"], [1.0], "sum"), "2 finite numbers"),
        ((["default"], [float("nan")], "sum"), "1 finite numbers"),
        ((["default"], [1.0], "b"), "new name"),
        ((["default"], [1.0], "a.b"), "without dots"),
        ((["default"], [1.0], "sum", "linear"), "combination_type is 'linear'; known: stack, svd"),
        ((["default"], [1.0], "sum", "stack", 4), "r is given for a stack"),
        ((["default"], [1.0], "sum", "svd", 0), "r is 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "b"]
    model.add_adapter("whole", SPPPeftConfig(r=2, modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="whole also trained modules_to_save"):
        model.add_weighted_adapter(["default", "whole"], [1.0, 1.0], "sum")


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_a_bad_adapter_is_found_before_a_weight_is_written(how: str) -> None:
    model = two_adapters()
    last = list(tuner_layers(model.get_base_model()).values())[-1]
    with torch.no_grad():
        last.spp_beta["default"][3] = float("inf")
    before = weights(model.get_base_model())
    with pytest.raises(NonFiniteError, match=r"down_proj\.spp_beta"):
        getattr(model, how)(safe_merge=True)
    for path, weight in weights(model.get_base_model()).items():
        assert_same_bits(weight, before[path], path)
    with pytest.raises(NonFiniteError, match=r"down_proj\.spp_beta"):
        getattr(model, how)()


def test_the_mask_is_asserted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_adapters()
    monkeypatch.setattr("spp.rules.spp.SPPRule.build", lambda self, weight, factors, rows, cols, out: out.fill_(1.0))
    with use_kernels("torch"), pytest.raises(MaskError, match="would change the zero pattern"):
        model.merge_and_unload(safe_merge=True)


def test_a_merge_of_packed_layers(caplog: pytest.LogCaptureFixture) -> None:
    dense, packed = two_adapters(), two_adapters(packed=True)
    before = weights(pruned())
    layer = tuner_layers(packed.get_base_model())[Q0]
    assert layer.base_layer.packed_layout is not None
    packed.merge_adapter()
    assert_same_bits(logits(packed), logits(dense))
    packed.unmerge_adapter()
    assert layer.base_layer.packed_layout is not None and layer.merged_adapters == []
    assert_same_bits(layer.base_layer.weight, before[Q0])
    with caplog.at_level(logging.INFO, logger="spp"):
        merged, ours = packed.merge_and_unload(), dense.merge_and_unload()
    assert "merged 14 layers" in caplog.text
    for (name, theirs), expected in zip(merged.state_dict().items(), ours.state_dict().values(), strict=True):
        assert_same_bits(theirs, expected, name)
    for name, weight in weights(two_adapters(packed=True).unload()).items():
        assert_same_bits(weight, before[name], name)


def test_packed_bases_stay_packed() -> None:
    model = get_peft_model(spp.pack(pruned()), SPPPeftConfig(r=4, packed=True))
    scatter(model)
    assert_same_bits(logits(model), logits(scatter(get_peft_model(pruned(), SPPPeftConfig(r=4)))))
    assert model.unload().get_submodule(Q0).packed_layout is not None
    with pytest.raises(ConfigError, match="packed=True"):
        get_peft_model(spp.pack(pruned()), SPPPeftConfig(r=4))
