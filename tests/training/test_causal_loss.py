"""causal_lm_loss is the model's own loss, whatever it does to its logits, and SPPTrainer trains by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import spp
from spp.errors import ConfigError
from spp.training import causal_lm_loss
from tests.helpers.tolerances import assert_matches
from tests.training.helpers import losses, trainer, wrapped

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "tie_word_embeddings": True},
    "gemma2": {**_SMALL, "head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {**_SMALL, "logit_scale": 0.25},
    "granite": {**_SMALL, "logits_scaling": 4.0},
    "gpt_neox": {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "phi": {**_SMALL},  # a head with a bias
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
            "word_embed_proj_dim": 16},
    "mixtral": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **ARCHITECTURES[architecture]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval() if architecture == "mixtral" else model.double().eval()  # its products know no float64


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 96, (3, 10), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_the_models_own(architecture: str) -> None:
    model, inputs = model_of(architecture), batch()
    expected = model(**inputs).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(expected, parameters, allow_unused=True)
    loss = causal_lm_loss(model, inputs, chunk=7)
    assert_matches(loss, expected, torch.float32)  # transformers takes losses in float32
    for actual, oracle in zip(torch.autograd.grad(loss, parameters, allow_unused=True), grads, strict=True):
        assert (actual is None) == (oracle is None)
        if actual is not None and oracle is not None and float(oracle.abs().max()) > 1e-9:
            assert_matches(actual, oracle, torch.float32)


def test_a_count_of_the_whole_accumulated_batch() -> None:
    model, inputs = model_of("llama"), batch()
    expected = model(**inputs, num_items_in_batch=50).loss
    assert_matches(causal_lm_loss(model, inputs, chunk=7, num_items_in_batch=50), expected, torch.float32)
    given = {**inputs, "num_items_in_batch": torch.tensor(50)}
    assert_matches(causal_lm_loss(model, given, chunk=7), expected, torch.float32)


def test_an_adapted_head() -> None:
    model = model_of("gpt_neox")
    with torch.no_grad():
        model.lm_head.weight[:, ::2] = 0
    spp.wrap(model, r=4, target_modules=["lm_head"], seed=0)
    torch.nn.init.normal_(model.lm_head.spp_beta, 0, 0.1)
    inputs = batch()
    parameters = spp.adapter_parameters(model)
    expected = model(**inputs).loss
    grads = torch.autograd.grad(expected, parameters)
    loss = causal_lm_loss(model, inputs, chunk=7)
    assert_matches(loss, expected, torch.float32)  # transformers takes losses in float32
    for actual, oracle in zip(torch.autograd.grad(loss, parameters), grads, strict=True):
        assert_matches(actual, oracle, torch.float32)


def test_gradient_checkpointing_and_training_mode_are_left_as_they_were() -> None:
    model = wrapped()
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ids = batch()["input_ids"]
    causal_lm_loss(model, {"input_ids": ids, "labels": ids}, chunk=4).backward()
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is not None for p in spp.adapter_parameters(model))
    assert not model.lm_head._forward_pre_hooks
    assert all(layer._cached is None for layer in model.modules() if isinstance(layer, spp.SPPLinear))


def test_a_loss_of_another_kind_is_refused() -> None:
    model, inputs = model_of("llama"), batch()

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            out = super().forward(*args, labels=labels, **kwargs)
            if labels is not None:
                out["loss"] = out.loss + 1
            return out

    model.__class__ = Other
    with pytest.raises(ConfigError, match="is not the cross-entropy of its head's logits"):
        causal_lm_loss(model, inputs)


def test_what_it_cannot_do_is_refused() -> None:
    model = model_of("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="router"):
        causal_lm_loss(model, batch())
    with pytest.raises(ConfigError, match="labels"):
        causal_lm_loss(model_of("llama"), {"input_ids": batch()["input_ids"]})
    with pytest.raises(ConfigError, match="shift_labels"):
        causal_lm_loss(model_of("llama"), {**batch(), "shift_labels": batch()["labels"]})
    with pytest.raises(ConfigError, match="no output head"):
        causal_lm_loss(nn.Linear(2, 2), batch())
    with pytest.raises(ConfigError, match="input_ids"):
        causal_lm_loss(model_of("llama"), {"inputs_embeds": torch.zeros(1, 2, 32), "labels": batch()["labels"]})


@pytest.mark.sampled(1)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_takes_the_same_steps(tmp_path: Path, accumulate: int) -> None:
    found = {}
    for chunk in (None, 5):
        made = trainer(tmp_path / str(chunk), loss_chunk=chunk, gradient_accumulation_steps=accumulate, eval_data=True)
        made.train()
        found[chunk] = [*losses(made), made.evaluate()["eval_loss"]]
    assert len(found[5]) == 7
    for chunked, whole in zip(found[5], found[None], strict=True):
        assert chunked == pytest.approx(whole, rel=2e-5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"loss_chunk": 0}, "loss_chunk is 0"),
        ({"loss_chunk": 4, "label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_the_trainer_refuses_what_needs_logits(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        trainer(tmp_path, **options)
