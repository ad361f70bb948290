"""Linears of bitsandbytes: recognised, read, put back and made again. The package is imported where it is used."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, TargetError
from spp.weights.quantized.matrix import QuantizedLayout, QuantizedWeight


def kind_of(module: nn.Module) -> str | None:
    """Return "4bit" or "8bit" for a linear of bitsandbytes, None for any other module."""
    kinds = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}
    names = [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("bitsandbytes.")]
    return next((kinds[name] for name in names if name in kinds), None)


def read(module: nn.Module, where: str, dtype: torch.dtype | None) -> QuantizedWeight:
    """Return the weight of a bitsandbytes linear, not checked."""
    weight: Any = module.weight
    return (_read_4bit if kind_of(module) == "4bit" else _read_8bit)(module, weight, where, dtype)


def release(module: nn.Module) -> None:
    """Free the weight of the module, until `write`."""
    linear: Any = module
    linear.weight = nn.Parameter(torch.empty(linear.weight.shape, device="meta"), requires_grad=False)
    if kind_of(module) == "4bit":
        linear.quant_state = None
    else:
        linear.state.CB = linear.state.SCB = None


def write(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Store a weight in a bitsandbytes linear, in its own form."""
    import bitsandbytes as bnb

    linear: Any = module
    layout, codes = quantized.layout, quantized.codes
    if layout.form == "int8":
        scales = quantized.scales()
        linear.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        linear.state.CB = linear.state.SCB = None
        return
    state_class: Any = bnb.functional.QuantState
    common = {"quant_type": layout.form, "shape": torch.Size(quantized.shape), "dtype": layout.dtype}
    code = bnb.functional.get_4bit_type(layout.form, device=codes.device)
    if quantized.nested is None:
        state = state_class(absmax=quantized.scales(), blocksize=layout.block, code=code, **common)
    else:
        table = quantized.nested.view(torch.float32)
        inner = state_class(absmax=table[257:], blocksize=layout.nested, code=table[:256], dtype=torch.float32)
        absmax, offset = quantized.scale_bits, table[256]
        state = state_class(absmax=absmax, blocksize=layout.block, code=code, offset=offset, state2=inner, **common)
    linear.weight = bnb.nn.Params4bit(
        codes.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=layout.block,
        compress_statistics=quantized.nested is not None,
        quant_type=layout.form,
        bnb_quantized=True,
        module=linear,
    )
    linear.quant_state = state


def quantize(layout: QuantizedLayout, weight: Tensor) -> QuantizedWeight:
    """Quantize a dense weight (m, n) in the form of a layout."""
    import bitsandbytes as bnb

    if layout.form == "int8":
        # One float32 row maximum a row; a row of zeros has scale 0. No outlier columns: every weight is in the codes.
        scales = weight.detach().float().abs().amax(1)
        steps = torch.where(scales == 0, torch.ones_like(scales), scales)
        codes = (weight.detach().float() * (127 / steps)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return QuantizedWeight(layout, codes, scales.view(torch.int32))
    data, state = bnb.functional.quantize_4bit(
        weight.detach().contiguous(),
        blocksize=layout.block,
        compress_statistics=layout.nested > 0,
        quant_type=layout.form,
    )
    return _of_state(layout.rows, layout.cols, data, state, layout.dtype)


def _read_4bit(module: Any, weight: Any, where: str, dtype: torch.dtype | None) -> QuantizedWeight:
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ConfigError(f"{where} is a Linear4bit that is not quantized yet: move it to its device first")
    data = weight.data
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _as_stored(data, state)
    if state.quant_type not in ("nf4", "fp4") or int((state.code == 0).sum()) == 0:
        raise TargetError(f"{where} is quantized as {state.quant_type}, whose table has no exact zero: pruned weights")
    if data.dtype != torch.uint8:
        raise TargetError(f"{where} stores its 4-bit weight in {data.dtype}; load it with bnb_4bit_quant_storage=uint8")
    return _of_state(module.out_features, module.in_features, data, state, state.dtype)


def _as_stored(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return codes and state in the usual form of what bitsandbytes has put in another order for some CPUs.

    It does so in the first evaluation, and rounds the scales to bfloat16, one a block, transposed. The module's own
    state stays as it is: bitsandbytes would change it in place.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    usual = copy.copy(state)
    usual.original_nested = False  # the nested scales are gone: quantizing them anew would round once more
    data, usual = _convert_weight_packed_for_cpu_inverse(data, usual)
    usual.absmax = state.absmax.T.reshape(-1)
    return data, usual


def _of_state(rows: int, cols: int, data: Tensor, state: Any, dtype: torch.dtype) -> QuantizedWeight:
    scales, nested, size = state.absmax, None, 0
    if state.nested:
        inner = state.state2
        parts = (inner.code.float(), state.offset.float().reshape(1), inner.absmax.float())
        nested, size = torch.cat([part.to(data.device) for part in parts]).view(torch.int32), inner.blocksize
    else:
        scales = scales.float().view(torch.int32)
    layout = QuantizedLayout(state.quant_type, rows, cols, dtype, state.blocksize, size)
    return QuantizedWeight(layout, data.detach().view(-1), scales, nested)


def _read_8bit(module: Any, weight: Any, where: str, dtype: torch.dtype | None) -> QuantizedWeight:
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    if weight.dtype != torch.int8 or scales is None:
        raise ConfigError(f"{where} is a Linear8bitLt that is not quantized yet: move it to its device first")
    chosen = dtype or (torch.float32 if module.bias is None else module.bias.dtype)
    layout = QuantizedLayout("int8", module.out_features, module.in_features, chosen)
    return QuantizedWeight(layout, weight.data, scales.detach().float().view(torch.int32))
