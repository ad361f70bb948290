"""Formats of other tools that the weights of a directory may be in, and what can be done about each.

    config.json            quantization_config      transformers: bitsandbytes, GPTQ, AWQ, fp8, compressed-tensors, …
                           compression_config       compressed-tensors before version 0.9
                           quantization             MLX
    hf_quant_config.json   quantization             ModelOpt
    names of files         *.gguf, *.bin, *.h5, …   no safetensors at all

Names of tensors tell what no file says: spp.models.unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.errors import call
from spp.files.jsonio import read_json

PACKED = "spp_packed"  # quant_method of our own packed checkpoints
TRAINABLE = ("bitsandbytes", "torchao", PACKED)  # what spp.wrap adapts as transformers loads it
_PLAIN_CONFIGS = {  # of transformers, with which it loads plain weights
    "fp8": "FineGrainedFP8Config, its dequantize set to True",
    "mxfp4": "Mxfp4Config, its dequantize set to True",
    "compressed-tensors": "CompressedTensorsConfig, its run_compressed set to False",
}
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "mxfp4": "MXFP4", "aqlm": "AQLM", "modelopt": "ModelOpt"}
_VERIFIED = ("bitsandbytes", "gptq", "awq", "fp8")  # methods whose zeros spp.verify reads
_FILES = {  # name of a file, in full: what it holds
    r".+\.gguf": "GGUF",
    r"flax_model(-.+)?\.msgpack": "Flax's weights",
    r"tf_model(-.+)?\.h5": "TensorFlow's weights",
    r"weights\.npz": "MLX's weights",
    r".+\.nemo": "a NeMo archive",
    r".+\.onnx": "ONNX",
    r"consolidated([.-].+)?\.safetensors": "weights under the names of their authors' own code",
}
_PICKLED = re.compile(r".+\.(bin|pt|pth)")
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model).*")


@dataclass(frozen=True)
class Format:
    """How a checkpoint says that its weights are quantized or compressed.

    Attributes:
        method: as config.json writes it, in lower case: "gptq", "compressed-tensors", …
        name: for messages, with its variety: "GPTQ, 4 bits", "compressed-tensors, sparse-24-bitmask".
        said: where that was read.
        compressed: whether it is sparse storage of weights with all their digits, which is read.
    """

    method: str
    name: str
    said: str
    compressed: bool = False

    def __str__(self) -> str:
        return f"{'compressed' if self.compressed else 'quantized'} as {self.name} ({self.said})"

    @property
    def trainable(self) -> bool:
        """Whether an adapter is trained on it as transformers loads it."""
        return self.method in TRAINABLE

    @property
    def remedy(self) -> str:
        """Return what can be done where plain weights are needed."""
        if self.method == PACKED:
            return f"{call('export_dense', 'dir, out')} gives the dense checkpoint"
        made = "compressed from" if self.compressed else "quantized from"
        readable = self.compressed or self.method in _VERIFIED
        verify = f"; {call('verify', 'before, after')} compares its zeros" if readable else ""
        return f"pass the checkpoint that this one was {made}, or make it plain first: {self._plain()}{verify}"

    def _plain(self) -> str:
        if self.compressed:
            return f"{call('convert', 'dir, out')} does that"
        save = f"save it with {call('save_model')}"
        if self.method == "mlx":
            return "mlx_lm.convert with --dequantize does that"
        if self.method == "bitsandbytes":
            return f"load it with transformers, call the model's dequantize(), and {save}"
        options = _PLAIN_CONFIGS.get(self.method)
        if options is None:
            return f"load it with the tool that made it, dequantize it, and {save}"
        return f"load it with transformers' {options}, and {save}"


def stored_format(directory: Path) -> Format | None:
    """Return the format that a directory says its weights are in; None where it says none.

    Raises:
        CheckpointError: config.json is malformed.
    """
    path, other = directory / "config.json", directory / "hf_quant_config.json"
    found = format_of(read_json(path, "the model's config") if path.exists() else {})
    if found is None and other.exists():
        settings = read_json(other, "ModelOpt's config").get("quantization")
        kind = _text(settings.get("quant_algo")) if isinstance(settings, dict) else ""
        found = Format("modelopt", _joined("ModelOpt", kind), other.name)
    return found


def format_of(config: Mapping[str, Any]) -> Format | None:
    """Return the format that a model's config names; None where it names none."""
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        if settings is not None:
            return _of_settings(settings if isinstance(settings, dict) else {}, f"{key} of config.json")
    settings = config.get("quantization")
    if isinstance(settings, dict) and "bits" in settings:
        return Format("mlx", _joined("MLX", f"{settings['bits']!s:.4} bits"), "quantization of config.json")
    return None


def _of_settings(settings: Mapping[str, Any], said: str) -> Format:
    method = _text(settings.get("quant_method")).lower()
    if not method:
        known = {"load_in_4bit", "load_in_8bit"} & settings.keys()
        sparse = {"sparsity_config", "config_groups"} & settings.keys()
        method = "bitsandbytes" if known else "compressed-tensors" if sparse else ""
    method = "bitsandbytes" if method.startswith("bitsandbytes") else method
    said = f"{said}: quant_method {method!r}" if settings.get("quant_method") else said
    name = _NAMES.get(method, method or "a method without a name")
    if method == "bitsandbytes":
        bits = _text(settings.get("bnb_4bit_quant_type")) if settings.get("load_in_4bit") else "8 bits"
        return Format(method, _joined(name, bits), said)
    if method == "compressed-tensors":
        return _of_compressed_tensors(settings, said)
    bits = settings.get("bits", settings.get("w_bit"))
    kind = f"{bits} bits" if type(bits) is int else _text(settings.get("quant_algo"))
    return Format(method, _joined(name, kind), said)


def _of_compressed_tensors(settings: Mapping[str, Any], said: str) -> Format:
    sparse = settings.get("sparsity_config")
    of_zeros = _text(sparse.get("format")) if isinstance(sparse, dict) else ""
    of_values = _text(settings.get("format"))
    kinds = [kind for kind in (of_values, of_zeros) if kind not in ("", "dense")]
    quantized = of_values not in ("", "dense") or bool(settings.get("config_groups"))
    return Format("compressed-tensors", ", ".join(["compressed-tensors", *kinds]), said, compressed=not quantized)


def pickled(directory: Path) -> str | None:
    """Return what is to be done about a directory whose weights are pickled alone: a sentence; None for any other."""
    if any(directory.glob("*.safetensors")):
        return None
    names = sorted(p.name for p in directory.iterdir() if _PICKLED.fullmatch(p.name) and not _NO_WEIGHTS.match(p.name))
    if not names:
        return None
    load = f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
    return (
        f"{directory} has no model.safetensors, only {names[0]}: pickled checkpoints are not read; convert it once: "
        f"{load}.save_pretrained(out)"
    )


def other_weights(directory: Path) -> str | None:
    """Return what is to be done about a directory whose weights are for other tools: a sentence; None for any other."""
    if (directory / "model.safetensors").exists() or any(directory.glob("*.index.json")) or pickled(directory):
        return None
    for name in sorted(path.name for path in directory.iterdir()):
        kind = next((kind for pattern, kind in _FILES.items() if re.fullmatch(pattern, name)), None)
        if kind == "GGUF":
            return (
                f"{directory} has no model.safetensors, only {name}: GGUF, quantized or not, is not read; pass the "
                f"checkpoint that it was made from, or make it plain first: load it with transformers, {name} as its "
                f"gguf_file, and save it with {call('save_model')}"
            )
        if kind is not None:
            return (
                f"{directory} has no model.safetensors, only {name}: {kind}, which are not read; convert it with "
                f"transformers, and save it with save_pretrained"
            )
    return None


def _joined(name: str, kind: str) -> str:
    return f"{name}, {kind}" if kind else name


def _text(value: object) -> str:
    return value[:40] if isinstance(value, str) else ""
