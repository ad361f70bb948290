"""How every method puts layers of its own into a model: SPP in spp.wrapping.wrap, PST in spp.pst.

    Wrapping.put_in     the layers go in, everything that they do not train is frozen
    Wrapping.take_out   other modules go in their place, requires_grad flags are what they were

A layer that no checkpoint can hold says so in `save_refusal`: save_pretrained is an error while one is in the model.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, TargetError, WrapError
from spp.models.projection import Projection, is_compiled, plain_name
from spp.models.targets import input_embedding, require_model, resolve_projections
from spp.weights import quantized_kind
from spp.weights.base_values import BaseVerdict

Layer = TypeVar("Layer", bound=nn.Module)
Config = TypeVar("Config")


@dataclass
class WrapState:
    """The state of a wrapped model.

    Attributes:
        config: how it was wrapped.
        requires_grad: the flags of its parameters before, by name.
        base: what a loaded adapter says of the base.
        loaded: the hash of a loaded adapter's parameters, and the fields of its config that say on which values it was
            trained: as long as the parameters are these, there and nowhere else.
        also: {parameter name: what trains beside the layers} (spp.wrapping.also), in module order.
    """

    config: Any
    requires_grad: dict[str, bool]
    base: BaseVerdict = field(default_factory=BaseVerdict)
    loaded: tuple[str, Mapping[str, Any]] | None = None
    also: dict[str, Any] = field(default_factory=dict)

    def restore_flags(self, model: nn.Module) -> None:
        """Give the parameters the flags that they had."""
        for name, parameter in model.named_parameters():
            if plain_name(name) in self.requires_grad:
                parameter.requires_grad_(self.requires_grad[plain_name(name)])


@dataclass(frozen=True)
class Wrapping(Generic[Config, Layer]):
    """A method: the layers that it puts into a model, and what it is called in messages.

    Args:
        attribute: of the model, where its WrapState is kept.
        config: class of its options, the first of which is a rank.
        kinds: classes of its layers.
        linear, wrap, load: public names of its layer, of what wraps a model and of what loads onto one.
        ways_out: what to do with a model that is wrapped already.
    """

    attribute: str
    config: type[Config]
    kinds: tuple[type[Layer], ...]
    linear: str
    wrap: str
    load: str
    ways_out: str

    def layers(self, model: nn.Module) -> dict[str, Layer]:
        """Return {path: layer} in module order."""
        found = uncompiled(model).named_modules()
        return {plain_name(path): module for path, module in found if isinstance(module, self.kinds)}

    def is_in(self, model: nn.Module) -> bool:
        """Whether a model holds any of the layers."""
        return any(isinstance(module, self.kinds) for module in uncompiled(model).modules())

    def require(self, model: nn.Module) -> dict[str, Layer]:
        """Return `layers(model)`; a WrapError for any object but the one that was wrapped."""
        if not hasattr(uncompiled(model), self.attribute):
            if self.is_in(model):
                raise WrapError(
                    f"this is a part or a container of a wrapped model; pass the object that {self.wrap} was given"
                )
            raise WrapError(f"the model is not wrapped; call {self.wrap}(model) or {self.load}(model, path) first")
        return self.layers(model)

    def refuse(self, model: nn.Module) -> None:
        """Raise a WrapError for a model that is wrapped already."""
        if self.is_in(model):
            raise WrapError(f"the model is wrapped already; {self.ways_out}")

    def state(self, model: nn.Module) -> WrapState:
        """Return the state of a wrapped model."""
        self.require(model)
        state: WrapState = getattr(uncompiled(model), self.attribute)
        return state

    def options(self, first: int | Config, others: Mapping[str, Any]) -> Config:
        """Return the config of a rank and other options, or the whole config that is given in the rank's place.

        Raises:
            ConfigError: an option makes no sense, or is given beside a whole config.
        """
        known = fields(self.config)  # type: ignore[arg-type]  # a dataclass
        if not isinstance(first, self.config):
            return self.config(**{known[0].name: first, **others})
        defaults = {f.name: f.default for f in known}
        given = sorted(name for name, value in others.items() if value != defaults[name])
        if given:
            raise ConfigError(
                f"{self.wrap} was given a whole {self.config.__name__} and also {', '.join(given)}; put them into the "
                "config"
            )
        return first

    def targets(self, model: nn.Module, names: Any, excluded: Any) -> dict[str, Projection]:
        """Return {path: projection} of what the layers are to replace.

        Raises:
            TargetError: nothing matches, or the model itself does.
        """
        found = resolve_projections(model, names, excluded)
        if "" in found:
            raise TargetError(
                f"the model itself is a linear, which cannot be replaced in place; use {self.linear}(linear)"
            )
        return found

    @torch.inference_mode(False)  # what is made inside it could never be trained
    def put_in(
        self,
        model: nn.Module,
        config: Config,
        targets: Mapping[str, Projection],
        make: Callable[[Projection], Layer],
        trained: Iterable[nn.Module] = (),
    ) -> dict[str, Layer]:
        """Make a layer for every target, freeze the model and put in those that take the place of a module.

        Args:
            make: makes one; if it fails, the model is left as it was.
            trained: modules that are to train as a whole.

        Returns:
            {path: layer}; those of fused experts are not in the model yet.
        """
        state = WrapState(config, {plain_name(name): p.requires_grad for name, p in model.named_parameters()})
        made: dict[str, Any] = {}
        try:
            for path, target in targets.items():
                made[path] = make(target)
        except BaseException:
            for layer in made.values():
                layer.restore()
            state.restore_flags(model)
            raise
        model.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        replace_modules(model, {id(targets[path].module): made[path] for path in made if not targets[path].fused})
        setattr(model, self.attribute, state)
        guard_saving(model)
        if (embedding := input_embedding(model)) is not None:
            embedding.register_forward_hook(InputGradients(model))
        return made

    def take_out(self, model: nn.Module, plain: Callable[[Any], nn.Module]) -> None:
        """Put what `plain` returns of each layer in its place, and forget that the model was wrapped."""
        state, model = self.state(model), uncompiled(model)
        replace_modules(model, {id(layer): plain(layer) for layer in self.layers(model).values()})
        state.restore_flags(model)
        delattr(model, self.attribute)
        guard_saving(model)
        for module in model.modules():
            for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, InputGradients)]:
                del module._forward_hooks[key]


def replace_modules(model: nn.Module, replacements: Mapping[int, Any]) -> None:
    """Exchange submodules by identity, under every name that they have; one that was compiled alone is so no longer."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            key = id(uncompiled(child))
            if key in replacements:
                parent._modules[name] = replacements[key]


def uncompiled(model: Any) -> Any:
    """Return the model inside of torch.compile(model), any other model as it is: names and state are its own."""
    require_model(model)
    return model._orig_mod if is_compiled(model) else model


@contextlib.contextmanager
def parts_uncompiled(model: nn.Module) -> Iterator[None]:
    """Have the modules that torch.compile was given in the place of what it returned, so that names are the model's."""
    places = [(parent, *item) for parent in model.modules() for item in parent._modules.items() if is_compiled(item[1])]
    try:
        for parent, name, child in places:
            parent._modules[name] = uncompiled(child)
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


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
    """Return the dtype of most values of a model's floating-point parameters; None without any."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def forget_quantizer(model: Any) -> None:
    """Take transformers' marks off a model in which nothing is quantized any more.

    One is left by its own `dequantize` too: what converted the weights when they were loaded, and has no way back, so
    that save_pretrained of transformers 5 fails.
    """
    if any(quantized_kind(module) for module in model.modules()):
        return
    if model.__dict__.get("_weight_conversions"):
        model._weight_conversions = [one for one in model._weight_conversions if _has_way_back(one)]
    if not getattr(model, "is_quantized", False):
        return
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _has_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
