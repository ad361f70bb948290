"""A layer with a packed weight computes, trains and travels exactly as the dense one does."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from spp.errors import ConfigError, GradientError, TargetError
from spp.kernels import backend
from spp.layers.host import PackedLinear
from spp.layers.linear import SPPLinear
from tests.helpers.tolerances import assert_matches, assert_same_bits
from tests.weights.matrices import free_matrix, nm_matrix

KINDS = ["2:4", "1:4", "free"]


def linear_of(kind: str, m: int = 24, n: int = 48, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(n, m, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weight = free_matrix(m, n, 0.5, dtype) if kind == "free" else nm_matrix(m, n, kind, dtype)
    linear.weight.data = weight + 0.0
    if bias:
        linear.bias.data = torch.randn(m, generator=generator).to(dtype)
    return linear


def pair(kind: str, *, m: int = 24, n: int = 48, dtype: torch.dtype = torch.float32, **options: Any) -> list[SPPLinear]:
    """The same adapted layer, dense and packed, with a trained-looking adapter."""
    layers = []
    for packed in (False, True):
        layer = SPPLinear(linear_of(kind, m, n, dtype), r=5, packed=packed, **options)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in layer.adapter_parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layers.append(layer)
    return layers


def run(layer: nn.Module, dtype: torch.dtype, how: str = "plain", tokens: int = 9) -> list[Tensor]:
    """Output and gradients of x, bias and the adapter."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, tokens // 3, 48, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    torch.manual_seed(4)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    elif how == "plain":
        y = layer(x)
    else:
        y = checkpoint(layer, x, use_reentrant=how == "reentrant")
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for p in wanted:
        p.grad = None
    y.backward(dy)
    return [y, *(p.grad for p in wanted)]  # type: ignore[list-item]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("how", ["plain", "autocast", "reentrant", "checkpoint"])
@pytest.mark.parametrize("elements", [2**21, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dense_layer(
    kind: str, elements: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for dtype in dtypes:
        for options in ({}, {"dropout": 0.3, "dropout_mode": "alpha"}, {"dropout": 0.3}):
            if elements < 2**21 and options.get("dropout_mode", "") != "alpha" and options:
                continue  # a dense weight is multiplied whole in the branch without an adapter: other blocks
            dense, packed = pair(kind, dtype=dtype, **options)
            for expected, found in zip(run(dense, dtype, how), run(packed, dtype, how), strict=True):
                assert_same_bits(found, expected, f"{dtype} {options}")


@pytest.mark.parametrize("kind", KINDS)
def test_input_dropout_in_many_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", 300)
    dense, packed = pair(kind, dtype=torch.float64, dropout=0.3)
    for expected, found in zip(run(dense, torch.float64), run(packed, torch.float64), strict=True):
        assert_matches(found, expected, torch.float64)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("elements", [2**21, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_without_an_adapter(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        dense, packed = pair(kind, dtype=dtype)
        plain, alone = linear_of(kind, dtype=dtype), PackedLinear(linear_of(kind, dtype=dtype))
        dense.disabled = packed.disabled = True
        for how in ("plain", "autocast", "reentrant", "checkpoint"):
            if how == "autocast" and dtype == torch.float64:
                continue
            results = [run(layer, dtype, how)[:2] for layer in (plain, alone, dense, packed)]
            for found in results[1:]:
                for a, b in zip(found, results[0], strict=True):
                    if elements == 2**21:
                        assert_same_bits(a, b, f"{dtype} {how}")
                    else:
                        assert_matches(a, b.double(), torch.float32 if dtype == torch.float32 else dtype, b, how)
        bias = [run(layer, dtype)[-1] for layer in (plain, alone)]
        assert_same_bits(bias[1], bias[0])


def test_an_untrained_adapter_computes_what_the_pruned_layer_does() -> None:
    linear = linear_of("2:4")
    x = torch.randn(5, 48)
    expected = linear(x)
    assert_same_bits(SPPLinear(linear, r=4, packed=True)(x), expected)


def test_no_second_derivative() -> None:
    x = torch.randn(2, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(PackedLinear(linear_of("2:4"))(x).square().sum(), x, create_graph=True)
    with pytest.raises(GradientError):
        gradient.sum().backward()


def test_wrong_inputs_are_named() -> None:
    layer = PackedLinear(linear_of("2:4"))
    with pytest.raises(TypeError, match=r"input is torch.bfloat16 and the weight torch.float32"):
        layer(torch.ones(2, 48, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="last dimension must be 48"):
        layer(torch.ones(2, 47))


def test_the_dense_weight_is_gone_and_comes_back() -> None:
    for kind in KINDS:
        linear = linear_of(kind)
        weight, parameter = linear.weight.detach().clone(), linear.weight
        layer = SPPLinear(linear, r=4, packed=True)
        assert linear.weight is not parameter
        assert linear.weight.is_meta
        assert not [name for name, p in layer.named_parameters() if p.shape == weight.shape]
        assert_same_bits(layer.weight, weight)
        assert layer.weight is not layer.weight  # a copy each time
        back = layer.restore()
        assert back is linear
        assert linear.weight.requires_grad
        assert_same_bits(linear.weight.detach(), weight)
        alone = PackedLinear(linear)
        assert linear.weight.is_meta
        assert alone.restore() is linear
        assert_same_bits(linear.weight.detach(), weight)


def test_effective_weight_and_merge() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense, packed = pair("2:4", dtype=dtype)
        assert_same_bits(packed.effective_weight(), dense.effective_weight())
        merged = packed.merge()
        assert type(merged) is nn.Linear
        assert_same_bits(merged.weight.detach(), dense.merge().weight.detach())
        x = torch.randn(3, 48).to(dtype)
        dense.cache_effective = False  # a kept W_eff is one product, whose sums may run in another order
        with torch.no_grad():
            assert_same_bits(packed.eval()(x), dense.eval()(x))


def test_on_a_packed_linear() -> None:
    linear = linear_of("1:4")
    weight = linear.weight.detach().clone()
    alone = PackedLinear(linear)
    values = alone.weight_values
    layer = SPPLinear(alone, r=4, packed=True)
    assert layer.weight_values is values  # handed over, not packed again
    assert alone.packed_layout is None
    assert not alone._buffers
    back = layer.restore()
    assert back is alone
    assert_same_bits(alone.weight, weight)
    layer = SPPLinear(alone, r=4, packed=True)
    layer.hold_dense(2 * weight)
    back = layer.restore()
    assert back is linear
    assert_same_bits(linear.weight.detach(), 2 * weight)
    assert linear.weight.requires_grad


def test_state_dict_keys_and_loading() -> None:
    for kind, keys in [
        ("2:4", ["bias", "spp_alpha", "spp_beta", "weight_codes", "weight_values"]),
        ("free", ["bias", "spp_alpha", "spp_beta", "weight_codes", "weight_starts", "weight_values"]),
    ]:
        _, packed = pair(kind)
        state = packed.state_dict()
        assert sorted(state) == keys
        other = SPPLinear(linear_of(kind), r=5, packed=True)
        other.weight_values.zero_()
        other.load_state_dict(state)
        for a, b in zip(run(other, torch.float32), run(packed, torch.float32), strict=True):
            assert_same_bits(a, b)
    alone = PackedLinear(linear_of("2:4"))
    assert sorted(alone.state_dict()) == ["bias", "weight_codes", "weight_values"]


def test_a_state_dict_of_another_pattern_is_refused() -> None:
    two_of_four, four_of_eight = PackedLinear(linear_of("2:4")), PackedLinear(linear_of("4:8"))
    with pytest.raises(RuntimeError, match="groups of 4 do not have 2 values"):
        two_of_four.load_state_dict(four_of_eight.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        two_of_four.load_state_dict(PackedLinear(linear_of("2:8")).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind: str) -> None:
    _, packed = pair(kind)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(file, weights_only=False)):
        assert other.weight_values.data_ptr() != packed.weight_values.data_ptr()
        for a, b in zip(run(other, torch.float32), run(packed, torch.float32), strict=True):
            assert_same_bits(a, b)
        assert_same_bits(other.restore().weight.detach(), packed.weight)
    alone = copy.deepcopy(PackedLinear(linear_of(kind)))
    assert_same_bits(alone.restore().weight.detach(), linear_of(kind).weight.detach())


def test_conversions_convert_the_values_only() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        dense, packed = (layer.to(dtype) for layer in pair("free"))
        assert packed.weight_values.dtype == dtype
        assert packed.weight_codes.dtype == torch.uint8
        assert packed.weight_starts.dtype == torch.int32
        assert packed.spp_alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_bits(packed.weight, dense.weight.detach())
        for a, b in zip(run(packed, dtype), run(dense, dtype), strict=True):
            assert_same_bits(a, b)
    packed = packed.to("meta")
    assert packed.weight.is_meta
    assert packed.weight.shape == (24, 48)


def test_kept_weights_that_a_conversion_takes_away_are_lost_as_in_the_dense_layer() -> None:
    small = linear_of("2:4")
    small.weight.data *= 1e-8  # most of it is nothing in float16
    dense, packed = SPPLinear(copy.deepcopy(small), r=4).half(), SPPLinear(small, r=4, packed=True).half()
    assert int((packed.weight != 0).sum()) < 24 * 24
    assert_same_bits(packed.weight + 0.0, dense.weight.detach() + 0.0)
    x = torch.randn(3, 48).half()
    assert_same_bits(packed(x), dense(x))


def test_evaluation_keeps_no_dense_weight_unless_asked_to() -> None:
    dense, packed = (layer.eval() for layer in pair("2:4"))
    x = torch.randn(2, 48)
    with torch.no_grad():
        expected = dense(x)
        dense.cache_effective = False
        assert_same_bits(packed(x), dense(x))
        assert packed._cached is None
        packed.cache_effective = True
        assert_same_bits(packed(x), expected)
        assert packed._cached is not None
        first = packed._cached.effective
        packed(x)
        assert packed._cached.effective is first
        packed.weight_values.mul_(2)
        assert not torch.equal(packed(x), expected)
        packed.train()
        assert packed._cached is None


def test_hooks_and_flags_are_kept() -> None:
    linear = linear_of("2:4")
    linear.weight.requires_grad_(False)
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    layer = PackedLinear(linear.eval())
    assert not layer.training
    layer(torch.ones(1, 48))
    assert seen == ["PackedLinear"]
    assert layer.restore().weight.requires_grad is False


@pytest.mark.parametrize("kind", KINDS)
def test_conv1d_is_stored_with_its_inputs_first(kind: str) -> None:
    twin = linear_of(kind)
    layers = []
    for packed in (False, True):
        conv = Conv1D(24, 48)
        conv.weight = nn.Parameter(torch.empty(48, 24).copy_(twin.weight.detach().T))
        conv.bias = nn.Parameter(twin.bias.detach().clone())
        layer = SPPLinear(conv, r=5, packed=packed)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in layer.adapter_parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layers.append(layer)
    dense, packed = layers
    assert packed.weight.shape == (48, 24)
    assert_same_bits(packed.weight, dense.weight.detach())
    assert_same_bits(packed.matrix, twin.weight.detach())
    for expected, found in zip(run(dense, torch.float32), run(packed, torch.float32), strict=True):
        assert_same_bits(found, expected)
    assert_same_bits(packed.effective_weight(), dense.effective_weight())
    merged = packed.merge()
    assert type(merged) is Conv1D
    assert_same_bits(merged.weight.detach(), dense.merge().weight.detach())
    back = packed.restore()
    assert type(back) is Conv1D and back.weight.requires_grad
    assert_same_bits(back.weight.detach(), dense.weight.detach())
    alone = PackedLinear(back)
    assert back.weight.is_meta and alone.weight.shape == (48, 24)
    x = torch.randn(3, 48)
    dense.disabled = True
    assert_matches(alone(x), dense(x).double().detach(), torch.float32)
    again = SPPLinear(alone, r=5, packed=True)
    assert type(again.merge()) is Conv1D
    again.hold_dense(2 * dense.weight.detach())
    assert again.restore() is back
    assert_same_bits(back.weight.detach(), 2 * dense.weight.detach())


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(TargetError, match="up_proj is a Conv1d"):
        PackedLinear(nn.Conv1d(3, 3, 1), where="up_proj")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"up_proj.weight is on the meta device"):
        PackedLinear(nn.Linear(4, 4, device="meta"), where="up_proj")
    with pytest.raises(ConfigError, match=r"up_proj.weight is on the meta device"):
        SPPLinear(nn.Linear(4, 4, device="meta"), r=2, packed=True, where="up_proj")
    quantized = nn.Linear(4, 4)
    quantized.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"int8.*quantized ones are not"):
        PackedLinear(quantized)
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(TargetError, match="remove_parametrizations"):
        PackedLinear(parametrized)
    with pytest.raises(ConfigError, match=r"pass packed=True, or call spp.unpack"):
        SPPLinear(PackedLinear(linear_of("2:4")), r=2)


def test_empty_and_odd_layers() -> None:
    for m, n in [(0, 8), (8, 0), (1, 1), (7, 13)]:
        plain = nn.Linear(n, m)
        packed = PackedLinear(copy.deepcopy(plain))
        x = torch.randn(3, n, requires_grad=True)
        y = packed(x)
        assert_matches(y.detach(), plain(x).detach(), torch.float32)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    packed = PackedLinear(linear_of("2:4"))
    assert packed(torch.empty(0, 48)).shape == (0, 24)
    assert packed(torch.ones(48)).shape == (24,)
