"""Adapters on bases that torchao quantized, weights only: read by blocks, trained, put back, merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spp
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.weights import read_quantized
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import projections, prune_nm_, tiny_llama, train_steps
from tests.helpers.quantized import TORCHAO_FORMS, assert_recounted, merge_again, recount, torchao_config, torchao_llama
from tests.helpers.tolerances import assert_matches, assert_same_bits, assert_same_zeros
from tests.integrations.helpers import IDS, logits

pytest.importorskip("torchao")
every_form = pytest.mark.parametrize("form", TORCHAO_FORMS)


def own_dense(linear: Any) -> torch.Tensor:
    """The weight as torchao itself dequantizes it: the oracle."""
    return linear.weight.dequantize()


def dense_twin(model: Any) -> Any:
    """The same model with the dequantized weights in plain linears."""
    twin = copy.deepcopy(model)
    for linear in projections(twin).values():
        linear.weight = nn.Parameter(own_dense(linear))
    return twin


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(spp.adapter_parameters(model), lr=3.0)
    model.train()
    losses = train_steps(model, optimizer, steps, input_ids=IDS, labels=IDS)
    model.eval()
    return losses


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_are_those_of_torchao(form: str, dtype: torch.dtype) -> None:
    from torchao.quantization import quantize_

    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(96, 20, bias=False)
    weight = torch.randn(20, 96, generator=generator) * (torch.rand(20, 96, generator=generator) > 0.5)
    weight[7] = 0  # a row, and blocks, without anything
    layer.weight = nn.Parameter(weight.to(dtype))
    quantize_(layer, torchao_config(form))
    expected = own_dense(layer)
    quantized = read_quantized(layer, "w")
    assert quantized.codes.data_ptr() == layer.weight.qdata.data_ptr()
    assert_same_bits(quantized.dense(), expected)
    assert bool((expected[weight == 0] == 0).all()), "pruned weights stayed zero"
    for rows, cols in [(slice(0, 3), slice(None)), (slice(2, 9), slice(5, 41)), (slice(None), slice(64, 96))]:
        block = expected[rows, cols]
        assert_same_bits(quantized.decode(rows, cols, torch.full(block.shape, torch.nan, dtype=dtype)), block)
    kept = expected[expected != 0].abs().min()
    assert 0 < quantized.bounds()[quantized.bounds() != 0].abs().min() <= kept * (1 + 1e-6), "a bound from below"


@pytest.mark.sampled(2)
@every_form
def test_it_trains_as_the_dequantized_model_does(form: str, tmp_path: Path) -> None:
    model = torchao_llama(form, initializer_range=0.2)
    before = {path: own_dense(linear) for path, linear in projections(model).items()}
    kind = type(model.get_submodule("model.layers.0.mlp.up_proj").weight)
    twin = spp.wrap(dense_twin(model), 4, seed=0)
    spp.wrap(model, 4, seed=0)
    losses = train(model)
    assert losses == pytest.approx(train(twin), rel=1e-5) and losses[-1] < losses[0]
    for ours, theirs in zip(spp.adapter_parameters(model), spp.adapter_parameters(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    trained = logits(model)
    spp.save_adapter(model, tmp_path / "adapter")
    loaded = spp.load_adapter(torchao_llama(form, initializer_range=0.2), tmp_path / "adapter")
    assert_same_bits(logits(loaded), trained)
    assert_same_bits(logits(copy.deepcopy(model)), trained)
    for path, linear in projections(spp.unwrap(loaded)).items():
        assert type(linear) is nn.Linear and type(linear.weight) is kind
        assert_same_bits(own_dense(linear), before[path], path)
    again = copy.deepcopy(model)
    effective = {path: layer.effective_weight() for path, layer in projections(model).items()}
    spp.merge(model)
    for path, linear in projections(model).items():
        assert_same_bits(linear.weight, effective[path], path)
        assert_same_zeros(linear.weight, before[path], path)
    assert_matches(logits(model), trained.double(), torch.float32)
    layers, expected = adapter_layers(copy.deepcopy(again)), {}
    report, _ = merge_again(again)
    for path, linear in projections(again).items():
        stored = own_dense(linear)
        assert type(linear.weight) is kind and bool((stored[effective[path] == 0] == 0).all()), "no zero was filled"
        assert report.layers[path].lost == int(((stored == 0) & (effective[path] != 0)).sum())
        worst = {"int8": 0.02, "int4": 0.2, "int2": 0.9}[form.split()[0]]
        assert float((stored - effective[path]).norm() / effective[path].norm()) < worst
        expected[path] = recount(before[path], layers[path], effective[path], stored)
    assert_recounted(report, expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("form", ["int8", "int4 asymmetric"])
def test_the_peft_plugin(form: str) -> None:
    peft = pytest.importorskip("peft")
    from spp.integrations.peft import SPPPeftConfig

    config = SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(torchao_llama(form), config)
    wrapped = spp.wrap(torchao_llama(form), 4, seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    model.train()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(wrapped)
    assert_same_bits(logits(model), logits(wrapped))
    for path, linear in projections(copy.deepcopy(model).unload()).items():
        assert_same_bits(own_dense(linear), own_dense(torchao_llama(form).get_submodule(path)), path)
    merged = model.merge_and_unload(safe_merge=True)
    spp.merge(wrapped)
    for (name, ours), theirs in zip(wrapped.state_dict().items(), merged.state_dict().values(), strict=True):
        assert_same_bits(theirs, ours, name)


def test_forms_whose_zeros_are_not_exact_are_refused() -> None:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    model = prune_nm_(tiny_llama())
    linear = model.model.layers[0].mlp.up_proj
    zeros = linear.weight == 0
    quantized = Int4OpaqueTensor.from_hp(linear.weight.detach(), [1, 32])
    dense = F.linear(torch.eye(linear.in_features), quantized).T
    assert int((dense[zeros] == 0).sum()) < int(zeros.sum()) // 10, "if these were kept, there would be no reason"
    linear.weight = nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(TargetError, match=r"up_proj\.weight is torchao's Int4OpaqueTensor, in which no code"):
        spp.wrap(model, 4)
    assert type(model.model.layers[0].mlp.gate_proj) is nn.Linear, "nothing is changed"


def test_other_refusals() -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    for config, message in [
        (Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), "Int8Tensor that quantizes activations too"),
        (Float8WeightOnlyConfig(set_inductor_config=False), "Float8Tensor, which SPP does not read"),
    ]:
        model = prune_nm_(tiny_llama())
        quantize_(model, config, filter_fn=lambda module, path: path.endswith("up_proj"))
        with pytest.raises(TargetError, match=rf"up_proj\.weight is torchao's {message}"):
            spp.wrap(model, 4)
    model = torchao_llama("int4 asymmetric")
    with pytest.raises(ConfigError, match="is quantized, which is small already"):
        spp.wrap(model, 4, packed=True)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.zero_point[0, 0] = 100
    with pytest.raises(ConfigError, match=r"up_proj\.weight: 320 zero points from -?\d+ to 100, expected 320 from -8"):
        spp.wrap(model, 4)
    weight.scale[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"up_proj\.weight holds 1 scales"):
        spp.wrap(model, 4)


def test_conversion_follows_the_model() -> None:
    model = spp.wrap(torchao_llama("int8"), 4)
    before = {path: layer.weight for path, layer in projections(model).items()}
    model.to(torch.bfloat16)
    for path, layer in projections(model).items():
        assert_same_bits(layer.weight, before[path].bfloat16(), path)
    assert logits(model).dtype == torch.bfloat16
    unwrapped = projections(spp.unwrap(model))
    assert all(linear.weight.dtype == torch.bfloat16 for linear in unwrapped.values())


@pytest.mark.slow
def test_a_model_that_transformers_quantized(tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer

    from spp.integrations.peft import SPPPeftConfig
    from tests.training.helpers import arguments, losses, pruned, trainer

    pruned().save_pretrained(tmp_path / "pruned")
    settings = TorchAoConfig(torchao_config("int4 group"))
    options: dict[str, Any] = {"quantization_config": settings, "dtype": torch.float32, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **options)
    assert model.is_quantized and not model.hf_quantizer.is_trainable
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **options), SPPPeftConfig(r=4))
    with pytest.raises(ValueError, match="do not support training"):  # transformers' rule for torchao's 4 bits
        Trainer(adapted, arguments(tmp_path / "plain"))
    spp.wrap(model, r=4, seed=0)
    made = trainer(tmp_path / "run", model)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    spp.merge(model)
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")
    spp.save_model(model, tmp_path / "merged")
    spp.verify(tmp_path / "merged")
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))
