"""Quantized weights block by block against bitsandbytes' own dequantization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spp.errors import ConfigError, NonFiniteError
from spp.weights import quantize_like, read_quantized, release_quantized, write_quantized
from tests.helpers.quantized import FORMS, own_dense, quantize_linear

pytest.importorskip("bitsandbytes")
SHAPES = [(48, 128), (33, 192), (16, 40), (7, 128), (128, 24)]  # rows that blocks of 64 divide, and rows they do not


def linear(m: int, n: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(m * n)
    layer = nn.Linear(n, m, bias=False)
    weight = torch.randn(m, n, generator=generator) * (torch.rand(m, n, generator=generator) > 0.5)
    weight[m // 2] = 0  # a row, and blocks, without anything
    layer.weight = nn.Parameter(weight.to(dtype))
    return layer


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_are_those_of_bitsandbytes(form: dict, shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = linear(*shape, dtype)
    layer = quantize_linear(dense, **form)
    expected = own_dense(layer).to(dtype)
    weight = read_quantized(layer, "w", dtype)
    assert weight.dtype == dtype and weight.shape == shape
    assert torch.equal(weight.dense(), expected)
    assert bool((expected[dense.weight == 0] == 0).all()), "pruned weights stayed zero"
    for rows, cols in [(slice(0, 3), slice(None)), (slice(2, 7), slice(5, 21)), (slice(None), slice(16, 24))]:
        block = expected[rows, cols]
        out = torch.full(block.shape, torch.nan, dtype=dtype)
        assert torch.equal(weight.decode(rows, cols, out), block)
    kept = expected[expected != 0].abs().min()
    assert 0 < weight.bounds()[weight.bounds() != 0].abs().min() <= kept * (1 + 1e-6), "a bound from below"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_released_and_written_back_it_is_the_same_layer(form: dict) -> None:
    layer = quantize_linear(linear(48, 128), **form)
    before, x = own_dense(layer), torch.randn(3, 128)
    output = layer(x)
    weight = read_quantized(layer, "w", torch.float32)
    release_quantized(layer)
    assert layer.weight.is_meta
    write_quantized(layer, weight)
    assert torch.equal(own_dense(layer), before)
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_the_order_that_bitsandbytes_chooses_for_some_cpus(form: dict) -> None:
    import bitsandbytes as bnb

    layer = quantize_linear(linear(64, 128), **form)
    before = read_quantized(layer, "w", torch.float32)
    exact, scales = before.dense(), before.scales()
    state = layer.weight.quant_state
    layer.weight.data, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    stored, absmax = layer.weight.data.clone(), state.absmax.clone()
    expected = torch.where(exact == 0, 0.0, exact / scales.repeat_interleave(64).view(64, 128))
    expected = expected * scales.bfloat16().float().repeat_interleave(64).view(64, 128)
    for _ in range(2):  # reading changes nothing
        weight = read_quantized(layer, "w", torch.float32)
        torch.testing.assert_close(weight.dense(), expected, rtol=1e-6, atol=0)
        assert torch.equal(layer.weight.data, stored) and torch.equal(state.absmax, absmax)
        assert state.packing_format_for_cpu and state.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantizing_again_gives_the_same_numbers(form: dict) -> None:
    dense = linear(48, 128)
    weight = read_quantized(quantize_linear(dense, **form), "w", torch.float32)
    # bitsandbytes rounds to float16 before its 8 bits, this does not: compared on numbers that are quantized already.
    source = weight.dense() if form["form"] == "int8" else dense.weight
    again = quantize_like(weight.layout, source, "w")
    assert again.layout == weight.layout
    assert torch.equal(again.codes.view(-1), weight.codes.view(-1))
    torch.testing.assert_close(again.dense(), weight.dense(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=str)
def test_scales_that_are_not_finite_are_refused(form: dict) -> None:
    layer = quantize_linear(linear(48, 128), **form)
    scales = layer.weight.SCB if form["form"] == "int8" else layer.weight.quant_state.absmax
    scales[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"q_proj holds 1 scales that are NaN"):
        read_quantized(layer, "q_proj")


def test_a_layer_that_is_not_quantized_yet() -> None:
    import bitsandbytes as bnb

    with pytest.raises(ConfigError, match="not quantized yet"):
        read_quantized(bnb.nn.Linear4bit(64, 8, bias=False), "w")
    with pytest.raises(ConfigError, match="not quantized yet"):
        read_quantized(bnb.nn.Linear8bitLt(64, 8, bias=False, has_fp16_weights=False), "w")
