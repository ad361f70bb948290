"""Adapters on bases that bitsandbytes quantized: trained, kept, merged; the zeros of what is stored stay."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spp
from spp.errors import ConfigError, NonFiniteError, TargetError, WrapError
from spp.training import SPPTrainer
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import projections, train_steps
from tests.helpers.quantized import FORMS, assert_recounted, merge_again, own_dense, quantized_llama, recount

pytest.importorskip("bitsandbytes")
IDS = torch.arange(24).view(2, 12)
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def dense_twin(model: Any) -> Any:
    """The same model with the dequantized weights in plain linears."""
    twin = copy.deepcopy(model)
    for path, linear in projections(twin).items():
        plain = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        plain.weight = torch.nn.Parameter(own_dense(linear).float())
        twin.set_submodule(path, plain)
    return twin


def step(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(spp.adapter_parameters(model), lr=0.5)
    return train_steps(model, optimizer, steps, input_ids=IDS, labels=IDS)


@pytest.mark.sampled(1)
@every_form
def test_it_trains_as_the_dequantized_model_does(form: dict) -> None:
    model = quantized_llama(**form)
    twin = spp.wrap(dense_twin(model), r=4, seed=0)
    spp.wrap(model, r=4, seed=0)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "spp_" not in n)
    losses = step(model)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(step(twin), rel=1e-5)
    for ours, theirs in zip(spp.adapter_parameters(model), spp.adapter_parameters(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@every_form
def test_unwrap_gives_back_the_quantized_layers(form: dict) -> None:
    model = quantized_llama(**form)
    before = {path: (type(m), own_dense(m)) for path, m in projections(model).items()}
    logits = model(IDS).logits
    spp.unwrap(spp.wrap(model, r=4))
    for path, linear in projections(model).items():
        assert type(linear) is before[path][0]
        assert torch.equal(own_dense(linear), before[path][1])
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.sampled(1)
@every_form
def test_a_merge_keeps_the_zeros_and_what_the_forward_computed(form: dict) -> None:
    model = spp.wrap(quantized_llama(**form), r=4, seed=0)
    masks = {path: layer.weight != 0 for path, layer in projections(model).items()}
    step(model)
    with torch.no_grad():
        logits = model(IDS).logits
    effective = {path: layer.effective_weight() for path, layer in projections(model).items()}
    spp.merge(model)
    for path, linear in projections(model).items():
        assert type(linear) is torch.nn.Linear
        assert torch.equal(linear.weight, effective[path])
        assert torch.equal(linear.weight != 0, masks[path])
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(1)
@every_form
def test_a_merge_that_quantizes_again(form: dict) -> None:
    model = quantized_llama(**form)
    classes = {path: type(m) for path, m in projections(model).items()}
    before, expected = {path: own_dense(m) for path, m in projections(model).items()}, {}
    spp.wrap(model, r=4, seed=0)
    step(model)
    layers = {path: copy.deepcopy(layer) for path, layer in adapter_layers(model).items()}
    effective = {path: layer.effective_weight() for path, layer in layers.items()}
    report, said = merge_again(model)
    assert len(said) == 1, "even the steps of 8 bits are coarse beside three steps of training"
    for path, linear in projections(model).items():
        assert type(linear) is classes[path]
        stored = own_dense(linear)
        assert bool((stored[effective[path] == 0] == 0).all()), "no zero was filled"
        assert report.layers[path].lost == int(((stored == 0) & (effective[path] != 0)).sum())
        assert float((stored - effective[path]).norm() / effective[path].norm()) < 0.2
        expected[path] = recount(before[path], layers[path], effective[path], stored)
    assert_recounted(report, expected)
    assert bool(torch.isfinite(model(IDS).logits).all())


@every_form
def test_a_weight_that_is_not_changed_keeps_its_codes(form: dict) -> None:
    """Quantizing it again would only add an error: of nested scales that is not nothing."""
    model = spp.wrap(quantized_llama(**form), r=4, seed=0)
    before = {path: layer.weight for path, layer in projections(model).items()}
    path = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        adapter_layers(model)[path].spp_beta.fill_(0.5)
    report, _ = merge_again(model)
    for other, linear in projections(model).items():
        assert torch.equal(own_dense(linear), before[other]) == (other != path)
        assert (report.layers[other].survived is None) == (other != path)
        assert (report.layers[other].requantize_error is None) == (other != path)
    report, said = merge_again(spp.wrap(quantized_llama(**form), r=4))
    assert report.survived is None and report.requantize_error is None
    assert len(said) == 1 and "changes no weight: β is zero everywhere" in said[0]


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_share_near_one_does_not_hide_the_error(form: str) -> None:
    """The update is in what is stored, under an error of half its size."""
    # public report: QLoRA on 2:4, requantized merge
    model = spp.wrap(quantized_llama(form), r=4, seed=0)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.spp_alpha.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
            layer.spp_beta.fill_(0.08)
    report, said = merge_again(model)
    assert report.survived == pytest.approx(1, abs=0.08)
    if form == "int8":
        assert not said and report.requantize_error < 0.2
    else:
        assert report.requantize_error > 0.4
        assert "survived" in said[0] and f"{report.requantize_error:.2f} times" in said[0]
        assert f"{report.survived:.1%}" in said[0] and "without requantize" in said[0] and "unmerged" in said[0]


@pytest.mark.sampled(2)
@every_form
@pytest.mark.sampled(1)
def test_adapters_copies_checkpointing_and_generation(form: dict, tmp_path: Path) -> None:
    model = spp.wrap(quantized_llama(**form), r=4, seed=0)
    pruned = model(IDS).logits
    step(model)
    trained = model(IDS).logits
    assert not torch.equal(trained, pruned)
    with spp.disabled(model):
        torch.testing.assert_close(model(IDS).logits, pruned, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, trained)
    spp.save_adapter(model, tmp_path / "adapter")
    loaded = spp.load_adapter(quantized_llama(**form), tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, trained)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(IDS).logits, trained)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    spp.merge(twin)
    assert torch.equal(twin.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    plain: list[torch.Tensor] = []
    for checkpointed in (False, True):
        loaded.train()
        if checkpointed:
            loaded.gradient_checkpointing_enable()
        loaded.zero_grad()
        loaded(input_ids=IDS, labels=IDS).loss.backward()
        grads = [p.grad.clone() for p in spp.adapter_parameters(loaded)]
        if checkpointed:
            assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
        plain = grads


@every_form
def test_conversion_leaves_the_scales_alone(form: dict) -> None:
    model = spp.wrap(quantized_llama(**form), r=4)
    before = {path: layer.weight for path, layer in projections(model).items()}
    model.to(torch.bfloat16)
    for path, layer in projections(model).items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, before[path].bfloat16())
        assert layer.spp_alpha.dtype == torch.float32
    assert model(IDS).logits.dtype == torch.bfloat16


def test_the_quantized_weights_are_not_copied() -> None:
    model = quantized_llama("nf4")
    storages = {path: m.weight.data_ptr() for path, m in projections(model).items()}
    spp.wrap(model, r=4)
    assert {path: m.held().codes.data_ptr() for path, m in projections(model).items()} == storages


def test_bad_scales_leave_the_model_as_it_was() -> None:
    model = quantized_llama("nf4")
    model.model.layers[1].mlp.up_proj.weight.quant_state.absmax[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 scales"):
        spp.wrap(model, r=4)
    assert all(not m.weight.is_meta for m in projections(model).values())


def test_refusals() -> None:
    model = quantized_llama("nf4")
    with pytest.raises(ConfigError, match="is quantized, which is small already"):
        spp.wrap(model, r=4, packed=True)
    model.is_quantized = True
    model.config.quantization_config = SimpleNamespace(quant_method="gptq")
    with pytest.raises(ConfigError, match="quantized by gptq"):
        spp.wrap(model, r=4)
    plain = spp.wrap(dense_twin(quantized_llama("nf4")), r=4)
    with pytest.raises(ConfigError, match="none of the merged weights is quantized"):
        spp.merge(plain, requantize=True)


def test_weights_that_cannot_be_adapted_name_their_layer() -> None:
    model = dense_twin(quantized_llama("nf4"))

    class Int8Tensor(torch.Tensor):
        __module__ = "torchao.quantization"

    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Int8Tensor), requires_grad=False)
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.q_proj\.weight is torchao's Int8Tensor, which"):
        spp.wrap(model, r=4)


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_quantized(bits: int, tmp_path: Path) -> None:
    """Trainer refuses a quantized model without an adapter that it knows; SPPTrainer tells it, while it is made."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

    from tests.training.helpers import arguments, losses, pruned, trainer

    pruned().save_pretrained(tmp_path / "pruned")
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    options: dict[str, Any] = {"quantization_config": settings, "dtype": torch.float32, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **options)
    assert model.is_quantized
    with pytest.raises(WrapError, match="is not wrapped"):
        trainer(tmp_path / "run", model)
    spp.wrap(model, r=4, seed=0)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path / "plain"))
    with pytest.raises(TypeError):
        SPPTrainer(model, arguments(tmp_path / "run"), no_such_argument=1)
    made = trainer(tmp_path / "run", model)
    assert "_hf_peft_config_loaded" not in vars(model), "elsewhere it would mean PEFT's adapters"
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    assert made.state.log_history[0]["sparsity"] == spp.sparsity(model).sparsity >= 0.5
    spp.merge(model)
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")
    spp.save_model(model, tmp_path / "merged")
    spp.verify(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
