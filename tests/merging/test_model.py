"""Merging: the mask bit for bit, the numbers of the forward, the report, and errors that change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import spp
from spp.errors import ConfigError, MaskError, NonFiniteError, SPPWarning
from spp.kernels import use_kernels
from spp.merging.weight import merge_tensor, round_stochastically
from spp.rules import Adapter, get_rule
from spp.wrapping.wrap import adapter_layers
from tests.helpers.layers import make_case
from tests.helpers.models import projections
from tests.helpers.tolerances import LOGITS, assert_same_bits, assert_same_zeros, error
from tests.wrapping.test_wrap import IDS, assert_untouched, pruned, snapshot, stir

RULE = get_rule("spp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_keeps_the_mask_stores_the_forward_weight_and_the_logits(dtype: torch.dtype) -> None:
    model = pruned().to(dtype)
    base = {n: m.weight.detach().clone() for n, m in projections(model).items()}
    objects = {n: m for n, m in projections(model).items()}
    stir(spp.wrap(model, r=5, seed=0))
    effective = {n: layer.effective_weight() for n, layer in adapter_layers(model).items()}
    with torch.no_grad():
        before = model(IDS).logits
        report = spp.merge(model)
        after = model(IDS).logits
    assert error(after, before.double()) <= LOGITS[dtype]
    for name, module in projections(model).items():
        assert module is objects[name] and type(module) is nn.Linear
        assert_same_bits(module.weight, effective[name], name)
        assert_same_zeros(module.weight, base[name], name)
        assert not torch.equal(module.weight, base[name])
        assert module.weight.requires_grad
        assert report.layers[name].kept == int((base[name] != 0).sum())
    assert report.sparsity_report.pattern == "2:4" and report.sparsity_report.sparsity == 0.5
    assert report.kept == sum(layer.kept for layer in report.layers.values())
    assert 0.9 < report.survived < 1.1
    counted = {"kept", "rescued", "lost", "moved", "base_values", "base_values_note"}
    assert set(report.to_dict()) == {
        "layers",
        "survived",
        "requantize_error",
        "also_trained",
        "sparsity_report",
        *counted,
    }


def test_unchanged_adapter_changes_nothing() -> None:
    model = pruned()
    before = snapshot(model)
    with pytest.warns(SPPWarning, match="changes no weight: β is zero everywhere; was it trained"):
        report = spp.merge(spp.wrap(model, r=4))
    assert_untouched(model, before)
    assert report.survived is None and all(layer.max_relative_change == 0 for layer in report.layers.values())


def test_merged_model_saves_and_reloads_bit_for_bit(tmp_path: object) -> None:
    model = stir(spp.wrap(pruned(), r=4))
    spp.merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, module in projections(again).items():
        assert_same_bits(module.weight, projections(model)[name].weight, name)
    assert_same_bits(again.eval()(IDS).logits, model(IDS).logits)


def test_report_numbers_against_the_formula() -> None:
    case = make_case(13, 16, 5, (2,), torch.bfloat16)
    merged, layer = merge_tensor(case.weight, Adapter(RULE, (case.alpha, case.beta), 2.0))
    weight = case.weight.double()
    from spp.rules.spp import row_groups

    update = weight * 2.0 * case.beta.detach().double() * case.alpha.detach().double()[row_groups(13, 5)]
    change = merged.double() - weight
    kept = weight != 0
    assert layer.kept == int(kept.sum()) and layer.rescued == 0
    assert layer.survived == pytest.approx(float((change * update).sum() / update.square().sum()), rel=1e-6)
    assert layer.max_relative_change == pytest.approx(float((change / weight)[kept].abs().max()), rel=1e-6)
    assert layer.update_norm == pytest.approx(float(update.norm()), rel=1e-6)
    assert (layer.updated, layer.moved) == (int((update != 0).sum()), int((change != 0).sum()))


def test_rescued_weights_are_counted_and_stay() -> None:
    model = pruned()
    spp.wrap(model, r=1)
    layer = adapter_layers(model)["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        layer.spp_alpha.fill_(1)
        layer.spp_beta[0] = -0.5  # M = 0: the whole first row vanishes
    kept = int((layer.weight[0] != 0).sum())
    mask = layer.weight != 0
    report = spp.merge(model)
    assert report.layers["model.layers.0.mlp.up_proj"].rescued == kept == report.rescued
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight != 0, mask)


def test_an_update_lost_in_rounding_is_reported_with_the_ways_out() -> None:
    def tiny_update() -> nn.Module:
        model = spp.wrap(pruned().to(torch.bfloat16), r=4, seed=0)
        with torch.no_grad():
            for layer in adapter_layers(model).values():
                layer.spp_beta.fill_(1e-3)
        return model

    with pytest.warns(SPPWarning, match=r"dtype=torch\.float32.*rounding='stochastic'"):
        lost = spp.merge(tiny_update())
    assert lost.survived < 0.1
    wide = spp.merge(tiny_update(), dtype=torch.float32)
    assert wide.survived == pytest.approx(1, abs=1e-3)
    stochastic = spp.merge(tiny_update(), rounding="stochastic", seed=1)
    assert stochastic.survived == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_the_report_of_an_update_whose_squares_are_no_float32(scale: float, kernels: str) -> None:
    weight = torch.randn(24, 32).masked_fill_(torch.rand(24, 32) < 0.5, 0)
    alpha, beta = torch.ones(2, 32), torch.full((24, 1), scale)
    with use_kernels(kernels):
        merged, done = merge_tensor(weight, Adapter(RULE, (alpha, beta), 1.0))
    change = merged.double() - weight.double()
    assert done.survived == pytest.approx(1.0, abs=1e-6) and math.isfinite(done.max_relative_change)
    assert done.update_norm == pytest.approx(float(change.norm()), rel=1e-6)


def test_dtype_converts_the_whole_model() -> None:
    model = stir(spp.wrap(pruned().to(torch.bfloat16), r=4))
    spp.merge(model, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.config.dtype == torch.float32
    model(IDS)
    model = stir(spp.wrap(pruned(), r=4))
    masks = {n: m.weight != 0 for n, m in projections(model).items()}
    spp.merge(model, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    for name, module in projections(model).items():
        assert torch.equal(module.weight != 0, masks[name])
    assert model(IDS).logits.dtype == torch.float16


def test_stochastic_rounding_is_seeded_unbiased_and_between_neighbours() -> None:
    exact = torch.randn(400, 50, dtype=torch.float32) * torch.logspace(-9, 3, 400).unsqueeze(1)
    exact[:, 0] = 0
    for dtype, step, floor in ((torch.bfloat16, 2.0**-7, 2.0**-133), (torch.float16, 2.0**-10, 2.0**-24)):
        one = round_stochastically(exact, dtype, torch.Generator().manual_seed(1))
        assert_same_bits(one, round_stochastically(exact, dtype, torch.Generator().manual_seed(1)))
        assert bool((one[:, 0] == 0).all())
        assert bool(((one.float() - exact).abs() <= (exact.abs() * step).clamp_min(floor)).all())  # a neighbour
        value = torch.full((200_000,), 1.0 + 2.0**-12)
        mean = round_stochastically(value, torch.bfloat16, torch.Generator().manual_seed(2)).double().mean()
        assert abs(float(mean) - (1 + 2.0**-12)) < 6 * 2.0**-7 * (2.0**-5 / 200_000) ** 0.5
    seeds = [
        spp.merge(stir(spp.wrap(pruned().to(torch.bfloat16), r=4, seed=0)), rounding="stochastic", seed=4)
        for _ in range(2)
    ]
    assert seeds[0] == seeds[1]


def test_a_non_finite_adapter_or_result_leaves_everything_as_it_was() -> None:
    last = "model.layers.1.mlp.down_proj"
    for poison, message in ((float("nan"), f"{last}.spp_alpha holds NaN"), (1e38, f"{last}: the merged weight at")):
        model = stir(spp.wrap(pruned().to(torch.float16), r=4))
        with torch.no_grad():
            adapter_layers(model)[last].spp_alpha[2, 3] = poison
        before = snapshot(model)
        with pytest.raises(NonFiniteError, match=message):
            spp.merge(model)
        assert_untouched(model, before)


def test_a_changed_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(6, 8, 2, (1,))
    monkeypatch.setattr("spp.rules.spp.SPPRule.build", lambda self, w, f, r, c, out: out.fill_(1.0))
    with use_kernels("torch"), pytest.raises(MaskError, match="would change the zero pattern"):
        merge_tensor(case.weight, Adapter(RULE, (case.alpha, case.beta), 2.0), where="layer")


def test_bad_options() -> None:
    model = spp.wrap(pruned(), r=4)
    with pytest.raises(ConfigError, match="rounding is 'up'"):
        spp.merge(model, rounding="up")
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8"):
        spp.merge(model, dtype=torch.int8)


def test_converting_keeps_the_zeros_of_projections_that_the_adapter_leaves_alone() -> None:
    model = pruned()
    weight = model.model.layers[0].mlp.up_proj.weight
    row, col = (int(i) for i in (weight != 0).nonzero()[0])
    weight.data[row, col] = -1e-10  # zero in float16
    mask = weight != 0
    stir(spp.wrap(model, r=4, target_modules=["q_proj"]))
    spp.merge(model, dtype=torch.float16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight != 0, mask)
    assert model.model.layers[0].mlp.up_proj.weight[row, col].item() == -(2.0**-24)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("place", ["merged", "plain", "embedding"])
def test_a_value_too_large_for_the_dtype_is_refused_before_anything_is_written(rounding: str, place: str) -> None:
    model = pruned()
    tensor = {
        "merged": model.model.layers[1].self_attn.q_proj.weight,
        "plain": model.model.layers[1].mlp.up_proj.weight,
        "embedding": model.model.embed_tokens.weight,
    }[place]
    row, col = (int(i) for i in (tensor != 0).nonzero()[0])
    tensor.data[row, col] = 1e8
    stir(spp.wrap(model, r=4, target_modules=["q_proj"]))
    before = snapshot(model)
    with pytest.raises(NonFiniteError):
        spp.merge(model, dtype=torch.float16, rounding=rounding, seed=1)
    assert_untouched(model, before)


def test_a_head_that_is_named_is_merged_and_remembered() -> None:
    model = pruned()
    model.lm_head.weight.data[:, ::2] = 0
    stir(spp.wrap(model, r=4, target_modules=["lm_head", "q_proj"]))
    report = spp.merge(model)
    assert "lm_head.weight" in report.sparsity_report.tensors
    assert "lm_head" in report.layers and model._spp_base["keys"] == ["lm_head.weight"]


@pytest.mark.parametrize("seed", ["1", 1.0, True])
def test_a_seed_is_an_integer(seed: Any) -> None:
    model = spp.wrap(pruned(), r=4, seed=0)
    with pytest.raises(ConfigError, match=r"seed is .*; expected an integer"):
        spp.merge(model, rounding="stochastic", seed=seed)
