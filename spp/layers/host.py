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

from spp.errors import ConfigError, TargetError, some_of
from spp.kernels import base_linear
from spp.models.projection import features, input_axis_of, is_conv1d
from spp.weights import (
    DTYPES,
    HoldsWeight,
    PackedWeight,
    QuantizedWeight,
    Weight,
    quantized_kind,
    release_quantized,
    write_quantized,
)
from spp.weights.holder import PACKED
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
            cls.call = staticmethod(torch.compiler.disable(lambda function, *args, **kwargs: function(*args, **kwargs)))


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

    def sizes(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


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


# ---- The host that is no more than that: a linear whose weight is packed.


class PackedLinear(LinearHost):
    """A frozen linear layer whose weight is packed: Y = X Wᵀ + b, W decoded a block at a time.

    Nothing of size m × n is kept, so each call decodes: for a few tokens that costs more than the product does.

    Args:
        linear: the nn.Linear (or subclass, or transformers' Conv1D) whose dense weight is freed.
        packed: its weight, packed already (then `linear` may be on the meta device) or quantized; None packs it.
        where: the layer's name in error messages.

    Attributes:
        weight: a dense copy (m, n), of a Conv1D (n, m), decoded at each access. bias: (m,) or None.

    Raises:
        TargetError: `linear` is no linear layer of float64, float32, bfloat16 or float16 weights.
        ConfigError: its weight is on the meta device.

    Example:
        >>> layer = PackedLinear(nn.Linear(8, 4))
        >>> layer(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    save_refusal = PACKED

    def __init__(
        self, linear: nn.Module, packed: PackedWeight | QuantizedWeight | None = None, *, where: str = "PackedLinear"
    ) -> None:
        super().__init__()
        if packed is None:
            check_packable(linear, where)
        self.take(linear, packed or pack_linear(linear, where))
        self.release()

    def forward(self, x: Tensor) -> Tensor:
        return base_linear(x, self.held(), self.bias)


def pack_linear(linear: nn.Module, where: str) -> PackedWeight:
    """Return the packed weight of a linear or Conv1D."""
    weight = linear.get_parameter("weight")
    return PackedWeight.pack(weight if input_axis_of(linear) == -1 else weight.T, f"{where}.weight")


def check_packable(linear: nn.Module, where: str) -> None:
    """Raise unless `linear` can be packed: a linear layer with a plain floating-point weight that is in memory."""
    if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
        raise TargetError(
            f"{where} is a {type(linear).__name__}; torch.nn.Linear, its subclasses and transformers' Conv1D are packed"
        )
    refuse_parametrization(linear, where)
    check_packable_weight(linear.get_parameter("weight"), f"{where}.weight")


def refuse_parametrization(module: nn.Module, where: str) -> None:
    """Raise a TargetError for a module that computes its weight from other parameters."""
    parts = [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if n.startswith("weight_")]
    if parts and isinstance(module.__dict__.get("weight"), Tensor):  # set by a hook before each call
        raise TargetError(
            f"{where}.weight is computed from {some_of(parts)} before each call; make it permanent first with "
            f"torch.nn.utils.prune.remove(module, 'weight'), remove_weight_norm or remove_spectral_norm"
        )
    if torch.nn.utils.parametrize.is_parametrized(module):
        names = [name for name, _ in module.parametrizations.named_children()]  # type: ignore[union-attr]
        raise TargetError(
            f"{where} has a parametrization on {', '.join(names)}; make it permanent first "
            f"with torch.nn.utils.parametrize.remove_parametrizations"
        )


def check_packable_weight(weight: Tensor, where: str) -> None:
    """Raise unless a weight is floating-point and in memory."""
    if weight.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TargetError(f"{where} is {weight.dtype}: {known} weights are packed, quantized ones are not")
    if weight.is_meta:
        raise ConfigError(f"{where} is on the meta device and has no values to pack; load the model first")
