"""How every method puts layers of its own into a model: SPP in spp.wrapping.wrap, PST in spp.pst.

    Wrapping.put_in     the layers go in, everything that they do not train is frozen
    Wrapping.take_out   other modules go in their place, requires_grad flags are what they were

A layer that no checkpoint can hold says so in `save_refusal`: save_pretrained is an error while one is in the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, WrapError
from spp.models.targets import require_model
from spp.weights import quantized_kind
from spp.weights.base_values import BaseVerdict

# ---- What a model remembers while some of its modules are replaced, whoever replaces them: flags, hooks, what it
# refuses.
#
#     begin    the layers go in, everything that they do not train is frozen
#     end      other modules go in their place, flags are what they were
#
# A layer that no checkpoint can hold says so in `save_refusal`: save_pretrained is an error while one is in the model.


@dataclass
class WrapState:
    """The state of a wrapped model.

    Attributes:
        config: how it was wrapped.
        requires_grad: the flags of its parameters before, by name.
        base: what a loaded adapter says of the base.
    """

    config: Any
    requires_grad: dict[str, bool]
    base: BaseVerdict = field(default_factory=BaseVerdict)

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> WrapState:
        """Return the state of a model that is about to be wrapped."""
        return cls(config, {name: p.requires_grad for name, p in model.named_parameters()})

    def restore_flags(self, model: nn.Module) -> None:
        """Give the parameters the flags that they had."""
        for name, parameter in model.named_parameters():
            if name in self.requires_grad:
                parameter.requires_grad_(self.requires_grad[name])


def begin(
    model: nn.Module, name: str, state: WrapState, layers: Mapping[int, Any], trained: Iterable[nn.Module] = ()
) -> None:
    """Freeze a model and put layers into it.

    Args:
        name: of the attribute that keeps the state.
        layers: {id of a module: what takes its place}.
        trained: modules that are to train as a whole.
    """
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    replace_modules(model, layers)
    setattr(model, name, state)
    guard_saving(model)
    _install_input_gradients(model)


def end(model: nn.Module, name: str, replacements: Mapping[int, Any]) -> None:
    """Put other modules in the place of the layers, and forget that there were any; arguments as for `begin`."""
    replace_modules(model, replacements)
    state: WrapState = getattr(model, name)
    state.restore_flags(model)
    delattr(model, name)
    guard_saving(model)
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, InputGradients)]:
            del module._forward_hooks[key]


def replace_modules(model: nn.Module, replacements: Mapping[int, Any]) -> None:
    """Exchange submodules by identity, under every name that they have."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


def uncompiled(model: Any) -> Any:
    """Return the model inside of torch.compile(model), any other model as it is: names and state are its own."""
    require_model(model)
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) and type(model).__name__ == "OptimizedModule" else model


def layer_generator(seed: int, path: str) -> torch.Generator:
    """Return the generator of one layer, keyed by (seed, module path): the same on any device, in any order."""
    digest = hashlib.sha256(f"{seed}\0{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def guard_saving(model: nn.Module) -> None:
    """Make save_pretrained an error while a layer of the model refuses it, and what it was as soon as none does."""
    if not hasattr(model, "save_pretrained"):
        return
    model.__dict__.pop("save_pretrained", None)
    refusals = (getattr(module, "save_refusal", None) for module in model.modules())
    refusal = next((text for text in refusals if text), None)
    if refusal is not None:
        model.save_pretrained = partial(_refuse, refusal)  # type: ignore[assignment]


def _refuse(refusal: str, *args: object, **kwargs: object) -> NoReturn:
    raise WrapError(refusal)


class InputGradients:
    """A forward hook on the input embedding: its output requires a gradient while the model checkpoints activations.

    With everything below the first adapter frozen, a reentrant checkpoint would otherwise cut the graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        """Mark the embedding's output; in place, it has no history yet."""
        if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
            return
        # transformers' property of that name changed, the flags of its modules did not
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if self.model.training and torch.is_grad_enabled() and checkpointing:
            output.requires_grad_(True)


def _install_input_gradients(model: nn.Module) -> None:
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        embedding = None
    if isinstance(embedding, nn.Module):
        embedding.register_forward_hook(InputGradients(model))


# ---- Models that transformers quantized: which are adapted, and what becomes of their marks when they no longer are.


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
