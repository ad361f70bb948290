"""Small models that bitsandbytes quantized, on the CPU."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import spp
from spp.errors import SPPWarning
from spp.merging.report import MergeReport
from spp.rules.spp import row_groups
from tests.helpers.models import projections, prune_nm_, tiny_llama

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


class Recount(NamedTuple):
    """What a merge that quantized again has to report of a layer, in float64."""

    kept: int
    lost: int
    survived: float
    max_relative_change: float
    update_norm: float
    updated: int
    moved: int
    requantize_error: float


def recount(base: torch.Tensor, layer: Any, merged: torch.Tensor, stored: torch.Tensor) -> Recount:
    """Count anew what was done to a layer.

    Args:
        base, stored: dequantized by who made the format.
        layer: the SPPLinear, before the merge.
        merged: its effective weight.
    """
    before, effective, after = base.double(), merged.double(), stored.double()
    alpha, beta = (p.detach().double() for p in layer.adapter_parameters())
    update = before * layer.scaling * beta * alpha[row_groups(len(beta), len(alpha))]
    change, error = after - before, after - effective
    kept = before != 0
    return Recount(
        kept=int((after != 0).sum()),
        lost=int(((after == 0) & (effective != 0)).sum()),
        survived=float((change * update).sum() / update.square().sum()),
        max_relative_change=float((change / before)[kept].abs().max()),
        update_norm=float(update.norm()),
        updated=int((update != 0).sum()),
        moved=int(((change != 0) & (update != 0)).sum()),
        requantize_error=float(error.norm() / update.norm()),
    )


def assert_recounted(report: MergeReport, expected: dict[str, Recount]) -> None:
    """The report is of what is stored, layer by layer and over all."""
    assert report.layers.keys() == expected.keys()
    for path, found in expected.items():
        for name, value in found._asdict().items():
            assert getattr(report.layers[path], name) == pytest.approx(value, rel=1e-4, abs=1e-6), (path, name)
    square = sum(one.update_norm**2 for one in expected.values())
    inner = sum(one.survived * one.update_norm**2 for one in expected.values())
    errors = sum((one.requantize_error * one.update_norm) ** 2 for one in expected.values())
    assert report.survived == pytest.approx(inner / square, rel=1e-4)
    assert report.requantize_error == pytest.approx((errors / square) ** 0.5, rel=1e-4)
    assert (report.kept, report.lost) == (
        sum(o.kept for o in expected.values()),
        sum(o.lost for o in expected.values()),
    )


def merge_again(model: Any) -> tuple[MergeReport, list[str]]:
    """Merge with requantize; the report, and what was said."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        report = spp.merge(model, requantize=True)
    return report, [str(one.message) for one in found if issubclass(one.category, SPPWarning)]


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
