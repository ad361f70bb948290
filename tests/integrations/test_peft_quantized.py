"""The PEFT plug-in on bases that bitsandbytes quantized: what spp.wrap does there, through PEFT's functions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import spp
from spp.errors import ConfigError, MaskError, NonFiniteError
from spp.integrations.peft import SPPPeftConfig
from spp.integrations.peft.model import tuner_layers
from tests.helpers.models import projections
from tests.helpers.quantized import FORMS, own_dense, quantized_llama
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros
from tests.integrations.helpers import IDS, Q0, logits, scatter, train

pytest.importorskip("bitsandbytes")
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def peft_model(form: dict[str, Any], **options: Any) -> Any:
    return get_peft_model(quantized_llama(**form), SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM", **options))


def two_adapters(form: dict[str, Any]) -> Any:
    model = peft_model(form)
    model.add_adapter("b", SPPPeftConfig(r=3, scaling=0.5, target_modules=["q_proj", "up_proj"]))
    return scatter(scatter(model), "b", seed=9)


def dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: own_dense(linear) for path, linear in projections(model).items()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("form", "options"),
    [
        *((form, {}) for form in FORMS),
        (FORMS[1], {"dropout": 0.2}),
        (FORMS[3], {"dropout": 0.2, "dropout_mode": "alpha"}),
    ],
    ids=str,
)
def test_training_is_that_of_wrap_bit_for_bit(form: dict[str, Any], options: dict[str, Any]) -> None:
    base = quantized_llama(**form)
    storages = {path: linear.weight.data_ptr() for path, linear in projections(base).items()}
    config = SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM", **options)
    model, wrapped = get_peft_model(base, config), spp.wrap(quantized_llama(**form), 4, seed=0, **options)
    layers = tuner_layers(model.get_base_model())
    assert {path: layer.base_layer.held().codes.data_ptr() for path, layer in layers.items()} == storages
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 28 and all(".spp_" in name for name in trainable)
    train(model)
    train(wrapped)
    for path, layer in layers.items():
        ours = wrapped.get_submodule(path)
        assert_same_bits(layer.spp_alpha["default"], ours.spp_alpha, path)
        assert_same_bits(layer.spp_beta["default"], ours.spp_beta, path)
    assert_same_bits(logits(model), logits(wrapped))
    with model.disable_adapter(), spp.disabled(wrapped):
        assert_same_bits(logits(model), logits(wrapped))


@pytest.mark.sampled(1)
@every_form
def test_adapters_go_between_the_two(form: dict[str, Any], tmp_path: Path) -> None:
    model, wrapped = train(peft_model(form)), train(spp.wrap(quantized_llama(**form), 4, seed=0))
    model.save_pretrained(tmp_path / "peft")
    spp.save_adapter(wrapped, tmp_path / "spp")
    assert_same_bits(logits(spp.load_adapter(quantized_llama(**form), tmp_path / "peft")), logits(model))
    assert_same_bits(logits(PeftModel.from_pretrained(quantized_llama(**form), tmp_path / "spp")), logits(model))
    config = SPPPeftConfig.from_pretrained(tmp_path / "peft")
    assert config.base_masks == SPPPeftConfig.from_pretrained(tmp_path / "spp").base_masks
    config.base_masks[Q0] = "0" * 64  # as if trained on other zeros
    with pytest.raises(MaskError, match=r"the zeros of the base differ .*q_proj"):
        PeftModel.from_pretrained(quantized_llama(**form), tmp_path / "peft", config=config)


@pytest.mark.sampled(1)
@every_form
def test_several_adapters_and_their_merges(form: dict[str, Any]) -> None:
    model = two_adapters(form)
    before = dense_weights(quantized_llama(**form))
    first = logits(model)
    model.set_adapter("b")
    second = logits(model)
    assert not torch.equal(first, second)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    layers = tuner_layers(model.get_base_model())
    expected = {path: layer.merged_weight(["default", "b"])[0] for path, layer in layers.items()}
    model.merge_adapter(safe_merge=True)
    assert_matches(logits(model), both.double(), torch.float32)
    for path, layer in layers.items():
        assert type(layer.base_layer) is nn.Linear
        assert_same_bits(layer.base_layer.weight, expected[path], path)
        assert_same_zeros(layer.base_layer.weight, before[path], path)
        assert_same_bits(layer.base_weight(), before[path].float(), path)
    model.unmerge_adapter()
    assert_same_bits(logits(model), both)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert_same_bits(logits(model), both)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("form", "safe"), [*((form, True) for form in FORMS), (FORMS[1], False)], ids=str)
def test_merge_and_unload_stores_what_spp_merge_stores(form: dict[str, Any], safe: bool) -> None:
    wrapped, model = train(spp.wrap(quantized_llama(**form), 4, seed=0)), train(peft_model(form))
    unmerged = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    spp.merge(wrapped)
    for (name, ours), theirs in zip(wrapped.state_dict().items(), merged.state_dict().values(), strict=True):
        assert_same_bits(theirs, ours, name)
    assert {type(linear) for linear in projections(merged).values()} == {nn.Linear}
    assert_matches(logits(merged), unmerged.double(), torch.float32)
    assert spp.sparsity(merged) == spp.sparsity(wrapped)


@pytest.mark.sampled(1)
@every_form
def test_unloading_gives_the_quantized_layers_back(form: dict[str, Any]) -> None:
    before = quantized_llama(**form)
    model = two_adapters(form)
    model.set_adapter("b")
    merged = copy.deepcopy(model).merge_and_unload()
    for path, linear in projections(merged).items():  # "b" is not in all of them
        in_b = path.endswith(("q_proj", "up_proj"))
        assert type(linear) is (nn.Linear if in_b else type(before.get_submodule(path))), path
    unloaded = model.unload()
    for path, linear in projections(before).items():
        assert type(unloaded.get_submodule(path)) is type(linear)
        assert_same_bits(own_dense(unloaded.get_submodule(path)), own_dense(linear), path)
    model = two_adapters(form)
    model.merge_adapter()
    assert {type(linear) for linear in projections(model.unload()).values()} == {nn.Linear}


def test_generation_checkpointing_and_conversion() -> None:
    model = scatter(peft_model({"form": "nf4", "nested": True}))
    tokens = model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert tokens.shape == (1, 16)
    grads = []
    for checkpointed in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointed:
            twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            twin.enable_input_require_grads()
        twin(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in twin.parameters() if p.requires_grad])
    for plain, again in zip(*grads, strict=True):
        assert_same_bits(again, plain)
    layer = tuner_layers(model)[f"base_model.model.{Q0}"]
    before = layer.base_weight()
    model.to(torch.bfloat16)
    assert_same_bits(layer.base_weight(), before.bfloat16())
    assert layer.spp_alpha["default"].dtype == torch.float32 and logits(model).dtype == torch.bfloat16
    model.merge_adapter()
    model.to(torch.float16)
    model.unmerge_adapter()  # what was set aside has been converted too
    assert layer.base_weight().dtype == logits(model).dtype == torch.float16


def test_refusals_leave_the_model_as_it_was() -> None:
    model = quantized_llama("nf4")
    with pytest.raises(ConfigError, match="is quantized, which is small already"):
        get_peft_model(model, SPPPeftConfig(r=4, packed=True))
    with pytest.raises(ConfigError, match=r"k_proj: r = 33 does not fit"):
        get_peft_model(model, SPPPeftConfig(r=33))
    model.model.layers[1].mlp.up_proj.weight.quant_state.absmax[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 scales"):
        get_peft_model(model, SPPPeftConfig(r=4))
    assert not tuner_layers(model) and all(not linear.weight.is_meta for linear in projections(model).values())
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="quantized by gptq"):
        get_peft_model(model, SPPPeftConfig(r=4))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_trainer_on_what_transformers_quantized(bits: int, tmp_path: Path) -> None:
    """Trainer refuses a quantized model, and takes a PeftModel around one: that is the plug-in's way past the guard."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, Trainer

    from spp.training import Collator
    from tests.training.helpers import arguments, blocks, losses, pruned

    pruned().save_pretrained(tmp_path / "pruned")
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    options: dict[str, Any] = {"quantization_config": settings, "dtype": torch.float32, "device_map": {"": "cpu"}}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **options)

    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(), arguments(tmp_path / "plain"))
    model = get_peft_model(load(), SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM"))
    made = Trainer(model, arguments(tmp_path / "run"), train_dataset=blocks(), data_collator=Collator(2))
    made.remove_callback(PrinterCallback)
    assert model.is_quantized and not getattr(model, "_hf_peft_config_loaded", False)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    made.save_model(str(tmp_path / "adapter"))
    assert_same_bits(logits(spp.load_adapter(load(), tmp_path / "adapter")), logits(model))
    merged = model.merge_and_unload(safe_merge=True)
    assert not merged.is_quantized and not hasattr(merged.config, "quantization_config")
    spp.save_model(merged, tmp_path / "merged")
    spp.verify(tmp_path / "merged")
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))
