"""Linears that a quantizer made: recognised, read, put back and made again, whoever quantized them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, MaskError
from spp.weights.quantized import bitsandbytes, torchao
from spp.weights.quantized.matrix import QuantizedLayout, QuantizedWeight


def quantized_kind(module: nn.Module) -> str | None:
    """Return "4bit" or "8bit" for a linear of bitsandbytes, "torchao" for one of torchao's, None for any other."""
    if type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter:
        return None  # nearly all
    return bitsandbytes.kind_of(module) or torchao.kind_of(module)


def read_quantized(module: nn.Module, where: str, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Return the weight of a quantized linear; its tensors are shared, not copied.

    Args:
        where: its name in messages.
        dtype: of W where nothing else says it: 8-bit linears of bitsandbytes without a bias do not know; None for
            float32.

    Raises:
        ConfigError: the weight is not quantized yet, or on the meta device. TargetError: a form whose zeros are not
            known to be exact. NonFiniteError: a scale is NaN or infinite.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise ConfigError(
            f"{where} is quantized and on the meta device: load the model first, its quantized layers not offloaded"
        )
    quantized = _maker(module).read(module, where, dtype)
    quantized.check(where)
    return quantized


def release_quantized(module: nn.Module) -> None:
    """Free the weight of a quantized linear, until `write_quantized`."""
    _maker(module).release(module)


def write_quantized(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Store a weight in a quantized linear, in its own form."""
    _maker(module).write(module, quantized)


def _maker(module: nn.Module) -> ModuleType:
    return torchao if quantized_kind(module) == "torchao" else bitsandbytes


def quantize_like(layout: QuantizedLayout, weight: Tensor, where: str, *, asymmetric: bool = False) -> QuantizedWeight:
    """Quantize a dense weight (m, n) in the form of a layout; the mask is asserted.

    Args:
        asymmetric: whether an affine weight has zero points of its own.

    Raises:
        MaskError: a zero did not stay one. NonFiniteError: a scale is not finite.
    """
    if layout.form == "affine":
        again = torchao.quantize(layout, weight, asymmetric=asymmetric)
    else:
        again = bitsandbytes.quantize(layout, weight)
    again.check(where)
    filled = int(((again.dense() != 0) & (weight == 0)).sum())
    if filled:
        raise MaskError(f"{where}: quantizing again would fill {filled} zeros; merge without requantize")
    return again
