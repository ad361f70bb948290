"""transformers: packed checkpoints (spp.weights.packed.disk) load by `AutoModelForCausalLM.from_pretrained`.

    import spp.integrations.transformers          # once, before
    model = AutoModelForCausalLM.from_pretrained("packed-2of4")

Registers the quantizer "spp_packed". `import spp` does not: transformers' registry takes as long to import as spp does.
The model is what `spp.load_packed` gives, an ordinary one with PackedLinear layers, for inference or for
`spp.wrap(model, packed=True)`; transformers no longer counts it as quantized, and its save_pretrained says what to call
instead. Weights that a model holds otherwise than the disk does (fused experts, GPT-2's) are not loaded this way but by
`spp.load_packed`.

Without this import transformers warns of an unknown quantization type, and then stops at packed weights, whose shapes
are not those of the model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spp.errors import ConfigError
from spp.layers.host import PackedLinear
from spp.models.disk_keys import DiskKeys
from spp.weights import PackedWeight
from spp.weights.packed.disk import FORMAT_VERSION, QUANT_METHOD, DenseReader, Descriptor, check_version
from spp.wrapping.state import guard_saving, replace_modules


@register_quantization_config(QUANT_METHOD)
class SPPPackedConfig(QuantizationConfigMixin):
    """The part of config.json that describes a packed checkpoint.

    Args:
        format_version: of the packed tensors.

    Raises:
        CheckpointError: this library does not read it.
    """

    def __init__(self, format_version: int = FORMAT_VERSION, **_: Any) -> None:
        check_version(format_version, "the model's config")
        self.quant_method = QUANT_METHOD
        self.format_version = format_version


@register_quantizer(QUANT_METHOD)
class SPPPackedQuantizer(HfQuantizer):
    """Puts PackedLinear layers in the place of linears whose weights are packed on disk; transformers fills them."""

    requires_calibration = True  # there is no packing on the way: pre-quantized only

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise a ConfigError where layers are to stay on the disk."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in devices:
            raise ConfigError("packed weights cannot be offloaded to the disk; leave it out of device_map")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return False: nothing is packed on the way."""
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return False: a loaded model is saved by spp."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether it trains: with an adapter, by spp.wrap(model, packed=True)."""
        return True

    def _process_model_before_weight_loading(self, model: Any, *, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        folders = sorted({str(Path(file).parent) for file in checkpoint_files or ()})
        if len(folders) != 1:
            raise ConfigError("a packed checkpoint is loaded from its folder, not from a state dict")
        with DenseReader(folders[0]) as reader:
            keys = DiskKeys(model, {key: reader.shape(key) for key in reader})
            layers, modules = {}, dict(model.named_modules(remove_duplicate=False))
            for key, descriptor in reader.packed.items():
                path = keys.memory[key].removesuffix(".weight")
                linear = modules.get(path)
                if keys.group_of(key) is not None or not _holds(linear, descriptor):
                    raise ConfigError(
                        f"{reader.directory}: {key} is packed, and {type(model).__name__} does not hold it as a "
                        f"torch.nn.Linear; spp.load_packed(dir) loads it"
                    )
                assert isinstance(linear, nn.Linear)
                layers[id(linear)] = PackedLinear(linear, _empty(reader, key, linear.weight.dtype), where=path)
        for layer in layers.values():
            layer.weight_requires_grad = True
        replace_modules(model, layers)
        # The descriptors, which lie under the names of the weights: nothing of the model has them.
        self._ignored = model._keys_to_ignore_on_load_unexpected  # a set, or of older versions a list
        kind: Any = list if self._ignored is None else type(self._ignored)
        patterns = [f"{re.escape(key)}$" for key in reader.packed]
        model._keys_to_ignore_on_load_unexpected = kind([*(self._ignored or ()), *patterns])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._keys_to_ignore_on_load_unexpected = self._ignored
        self.remove_quantization_config(model)
        for module in model.modules():
            getattr(module, "config", model.config).__dict__.pop("_is_quantized", None)
        guard_saving(model)
        return model


def _holds(module: nn.Module | None, descriptor: Descriptor) -> bool:
    shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None
    return shape == descriptor.shape and descriptor.input_axis == 1


def _empty(reader: DenseReader, key: str, dtype: torch.dtype) -> PackedWeight:
    """Return a packed weight without values, for transformers to give it those on disk, which are checked here."""
    stored = reader.packed_weight(key)
    values, *places = stored.tensors()
    return PackedWeight(stored.layout, *(t.to("meta") for t in (values.to("meta", dtype), *places)))
