"""Checkpoints in the formats of other tools: a tiny pruned model, its projections stored as each of them does it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]


def codes(m: int, n: int, bits: int = 4) -> Tensor:
    """Some packed codes of a matrix (m, n): int32."""
    return torch.arange(m * n * bits // 32, dtype=torch.int32).view(m, n * bits // 32)


def _gptq(w: Tensor) -> Parts:
    m, n = w.shape
    return {
        ".qweight": codes(n, m).reshape(n // 8, m),
        ".qzeros": codes(2, m),
        ".scales": torch.ones(2, m, dtype=torch.float16),
        ".g_idx": torch.arange(n, dtype=torch.int32) // (n // 2),
    }


def _awq(w: Tensor) -> Parts:
    m, n = w.shape
    return {".qweight": codes(n, m), ".qzeros": codes(2, m), ".scales": torch.ones(2, m, dtype=torch.float16)}


def _fp8(w: Tensor) -> Parts:
    return {".weight": w.to(torch.float8_e4m3fn), ".weight_scale_inv": torch.ones(1, 1)}


def _float_quantized(w: Tensor) -> Parts:
    return {".weight": w.to(torch.float8_e4m3fn), ".weight_scale": torch.ones(w.shape[0], 1)}


def _int_quantized(w: Tensor) -> Parts:
    return {".weight": (w * 100).to(torch.int8), ".weight_scale": torch.ones(w.shape[0], 1)}


def _pack_quantized(w: Tensor) -> Parts:
    return {
        ".weight_packed": codes(*w.shape),
        ".weight_scale": torch.ones(w.shape[0], 2),
        ".weight_shape": torch.tensor(w.shape),
    }


def _nvfp4(w: Tensor) -> Parts:
    m, n = w.shape
    return {
        ".weight_packed": torch.ones(m, n // 2, dtype=torch.uint8),
        ".weight_scale": torch.ones(m, n // 16).to(torch.float8_e4m3fn),
        ".weight_global_scale": torch.ones(1),
    }


def _sparse(w: Tensor) -> Parts:
    m, n = w.shape
    places = (w != 0).view(m, n // 8, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    kept = (w != 0).sum(1)
    return {
        ".compressed": w[w != 0].clone(),
        ".bitmask": places.sum(2, dtype=torch.uint8),
        ".shape": torch.tensor([m, n]),
        ".row_offsets": kept.cumsum(0) - kept,
    }


def _sparse_24(w: Tensor) -> Parts:
    parts = _sparse(w)
    return {
        ".compressed": parts[".compressed"].view(len(w), -1),
        ".bitmask": parts[".bitmask"],
        ".shape": parts[".shape"],
    }


def _mlx(w: Tensor) -> Parts:
    m, n = w.shape
    return {
        ".weight": codes(m, n).view(torch.uint32),
        ".scales": torch.ones(m, n // 32),
        ".biases": torch.ones(m, n // 32),
    }


def _torchao(w: Tensor) -> Parts:
    return {".weight_qdata": (w * 100).to(torch.int8), ".weight_scale": torch.ones(w.shape[0])}


def _torchao_5(w: Tensor) -> Parts:
    return {"._weight_qdata": (w * 100).to(torch.int8), "._weight_scale": torch.ones(w.shape[0])}


def _hqq(w: Tensor) -> Parts:
    m, n = w.shape
    return {".W_q": torch.ones(m // 2, n, dtype=torch.uint8), ".scale": torch.ones(m, 1), ".zero": torch.ones(m, 1)}


def _bitnet(w: Tensor) -> Parts:
    m, n = w.shape
    return {".weight": torch.ones(m // 4, n, dtype=torch.uint8), ".weight_scale": torch.ones(1)}


def _eetq(w: Tensor) -> Parts:
    return {".weight": (w.T * 100).to(torch.int8).contiguous(), ".weight_scales": torch.ones(w.shape[0])}


def _bnb4(w: Tensor) -> Parts:
    m, n = w.shape
    return {
        ".weight": torch.ones(m * n // 2, 1, dtype=torch.uint8),
        ".weight.absmax": torch.ones(m * n // 64),
        ".weight.quant_map": torch.ones(16),
    }


def _bnb8(w: Tensor) -> Parts:
    return {".weight": (w * 100).to(torch.int8), ".SCB": torch.ones(w.shape[0])}


# {name: (what replaces a projection, config.json's entries)}; a second row of a format lacks the config's word.
_CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
FORMATS: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any]]] = {
    "gptq": (_gptq, {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}}),
    "awq": (_awq, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}}),
    "fp8": (_fp8, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
    "float-quantized": (_float_quantized, {"quantization_config": {**_CT, "format": "float-quantized"}}),
    "int-quantized": (_int_quantized, {"quantization_config": {**_CT, "format": "int-quantized"}}),
    "pack-quantized": (_pack_quantized, {"quantization_config": {**_CT, "format": "pack-quantized"}}),
    "nvfp4-pack-quantized": (_nvfp4, {"quantization_config": {**_CT, "format": "nvfp4-pack-quantized"}}),
    "sparse-bitmask": (
        _sparse,
        {"quantization_config": {**_CT, "format": "dense", "sparsity_config": {"format": "sparse-bitmask"}}},
    ),
    "sparse-24-bitmask": (_sparse_24, {"compression_config": {"sparsity_config": {"format": "sparse-24-bitmask"}}}),
    "mlx": (_mlx, {"quantization": {"group_size": 32, "bits": 4}}),
    "torchao": (_torchao_5, {"quantization_config": {"quant_method": "torchao", "quant_type": {}}}),
    "hqq": (_hqq, {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}),
    "bitnet": (_bitnet, {"quantization_config": {"quant_method": "bitnet"}}),
    "eetq": (_eetq, {"quantization_config": {"quant_method": "eetq", "weights": "int8"}}),
    "modelopt": (_nvfp4, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
    "bnb4": (
        _bnb4,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
    ),
    "bnb8": (_bnb8, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
}


def store(base: Path, out: Path, name: str, *, config: bool = True, only: str = "_proj.weight") -> Path:
    """Copy a checkpoint with its projections in a format.

    Args:
        config: whether config.json says so.
        only: the end of the keys that are stored so.
    """
    replace, says = FORMATS[name]
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("sparsity.json", "*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for key, w in load_file(base / "model.safetensors").items():
        if key.endswith(only):
            path = key.removesuffix(".weight")
            tensors |= {path + part: t.contiguous() for part, t in replace(w).items()}
        else:
            tensors[key] = w
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    if config:
        values = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**values, **says}))
    return out
