"""SPP layers inside PEFT compute what SPP layers compute: outputs, training, targets, dtypes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

import spp
from spp.errors import ConfigError, NonFiniteError, SPPWarning, TargetError, WrapError
from spp.integrations.peft import SPPPeftConfig, SPPPeftLinear
from spp.integrations.peft.model import tuner_layers
from spp.wrapping.wrap import adapter_layers
from tests.helpers.tolerances import assert_matches, assert_same_bits
from tests.integrations.helpers import IDS, Q0, logits, pruned, scatter, train


def same_parameters(model: nn.Module, wrapped: nn.Module, adapter: str = "default") -> None:
    layers = tuner_layers(model.get_base_model() if hasattr(model, "get_base_model") else model)
    assert list(layers) == list(adapter_layers(wrapped))
    for path, ours in adapter_layers(wrapped).items():
        assert_same_bits(layers[path].spp_alpha[adapter], ours.spp_alpha, path)
        assert_same_bits(layers[path].spp_beta[adapter], ours.spp_beta, path)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        {"seed": 0},
        {"dropout": 0.2},
        {"dropout": 0.2, "dropout_mode": "alpha", "scaling": 0.5},
        {"rank_pattern": {"q_proj": 2, r".*\.1\..*up_proj": 3}, "seed": 3},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
        {"packed": True},
    ],
    ids=["seed", "input dropout", "alpha dropout", "ranks", "targets", "packed"],
)
def test_training_is_that_of_wrap_bit_for_bit(options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    model = get_peft_model(pruned(), SPPPeftConfig(r=4, task_type="CAUSAL_LM", **options))
    torch.manual_seed(5)
    wrapped = spp.wrap(pruned(), 4, **options)
    same_parameters(model, wrapped)
    assert_same_bits(logits(model), logits(wrapped))
    train(model)
    train(wrapped)
    same_parameters(model, wrapped)
    assert_same_bits(logits(model), logits(wrapped))
    assert not torch.equal(logits(model), logits(pruned()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_adapter_stays_float32(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    model = scatter(get_peft_model(pruned(dtype), SPPPeftConfig(r=4)))
    layer = tuner_layers(model)[f"base_model.model.{Q0}"]
    for convert in (
        lambda: model.to(dtype),
        lambda: model.cpu(),
        lambda: model.base_model._cast_adapter_dtype("default"),
    ):
        convert()
        assert layer.spp_alpha["default"].dtype == layer.spp_beta["default"].dtype == expected
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.spp_alpha["default"].dtype == expected and layer.base_layer.weight.dtype == dtype
    values = layer.spp_alpha["default"].clone()
    model.to(torch.float32)
    assert torch.equal(layer.spp_alpha["default"], values.float()) and layer.base_layer.weight.dtype == torch.float32


def test_disable_adapter_computes_as_the_pruned_model() -> None:
    base = logits(pruned())
    model = scatter(get_peft_model(pruned(), SPPPeftConfig(r=4)))
    tuned = logits(model)
    assert not torch.equal(tuned, base)
    with model.disable_adapter():
        assert_same_bits(logits(model), base)
    assert_same_bits(logits(model), tuned)


def test_only_the_adapter_trains() -> None:
    model = get_peft_model(pruned(), SPPPeftConfig(r=4))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 28 and all(
        name.endswith((".spp_alpha.default", ".spp_beta.default")) for name in trainable
    )
    assert model.get_nb_trainable_parameters()[0] == sum(
        p.numel() for p in spp.adapter_parameters(spp.wrap(pruned(), 4))
    )


def test_generation_keeps_the_effective_weight_and_notices_changes() -> None:
    model = scatter(get_peft_model(pruned(), SPPPeftConfig(r=4, task_type="CAUSAL_LM")))
    model.add_adapter("other", SPPPeftConfig(r=4))
    scatter(model, "other", seed=7)
    layer = tuner_layers(model)[f"base_model.model.{Q0}"]
    with torch.no_grad():
        first = model.eval()(input_ids=IDS[:1]).logits
        assert layer._cached is not None
        model.set_adapter("other")
        second = model(input_ids=IDS[:1]).logits
        layer.spp_beta["other"].mul_(2.0)
        third = model(input_ids=IDS[:1]).logits
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        assert_same_bits(fresh(input_ids=IDS[:1]).logits, third)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    tokens = model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert tokens.shape == (1, 16)


def test_autocast_and_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = scatter(get_peft_model(pruned(), SPPPeftConfig(r=4, dropout=0.1, task_type="CAUSAL_LM"))).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*grads, strict=True):
        assert plain is not None and again is not None
        assert_same_bits(again, plain)


@pytest.mark.slow
def test_compiled_numbers_are_those_of_eager_mode() -> None:
    model = scatter(get_peft_model(pruned(num_hidden_layers=1), SPPPeftConfig(r=4)))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_matches(compiled(input_ids=IDS).logits, logits(model).double(), torch.float32)


def test_layers_to_transform_and_modules_to_save() -> None:
    config = SPPPeftConfig(r=4, layers_to_transform=[1], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(pruned(), config)
    paths = list(tuner_layers(model.get_base_model()))
    assert len(paths) == 7 and all(".layers.1." in path for path in paths)
    assert config.target_modules == set(paths)  # what an adapter file has to say without PEFT's filters
    before = model.get_base_model().lm_head.weight.detach().clone()
    train(model)
    assert not torch.equal(model.get_base_model().lm_head.weight, before)
    with pytest.raises(TargetError, match="layers_to_transform=7"):
        get_peft_model(pruned(), SPPPeftConfig(layers_to_transform=7))
    with pytest.raises(TargetError, match="leave none"):
        get_peft_model(pruned(), SPPPeftConfig(target_modules=["q_proj"], modules_to_save=["self_attn"]))


def test_all_linear_leaves_the_head_alone_and_a_regex_chooses() -> None:
    model = get_peft_model(pruned(), SPPPeftConfig(r=4, target_modules="all-linear"))
    assert len(tuner_layers(model)) == 14
    model = get_peft_model(pruned(), SPPPeftConfig(r=4, target_modules=r".*0\..*(q|v)_proj"))
    assert [path[-6:] for path in tuner_layers(model)] == ["q_proj", "v_proj"]


def test_conv1d_is_adapted() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=96, n_positions=64)).eval()
    spp.prune(base, "magnitude", "2:4")
    wrapped = spp.wrap(copy.deepcopy(base), 4, seed=0)
    model = get_peft_model(base, SPPPeftConfig(r=4, seed=0))
    train(model)
    train(wrapped)
    assert_same_bits(logits(model), logits(wrapped))
    spp.merge(wrapped)
    merged = model.merge_and_unload(safe_merge=True)
    for (name, ours), theirs in zip(wrapped.state_dict().items(), merged.state_dict().values(), strict=True):
        assert_same_bits(theirs, ours, name)


def test_hooks_of_the_base_layer_fire_once() -> None:
    base, calls = pruned(), []
    base.get_submodule(Q0).register_forward_hook(lambda module, args, output: calls.append(output))
    model = get_peft_model(base, SPPPeftConfig(r=4))
    logits(model)
    with model.disable_adapter():
        logits(model)
    assert len(calls) == 2
    plain = model.unload()
    logits(plain)
    assert len(calls) == 3


def test_injection_without_a_peft_model() -> None:
    model = inject_adapter_in_model(SPPPeftConfig(r=4, seed=0), pruned())
    assert_same_bits(logits(model), logits(pruned()))
    assert isinstance(model.get_submodule(Q0), SPPPeftLinear)


def test_what_cannot_be_adapted_is_refused_and_nothing_is_changed() -> None:
    for options, error, message in [
        ({"target_modules": ["no_such"]}, TargetError, "matches no linear module"),
        ({"r": 33}, ConfigError, r"k_proj: r = 33 does not fit"),
        ({"rank_pattern": {"nothing": 2}}, ConfigError, "rank_pattern: nothing"),
        ({"exclude_modules": ["nothing"]}, TargetError, "exclude_modules"),
    ]:
        model = pruned()
        with pytest.raises(error, match=message):
            get_peft_model(model, SPPPeftConfig(**options))  # type: ignore[arg-type]
        assert not tuner_layers(model) and all(p.requires_grad for p in model.parameters())
    model = pruned()
    with torch.no_grad():
        model.get_submodule(Q0).weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=Q0):
        get_peft_model(model, SPPPeftConfig(r=4))
    with pytest.raises(WrapError, match=r"spp\.save_adapter"):
        get_peft_model(spp.wrap(pruned(), 4), SPPPeftConfig(r=4))
    with pytest.raises(TargetError, match="SPPPeftLinear"):
        spp.wrap(get_peft_model(pruned(), SPPPeftConfig(r=4)), 4)
    model = get_peft_model(pruned(), SPPPeftConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["default", "default"])


def test_quantized_weights_are_refused() -> None:
    model = pruned()
    linear = model.get_submodule(Q0)
    linear.weight = nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)  # as bitsandbytes holds them
    with pytest.raises(TargetError, match=r"q_proj\.weight is torch\.uint8"):
        get_peft_model(model, SPPPeftConfig(r=4))


def test_a_dense_model_warns() -> None:
    from tests.helpers.models import tiny_llama

    with pytest.warns(SPPWarning, match="all 14 target layers are dense"):
        model = get_peft_model(tiny_llama(), SPPPeftConfig(r=4, task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModelForCausalLM)


class Twice(nn.Module):
    """One linear under two names, with another between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.middle = nn.Linear(8, 8)
        self.inside = nn.ModuleDict({"again": self.first})
        with torch.no_grad():
            for linear in (self.first, self.middle):
                linear.weight[:, ::2] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside["again"](self.middle(self.first(x)).relu())


@pytest.mark.parametrize("options", [{}, {"packed": True}], ids=str)
def test_a_linear_registered_twice_has_one_adapter_saved_once(options: dict[str, Any], tmp_path: Path) -> None:
    config = SPPPeftConfig(r=2, target_modules="all-linear", **options)
    model, x = scatter(get_peft_model(Twice(), config)), torch.randn(3, 8)
    base = model.get_base_model()
    assert isinstance(base.first, SPPPeftLinear) and base.inside["again"] is base.first
    assert len(list(model.parameters())) == (8 if not options else 6)
    model.add_adapter("b", SPPPeftConfig(r=2, target_modules=["first"], **options))
    scatter(model, "b", seed=1)
    tuned = model(x)
    model.save_pretrained(tmp_path)
    if not peft.__version__.startswith("0.20."):  # which saves it under both names
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4
        assert_same_bits(spp.load_adapter(Twice(), tmp_path)(x), tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(Twice(), tmp_path)
    assert_same_bits(again(x), tuned)
    twin = copy.deepcopy(model).unload()
    assert twin.first is twin.inside["again"] and type(twin.first) is nn.Linear
    assert_same_bits(twin(x), Twice()(x))
    model.set_adapter("b")  # which is not in all of the layers
    copy.deepcopy(model).merge_and_unload()
    model.set_adapter("default")
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.first is merged.inside["again"] and type(merged.middle) is type(merged.first) is nn.Linear
    assert_matches(merged(x), tuned.double(), torch.float32)
    assert spp.verify(Twice(), merged).sparsity == 0.5
