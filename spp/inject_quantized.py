"""Models that transformers quantized: which are adapted, and what becomes of their marks when they no longer are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spp.errors import ConfigError
from spp.packed import quantized_kind


def check_quantizer(model: nn.Module) -> None:
    """Raise a ConfigError for a model quantized otherwise than by bitsandbytes or torchao."""
    if not getattr(model, "is_quantized", False):
        return
    method = quantization_method(model)
    if method not in ("bitsandbytes", "torchao"):
        raise ConfigError(
            f"{type(model).__name__} is quantized by {method}: SPP adapts bases that bitsandbytes or torchao "
            f"quantized, whose zeros it can check. Load the pruned checkpoint unquantized, or with BitsAndBytesConfig"
        )


def quantization_method(model: nn.Module) -> str:
    """Return transformers' name of the method that quantized a model."""
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = str(getattr(method, "value", method) or "a method without a name")
    return "bitsandbytes" if method.startswith("bitsandbytes") else method


def dtype_of_model(model: nn.Module) -> torch.dtype | None:
    """Return the dtype that most numbers of a model's floating-point parameters have; None without any."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def forget_quantizer(model: Any) -> None:
    """Take transformers' marks off a model in which nothing is quantized any more."""
    if not getattr(model, "is_quantized", False) or any(quantized_kind(module) for module in model.modules()):
        return
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
