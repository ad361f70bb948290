"""Small models that bitsandbytes quantized, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models import projections, prune_nm_, tiny_llama

FORMS: list[dict[str, Any]] = [
    {"form": "nf4"},
    {"form": "nf4", "nested": True},
    {"form": "fp4"},
    {"form": "int8"},
]


def quantize_linear(linear: nn.Linear, form: str, nested: bool = False) -> nn.Linear:
    """bitsandbytes' own layer with the linear's weight, quantized by bitsandbytes."""
    import bitsandbytes as bnb

    n, m, bias = linear.in_features, linear.out_features, linear.bias is not None
    if form == "int8":
        quantized = bnb.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)
    else:
        quantized = bnb.nn.Linear4bit(
            n, m, bias=bias, compute_dtype=linear.weight.dtype, compress_statistics=nested, quant_type=form
        )
    quantized = quantized.to(linear.weight.dtype) if bias else quantized
    quantized.load_state_dict(linear.state_dict(), strict=False)
    if form != "int8":
        quantized.weight = bnb.nn.Params4bit(
            linear.weight.detach().clone(), requires_grad=False, compress_statistics=nested, quant_type=form
        )
    return quantized.to("cpu")


def own_dense(linear: Any) -> torch.Tensor:
    """The weight that bitsandbytes' format describes: the oracle.

    Not by bitsandbytes' dequantize_4bit: 0.50 returns other numbers on a CPU with AVX-512 where a block of 64 weights
    begins in one row and ends in the next.
    """
    import bitsandbytes as bnb

    if isinstance(linear, bnb.nn.Linear4bit):
        state, data = linear.weight.quant_state, linear.weight.data.view(-1)
        scales = state.absmax
        if state.nested:
            scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
        codes = torch.stack([data >> 4, data & 15], 1).view(-1)[: state.shape.numel()].long()
        flat = state.code[codes] * scales.float().repeat_interleave(state.blocksize)[: len(codes)]
        return flat.view(state.shape).to(state.dtype)
    scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    return bnb.functional.int8_vectorwise_dequant(linear.weight.data, scales)


def quantized_llama(form: str = "nf4", nested: bool = False, **overrides: object) -> Any:
    """A tiny Llama at 2:4 whose projections bitsandbytes quantized."""
    model = prune_nm_(tiny_llama(**overrides))
    for path, linear in projections(model).items():
        parent, _, name = path.rpartition(".")
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), name, quantize_linear(linear, form, nested))
    return model


TORCHAO_FORMS = ("int8", "int8 all", "int8 group", "int4", "int4 group", "int4 asymmetric", "int2 group")


def torchao_config(form: str) -> Any:
    """torchao's config for the name of a form."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor

    dtype, _, rest = form.partition(" ")
    if dtype == "int8":  # set_inductor_config would change how the whole process multiplies
        granularity = {"": PerRow(), "all": PerTensor(), "group": PerGroup(32)}[rest]
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, dtype),
        granularity=PerGroup(32) if rest else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC if rest == "asymmetric" else MappingType.SYMMETRIC,
    )


def torchao_llama(form: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Any:
    """A tiny Llama at 2:4 whose projections torchao quantized."""
    from torchao.quantization import quantize_

    model = prune_nm_(tiny_llama(**overrides)).to(dtype)
    quantize_(model, torchao_config(form), filter_fn=lambda module, path: path in projections(model))
    return model
