"""SPPLinear."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from spp import SPPConfig, SPPLinear
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.functional import effective_weight, spp_linear_reference
from spp.pst import PSTLinear
from tests.helpers.tolerances import assert_matches, assert_same_bits


def sparse_linear(m: int = 12, n: int = 8, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(n, m, bias=bias)
    linear.weight.data[torch.rand(m, n) < 0.5] = 0
    return linear.to(dtype)


def trained(linear: nn.Linear, **options: object) -> SPPLinear:
    layer = SPPLinear(linear, r=4, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.spp_beta.normal_(std=0.3)
    return layer


def test_shapes_init_and_flags() -> None:
    linear = sparse_linear(100, 400)
    weight, bias = linear.weight, linear.bias
    layer = SPPLinear(linear, r=16)
    assert layer.weight is weight and layer.bias is bias
    assert linear.weight.is_meta and linear.bias.is_meta  # nothing but the layer holds them
    assert layer.spp_alpha.shape == (16, 400) and layer.spp_beta.shape == (100, 1)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert [p.requires_grad for p in layer.adapter_parameters()] == [True, True]
    assert bool((layer.spp_beta == 0).all())
    bound = 1 / math.sqrt(400)
    alpha = layer.spp_alpha.detach()
    assert float(alpha.abs().max()) <= bound
    assert abs(float(alpha.std()) - bound / math.sqrt(3)) < 0.05 * bound  # uniform
    assert list(layer.state_dict()) == ["weight", "bias", "spp_alpha", "spp_beta"]
    assert "r=16" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_untrained_is_the_linear_and_merged_is_the_layer(dtype: torch.dtype, bias: bool) -> None:
    linear = sparse_linear(dtype=dtype, bias=bias)
    x, weight = torch.randn(5, 8, dtype=dtype), linear.weight
    with torch.no_grad():
        plain = linear(x)
    layer = trained(linear)
    with torch.no_grad():
        beta = layer.spp_beta.clone()
        layer.spp_beta.zero_()
        assert_matches(layer(x), plain.double(), dtype, plain)
        layer.spp_beta.copy_(beta)
    merged = layer.merge()
    assert type(merged) is nn.Linear and merged.training == layer.training
    assert_same_bits(merged.weight, layer.effective_weight())
    assert_same_bits(merged.weight, effective_weight(layer.weight, layer.spp_alpha, layer.spp_beta, 2.0))
    assert_matches(merged(x), layer(x).double(), dtype, layer(x))
    assert layer.weight is weight  # the layer stays as it is
    assert layer.restore() is linear and linear.weight is weight


def test_adapter_keeps_its_precision_through_conversions() -> None:
    layer = trained(sparse_linear())
    before = [p.detach().clone() for p in layer.adapter_parameters()]
    for convert, dtype in [(layer.half, torch.float16), (layer.bfloat16, torch.bfloat16), (layer.float, torch.float32)]:
        convert()
        assert layer.weight.dtype == dtype
        for parameter, value in zip(layer.adapter_parameters(), before, strict=True):
            assert_same_bits(parameter, value)
    layer.double()
    assert [p.dtype for p in layer.adapter_parameters()] == [torch.float64] * 2
    layer.to(torch.bfloat16)
    assert [p.dtype for p in layer.adapter_parameters()] == [torch.float32] * 2


def test_parameters_stay_the_same_objects_through_conversions() -> None:
    layer = trained(sparse_linear())
    optimizer = torch.optim.AdamW(layer.adapter_parameters())
    parameters = layer.adapter_parameters()
    layer.to(torch.bfloat16)
    assert all(a is b for a, b in zip(parameters, layer.adapter_parameters(), strict=True))
    assert optimizer.param_groups[0]["params"][0] is layer.spp_alpha


def test_meta_and_back() -> None:
    with torch.device("meta"):
        linear = nn.Linear(8, 12)
    layer = SPPLinear(linear, r=4)
    assert layer.spp_alpha.is_meta and layer(torch.empty(2, 8, device="meta")).shape == (2, 12)
    layer.to_empty(device="cpu")
    layer.load_state_dict(trained(sparse_linear()).state_dict())
    assert layer(torch.ones(2, 8)).isfinite().all()


def test_copies_and_pickles_compute_the_same() -> None:
    layer = trained(sparse_linear()).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        y = layer(x)  # fills the cache, which must not travel
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
            assert other._cached is None
            assert_same_bits(other(x), y)
            other.spp_beta.add_(1)
            assert not torch.equal(other(x), y)
            restored = other.restore()
            assert restored.weight is other.weight
        assert_same_bits(layer(x), y)


def test_eval_cache_follows_every_change() -> None:
    layer = trained(sparse_linear()).eval()
    x = torch.randn(1, 8)

    def expected() -> torch.Tensor:
        return spp_linear_reference(
            x.double(),
            layer.weight.double(),
            layer.bias.double(),
            layer.spp_alpha.double(),
            layer.spp_beta.double(),
            layer.scaling,
        )

    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.spp_alpha.mul_(2),
            lambda: layer.spp_beta.add_(0.1),
            lambda: layer.weight.mul_(3),
            lambda: setattr(layer, "scaling", 1.0),
            lambda: layer.load_state_dict({**layer.state_dict(), "spp_beta": torch.full((12, 1), 0.7)}),
            lambda: setattr(layer, "spp_alpha", nn.Parameter(torch.ones(4, 8))),
        ):
            change()
            for _ in range(2):
                assert_matches(layer(x), expected(), torch.float32)
        assert layer._cached is not None
        layer.train()
        assert layer._cached is None
        layer.eval()
        layer(x)
        layer.to(torch.float64)
        assert layer._cached is None
    layer.float()
    layer(x)
    assert layer._cached is None  # with gradients on, nothing is kept


@pytest.mark.parametrize("fused", [True, False])
def test_eval_cache_follows_an_optimizer_in_a_loop_that_never_calls_train(fused: bool) -> None:
    layer = trained(sparse_linear()).eval()
    optimizer = torch.optim.AdamW(layer.adapter_parameters(), lr=0.1, fused=fused)
    x = torch.randn(1, 8)
    for _ in range(3):
        with torch.no_grad():
            y = layer(x)
        assert_matches(y, layer(x), torch.float32)
        layer(x).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_untrained_is_the_linear_bit_for_bit_beyond_one_block_too(dtype: torch.dtype) -> None:
    linear = sparse_linear(1500, 1500).to(dtype)
    x = torch.randn(70, 1500, dtype=dtype)
    expected = linear(x)
    assert_same_bits(SPPLinear(linear, r=4, dropout=0.5)(x), expected)


def test_a_large_batch_does_not_fill_the_cache() -> None:
    layer = trained(sparse_linear()).eval()
    with torch.no_grad():
        layer(torch.randn(64, 8))
    assert layer._cached is None


def test_inference_mode() -> None:
    layer = trained(sparse_linear()).eval()
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        assert_same_bits(layer(x), expected)
        fresh = trained(sparse_linear()).eval()
        fresh(x)
    layer.train()
    layer(x).sum().backward()


@pytest.mark.parametrize("mode", ["input", "alpha"])
def test_dropout_modes(mode: str) -> None:
    layer = trained(sparse_linear(dtype=torch.float64), dropout=0.4, dropout_mode=mode)
    x = torch.randn(50, 8, dtype=torch.float64)
    layer.eval()
    dry = spp_linear_reference(x, layer.weight, layer.bias, layer.spp_alpha, layer.spp_beta, 2.0)
    assert_matches(layer(x), dry, torch.float64)
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    if mode == "input":
        mask = nn.functional.dropout(torch.ones_like(x), 0.4)
        wet = spp_linear_reference(x, layer.weight, layer.bias, layer.spp_alpha, layer.spp_beta, 2.0, mask)
    else:
        mask = nn.functional.dropout(torch.ones_like(layer.spp_alpha), 0.4)
        wet = spp_linear_reference(x, layer.weight, layer.bias, layer.spp_alpha * mask, layer.spp_beta, 2.0)
    assert_matches(y, wet, torch.float64)
    assert not torch.allclose(y, dry)
    layer.zero_grad()
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    expected = torch.autograd.grad(wet.square().sum(), layer.adapter_parameters())
    for parameter, oracle in zip(layer.adapter_parameters(), expected, strict=True):
        assert_matches(parameter.grad, oracle, torch.float64)  # type: ignore[arg-type]


def test_hooks_on_the_linear_still_fire() -> None:
    linear = sparse_linear()
    seen: list[str] = []
    linear.register_forward_hook(lambda *a: seen.append("after"))
    linear.register_forward_pre_hook(lambda *a: seen.append("before"))
    SPPLinear(linear, r=2)(torch.ones(1, 8))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_numbers_are_those_of_eager(backend: str) -> None:
    torch._dynamo.reset()
    layer = trained(sparse_linear())
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Tanh())
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend=backend)
    assert_same_bits(compiled(x), model(x))
    compiled(x).sum().backward()
    grads = [p.grad for p in layer.adapter_parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for parameter, grad in zip(layer.adapter_parameters(), grads, strict=True):
        assert_same_bits(parameter.grad, grad)  # type: ignore[arg-type]


def test_bad_input() -> None:
    for r in (0, 13):
        with pytest.raises(ConfigError, match=rf"^up_proj: r.* {r}"):
            SPPLinear(sparse_linear(), r=r, where="up_proj")
    with pytest.raises(ConfigError, match="scaling"):
        SPPLinear(sparse_linear(), scaling=-2.0)
    with pytest.raises(TargetError, match="Embedding"):
        SPPLinear(nn.Embedding(4, 4))  # type: ignore[arg-type]
    bad = sparse_linear()
    bad.weight.data[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the layer\.weight holds 1 NaN"):
        SPPLinear(bad, r=2, where="the layer")
    assert bad.weight.requires_grad
    parametrized = torch.nn.utils.parametrizations.weight_norm(sparse_linear())
    with pytest.raises(TargetError, match="parametrization"):
        SPPLinear(parametrized, r=2)
    with pytest.raises(TargetError, match="int8"):
        integer = sparse_linear()
        integer.weight = nn.Parameter(torch.ones(12, 8, dtype=torch.int8), requires_grad=False)
        SPPLinear(integer, r=2)
    layer = trained(sparse_linear())
    layer.spp_alpha.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        layer.merge()
    assert SPPConfig().r == 16


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (8,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_outputs_may_be_written_to(shape: tuple[int, ...], bias: bool, trained: bool) -> None:
    torch.manual_seed(0)
    layer = SPPLinear(nn.Linear(8, 6, bias=bias), r=2)
    if trained:
        nn.init.normal_(layer.spp_beta)
    x = torch.randn(shape)
    layer(x).mul(3).add(1).square().sum().backward()
    expected = [p.grad.clone() for p in layer.adapter_parameters()]
    for p in layer.adapter_parameters():
        p.grad = None
    layer(x).mul_(3).add_(1).square().sum().backward()  # as some models do with what a linear returns
    for p, grad in zip(layer.adapter_parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)


def test_every_write_to_the_adapter_that_torch_counts_shows_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = SPPLinear(torch.nn.Linear(35, 13), r=3).eval()
    layer.spp_beta.data.normal_()
    x = torch.randn(2, 35)
    with torch.no_grad():
        layer(x)
        for parameter in layer.adapter_parameters():
            for index in range(parameter.numel()):
                kept = layer._cached
                assert kept is not None
                layer(x)
                assert layer._cached is kept
                parameter.view(-1)[index] += 1.0
                found = layer(x)
                assert layer._cached is not kept
                assert_same_bits(found, torch.nn.functional.linear(x, layer.effective_weight(), layer.bias))
        layer.scaling = 0.5
        assert_same_bits(layer(x), torch.nn.functional.linear(x, layer.effective_weight(), layer.bias))
        layer.spp_beta = torch.nn.Parameter(torch.zeros_like(layer.spp_beta))
        assert_same_bits(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", ["dense", "packed", "pst"])
def test_the_wrapped_linear_frees_its_weight_and_gets_it_back(kind: str) -> None:
    linear = sparse_linear()
    held = {name: weakref.ref(parameter) for name, parameter in linear.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}
    layer = PSTLinear(linear) if kind == "pst" else SPPLinear(linear, r=2, packed=kind == "packed")
    assert all(p.is_meta for p in linear.parameters())
    if kind == "packed":
        gc.collect()
        assert held["weight"]() is None  # under sharding too, nothing keeps the whole weight alive
    else:
        assert layer.weight is held["weight"]()
        del layer._parameters["weight"]
        gc.collect()
        assert held["weight"]() is None
        layer.register_parameter("weight", nn.Parameter(before["weight"].clone()))
    restored = layer.restore()
    assert restored is linear and all(p.requires_grad for p in linear.parameters())
    for name, value in before.items():
        assert_same_bits(linear.get_parameter(name).detach(), value)
