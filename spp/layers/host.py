"""A module in the place of a linear: it takes the linear's weight, bias, hooks and mode, and gives them back.

take      the module holds the linear's Parameters, or its weight packed or quantized
release   the linear keeps placeholders on the meta device: nothing but the module holds the weight
restore   the linear again, with the weight and bias as they are now
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spp.models.projection import features, input_axis_of
from spp.weights import HoldsWeight, QuantizedWeight, Weight, quantized_kind, release_quantized, write_quantized
from spp.weights.offload import move_hook

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Opaque:
    """One opaque call for torch.compile in place of a forward, so that its results are those of eager mode.

    Attributes:
        call: (function, its arguments) → its result; None before `prepare`.
    """

    call: ClassVar[Callable[..., Any] | None] = None

    @classmethod
    def prepare(cls) -> None:
        """Make `call`. Not at import time: torch.compiler.disable imports the compiler, which takes seconds."""
        if cls.call is None:
            cls.call = staticmethod(torch.compiler.disable(_call))


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class LinearHost(HoldsWeight):
    """A module that stands where a linear stood.

    Attributes:
        out_features, in_features: m, n.
        bias: (m,) or None.
    """

    out_features: int
    in_features: int
    bias: nn.Parameter | None

    def take(self, linear: nn.Module, packed: Weight | None = None) -> None:
        """Hold what a linear holds.

        Args:
            linear: nn.Linear or a subclass, transformers' Conv1D, or a host that holds a packed weight.
            packed: its weight in another form; None takes its Parameter.
        """
        self.out_features, self.in_features = features(linear)
        self.input_axis = input_axis_of(linear)
        self._linear = (linear,)  # in a tuple: not a submodule, so that the weight has one name
        self._requires_grad = {name: p.requires_grad for name, p in linear.named_parameters(recurse=False)}
        if isinstance(linear, LinearHost):
            self._requires_grad["weight"] = linear.weight_requires_grad
        if packed is None:  # straight into _parameters: accelerate may have register_parameter make empty ones
            self._parameters["weight"] = linear._parameters["weight"]
        else:
            self.hold_packed(packed)
        self._parameters["bias"] = linear._parameters["bias"]
        share_hooks(linear, self)
        self.training = linear.training

    def release(self) -> None:
        """Free what the linear holds, now that this module has all of it."""
        linear = self._linear[0]
        move_hook(linear, self)
        if isinstance(linear, LinearHost):
            linear.drop_weight()
        elif quantized_kind(linear):
            release_quantized(linear)
        else:
            release_parameter(linear, "weight")
        release_parameter(linear, "bias")

    def linear(self) -> nn.Module:
        """Return the module that stood here, without its weight."""
        return self._linear[0]

    @property
    def weight_requires_grad(self) -> bool:
        """Whether the weight required a gradient when it was taken: what it goes back to."""
        return self._requires_grad["weight"]

    @weight_requires_grad.setter
    def weight_requires_grad(self, flag: bool) -> None:
        self._requires_grad["weight"] = flag

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as (m, n), whatever its storage; of a packed or offloaded one a dense copy."""
        return self.held().matrix()

    def restore(self, *, dense: bool = False) -> nn.Module:
        """Return the module that stood here, with the weight and bias as they are now, flags as before.

        A host that held a packed weight comes back if the weight is packed still; after a merge it is the linear that
        had been packed. A quantized linear comes back if the weight is quantized still, else an nn.Linear.

        Args:
            dense: in place of a quantized linear too an nn.Linear, with the dequantized weight.
        """
        original: nn.Module = self._linear[0]
        held = self.held()
        if isinstance(original, LinearHost) and self.packed_layout is not None:
            original.hold_packed(held)
        elif quantized_kind(original) and isinstance(held, QuantizedWeight) and not dense:
            write_quantized(original, held)
        elif quantized_kind(original):
            original = plain_linear(original, self.weight)
        else:
            original = original.linear() if isinstance(original, LinearHost) else original
            weight = self.weight
            original.register_parameter("weight", weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
        original.register_parameter("bias", self.bias)
        move_hook(self, original)
        for name, flag in self._requires_grad.items():
            parameter = original._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(flag)
        return original.train(self.training)

    def describe(self, *facts: str) -> str:
        """Return what `repr` shows between the brackets: sizes, then `facts`, then the form of a packed weight."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        packed = () if self.packed_layout is None else (f"packed={self.packed_layout}",)
        return ", ".join((sizes, *facts, *packed))

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return self.describe()


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let a module run the hooks of another one."""
    for hooks in HOOKS:
        setattr(target, hooks, getattr(source, hooks))


def plain_linear(original: nn.Module, weight: Tensor) -> nn.Linear:
    """Return an nn.Linear in the place of another module, with its hooks and a frozen weight (m, n), without a bias."""
    m, n = weight.shape
    plain = nn.Linear(n, m, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    share_hooks(original, plain)
    return plain


def release_parameter(module: nn.Module, name: str) -> None:
    """Put a Parameter without values in the place of a module's; its memory is freed if nothing else refers to it."""
    parameter: Any = module._parameters.get(name)
    if parameter is None or parameter.is_meta:
        return
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
