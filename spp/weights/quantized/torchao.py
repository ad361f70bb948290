"""Linears whose weight torchao quantized: nn.Linear with a tensor of torchao's in the place of the weight.

Read is what has integer codes with an integer zero point a block (spp.weights.quantized.matrix): Int8WeightOnlyConfig
and, from 1 to 8 bits, IntxWeightOnlyConfig. Int4WeightOnlyConfig has zero points that are no codes, so that none stands
for 0: of 8192 pruned weights (2:4 of normal numbers, blocks of 32, torchao 0.18 on a CPU) 0 came back as zero in
float32 and 240 in bfloat16, of its HQQ form 0 and 448. The package is not imported: its tensors say what they are made
of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import TargetError
from spp.weights.quantized.matrix import QuantizedLayout, QuantizedWeight, quantize_affine

_RANGES = {getattr(torch, f"int{bits}"): (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(1, 9)}


def kind_of(module: nn.Module) -> str | None:
    """Return "torchao" for a linear whose weight is one of torchao's tensors, None for any other module."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return "torchao" if type(weight).__module__.startswith("torchao.") else None


def read(module: nn.Module, where: str, dtype: torch.dtype | None) -> QuantizedWeight:
    """Return the weight of such a linear, not checked; its codes are shared, not copied.

    Raises:
        TargetError: it is stored otherwise, or activations are quantized too.
    """
    weight: Any = module.weight
    kind = type(weight).__name__
    for name in ("act_quant_kwargs", "activation_quantization", "act_pre_scale"):
        if getattr(weight, name, None) is not None:
            raise TargetError(
                f"{where} is torchao's {kind} that quantizes activations too ({name}), which SPP does not"
            )
    codes, zeros = getattr(weight, "qdata", None), getattr(weight, "zero_point", None)
    if (zeros is not None and zeros.is_floating_point()) or hasattr(weight, "scale_and_zero"):
        raise TargetError(
            f"{where} is torchao's {kind}, in which no code stands for 0, so that pruned weights do not stay zero: "
            f"quantize with IntxWeightOnlyConfig(weight_dtype=torch.int4) or Int8WeightOnlyConfig(), whose zeros are "
            f"exact"
        )
    if codes is None or codes.dtype != torch.int8 or codes.shape != weight.shape or not hasattr(weight, "block_size"):
        raise TargetError(
            f"{where} is torchao's {kind}, which SPP does not read; of torchao's forms it reads those of "
            f"IntxWeightOnlyConfig and, from torchao 0.18 on, Int8WeightOnlyConfig"
        )
    low, high = _RANGES[getattr(weight, "target_dtype", torch.int8)]
    tall, wide = weight.block_size
    (m, n), dtype = codes.shape, weight.dtype
    layout = QuantizedLayout("affine", m, n, dtype, block=wide, block_rows=tall, low=low, high=high)
    zeros = None if zeros is None or not bool(zeros.any()) else zeros.detach().to(torch.int8).reshape(-1)
    scales = weight.scale.detach().float().reshape(-1).view(torch.int32)
    return QuantizedWeight(layout, codes.detach().contiguous(), scales, zeros)


def release(module: nn.Module) -> None:
    """Free the weight of the module, until `write`: it keeps a shell of the same form without values."""
    linear: Any = module
    parts = {name: tensor.to("meta") for name, tensor in _parts(linear.weight).items()}
    linear.weight = _parameter(linear.weight, parts, linear.weight.dtype)


def write(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Store a weight in the module, in the form that it had."""
    linear: Any = module
    parts = _parts(linear.weight)
    scale = parts["scale"]
    parts["qdata"] = quantized.codes
    parts["scale"] = quantized.scales().reshape(scale.shape).to(scale.dtype)
    if "zero_point" in parts:
        shape, dtype = parts["zero_point"].shape, parts["zero_point"].dtype
        zeros = quantized.nested if quantized.nested is not None else torch.zeros(shape, device=quantized.device)
        parts["zero_point"] = zeros.reshape(shape).to(dtype)
    linear.weight = _parameter(linear.weight, parts, quantized.dtype)


def quantize(layout: QuantizedLayout, weight: Tensor, *, asymmetric: bool) -> QuantizedWeight:
    """Quantize a dense weight (m, n) in the form of a layout."""
    codes, scales, zeros = quantize_affine(layout, weight, asymmetric=asymmetric)
    return QuantizedWeight(layout, codes, scales.view(torch.int32), zeros if bool(zeros.any()) else None)


def _parts(weight: Any) -> dict[str, Tensor]:
    names, _ = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}


def _parameter(like: Any, parts: dict[str, Tensor], dtype: torch.dtype) -> nn.Parameter:
    """Return a Parameter of the same class and settings as another, of other tensors."""
    _, settings = like.__tensor_flatten__()
    settings = settings | ({"dtype": dtype} if "dtype" in settings else {})
    made = type(like).__tensor_unflatten__(parts, settings, like.size(), like.stride())
    return nn.Parameter(made, requires_grad=False)
