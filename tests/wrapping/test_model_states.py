"""Models in states that users report trouble with: computed weights, inference mode, resized, averaged, decayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured, remove
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

import spp
import spp.pst
from spp.errors import TargetError
from tests.helpers.models import assert_same_model, moe_model, prune_nm_, tiny_llama, train_steps
from tests.helpers.tolerances import assert_same_bits

IDS = torch.arange(3, 35).view(2, 16)


def pruned(**options: object) -> Any:
    return prune_nm_(tiny_llama(num_hidden_layers=1, **options))


def stirred(model: nn.Module, **options: Any) -> Any:
    """Wrap a model and move the adapter off its start."""
    generator = torch.Generator().manual_seed(0)
    spp.wrap(model, r=4, seed=0, **options)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def base_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "spp_" not in name}


# ---- Weights that a hook computes before each call: written to, they would be what they were at the next.

Ways = dict[str, Callable[[nn.Module], Any]]
HOOKS: Ways = {
    "prune": lambda linear: l1_unstructured(linear, "weight", 0.5),
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrization": torch.nn.utils.parametrizations.weight_norm,
}
USES: Ways = {
    "wrap": lambda model: spp.wrap(model, r=4),
    "prune": lambda model: spp.prune(model, "magnitude", "2:4"),
    "pack": spp.pack,
    "pst": spp.pst.wrap,
    "layer": lambda model: spp.SPPLinear(model.get_submodule("model.layers.0.self_attn.q_proj"), 4),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.sampled(8)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("hook", HOOKS)
def test_computed_weights_are_refused_with_the_way_out(hook: str, use: str) -> None:
    """huggingface/transformers#29227 and locuslab/wanda#10: who prunes with torch's own masks and then tunes."""
    model = pruned()
    HOOKS[hook](model.get_submodule("model.layers.0.self_attn.q_proj"))
    before = base_values(model)
    with pytest.raises(TargetError, match=r"torch\.nn\.utils\.(prune\.remove|parametrize\.remove_param)"):
        USES[use](model)
    for name, tensor in before.items():
        assert_same_bits(model.state_dict()[name], tensor, name)


@pytest.mark.slow
def test_a_mask_of_torch_that_was_made_permanent_is_kept() -> None:
    model = pruned()
    linear: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    l1_unstructured(linear, "weight", 0.7)
    remove(linear, "weight")
    zeros = linear.weight == 0
    spp.merge(stirred(model))
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").weight == 0, zeros)


# ---- torch.inference_mode: tensors that are made in it never get gradients.


def test_what_is_made_in_inference_mode_trains_outside_of_it(tmp_path: Path) -> None:
    """hiyouga/FastEdit#26, huggingface/peft#2928: the adapter is made where somebody only wanted to look."""
    spp.save_adapter(stirred(pruned()), tmp_path / "adapter")
    model = pruned()
    with torch.inference_mode():
        spp.load_adapter(model, tmp_path / "adapter")
        expected = model(IDS).logits
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in spp.adapter_parameters(model))
    torch.testing.assert_close(model.eval()(IDS).logits.detach(), expected.clone())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["experts", "packed", "pst", "unpacked"])
def test_every_kind_of_layer_made_in_inference_mode_trains(kind: str) -> None:
    ids = IDS % 90
    model: Any = pruned()
    if kind == "experts":
        spp.prune(model := moe_model("mixtral"), "magnitude", "2:4")
    with torch.inference_mode():
        if kind == "pst":
            spp.pst.wrap(model)
        elif kind == "unpacked":
            spp.unpack(spp.pack(model))
        else:
            spp.wrap(model, r=4, packed=kind == "packed")
    if kind == "unpacked":
        model.requires_grad_(True)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_model_that_lives_in_inference_mode_generates_and_merges() -> None:
    expected = stirred(pruned())
    with torch.inference_mode():
        model = stirred(pruned())
        assert_same_bits(model(IDS).logits, expected(IDS).logits)
        spp.merge(model)
        spp.merge(expected)
        assert_same_model(model, expected)


# ---- Another vocabulary after the wrap.


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_resized_after_the_wrap(tied: bool, tmp_path: Path) -> None:
    """huggingface/transformers#45127, huggingface/peft#2018: tied heads that a merge or a save tears apart."""
    model = stirred(pruned(tie_word_embeddings=tied))
    before = model(IDS).logits
    model.resize_token_embeddings(260)
    assert_same_bits(model(IDS).logits[..., :256].clone(), before)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in spp.adapter_parameters(model))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "spp_" not in n] == []
    spp.merge(model.eval())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    spp.save_model(model, tmp_path / "model")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


# ---- Optimizers, averages, scaled gradients: the base never moves.

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.5),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_never_touches_the_base(name: str) -> None:
    """Even where an optimizer is given every parameter, and all flags are set."""
    model = stirred(pruned())
    model.requires_grad_(True)
    before = {k: t for k, t in base_values(model).items() if k.endswith("_proj.weight")}
    losses = train_steps(model.train(), OPTIMIZERS[name](list(model.parameters())), 3, input_ids=IDS, labels=IDS)
    assert losses[-1] < losses[0] and len(before) == 7
    for key, tensor in before.items():
        assert_same_bits(model.state_dict()[key], tensor, key)


@pytest.mark.slow
def test_an_average_of_wrapped_models_merges_with_every_zero() -> None:
    model = stirred(pruned())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=1e-2)
    before = base_values(model)
    for _ in range(2):
        train_steps(model.train(), optimizer, 1, input_ids=IDS, labels=IDS)
        average.update_parameters(model)
    inner = average.module
    for key, tensor in before.items():
        assert_same_bits(inner.state_dict()[key], tensor, key)
    assert not torch.equal(spp.adapter_parameters(inner)[0], spp.adapter_parameters(model)[0])
    spp.merge(inner)
    assert spp.verify(pruned(), inner).pattern == "2:4"


@pytest.mark.slow
@pytest.mark.parametrize("half_after", [False, True])
def test_scaled_gradients_of_a_half_precision_model(half_after: bool) -> None:
    """huggingface/transformers#30559: gradients in float16 cannot be unscaled; those of the adapter are float32."""
    model = stirred(pruned()).half() if half_after else stirred(pruned().half())
    parameters = spp.adapter_parameters(model.train())
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer, scaler = torch.optim.AdamW(parameters, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert torch.isfinite(nn.utils.clip_grad_norm_(parameters, 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# ---- Generation with the adapter beside the weights: the tokens are those of the merged model.

PROMPT = torch.tensor([[2, 2, 2, 5, 6, 7], [3, 4, 5, 6, 7, 8]])  # the first padded on the left
GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("how", GENERATE)
def test_generation_is_that_of_the_merged_model(how: str) -> None:
    """huggingface/peft#2502: other texts after the merge than before it."""
    model = stirred(pruned())
    merged = copy.deepcopy(model)
    spp.merge(merged)
    options = {"attention_mask": (PROMPT != 2).long(), "max_new_tokens": 6, "do_sample": False, **GENERATE[how]}
    found, expected = (m.generate(PROMPT, **options) for m in (model, merged))
    assert torch.equal(found, expected)
    if how == "greedy":  # the padding changes nothing
        alone = model.generate(PROMPT[:1, 3:], max_new_tokens=6, do_sample=False)
        assert torch.equal(found[0, 3 : 3 + alone.shape[1]], alone[0])


@pytest.mark.slow
def test_assisted_generation() -> None:
    model = stirred(pruned())
    options = {"attention_mask": torch.ones(1, 6, dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(PROMPT[1:], **options)
    for helper in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(PROMPT[1:], **options, **helper), expected)
