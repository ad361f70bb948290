"""A linear layer whose weight is packed, and what every module with a packed weight shares.

A module that holds a packed weight has the buffers `weight_values`, `weight_codes` and, for patterns other than N:M,
`weight_starts` (their layout: spp.packed.layout), so that they travel with its state dict, `.to`, deepcopy and pickle;
`packed_layout` says how to read them, and `.weight` returns a dense copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.kernels import PackedSource, base_linear
from spp.offload import values
from spp.offload_hooks import move_hook
from spp.packed import (
    DTYPES,
    Layout,
    PackedWeight,
    QuantizedLayout,
    QuantizedWeight,
    give_back_pages,
    release_quantized,
    write_quantized,
)

NAMES = ("weight_values", "weight_codes", "weight_starts")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class PackedHolder(nn.Module):
    """A module whose frozen weight is a Parameter, or packed, or quantized, which is held in the same way.

    Attributes:
        packed_layout: how to read the packed tensors; None while the weight is a Parameter.
    """

    packed_layout: Layout | QuantizedLayout | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight (m, n); of a packed one a dense copy, decoded at each access; on meta while offloaded."""
        if self.packed_layout is not None:
            return self.packed_weight().dense()
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError(f"{type(self).__name__} holds no weight")
        return weight

    @property
    def stored_weight(self) -> Tensor:
        """What holds the weight's numbers, in its dtype and on its device: the Parameter, or the packed values."""
        return self.weight if self.packed_layout is None else self.packed_weight().values

    def dense_weight(self) -> Tensor:
        """Return the frozen weight with its numbers: the Parameter; packed, a dense copy; offloaded, what is loaded."""
        return values(self) if self.packed_layout is None else self.packed_weight().dense()

    def packed_weight(self) -> PackedWeight | QuantizedWeight:
        """Return the packed weight; the tensors are the module's."""
        layout, tensors = self.packed_layout, [values(self, name) for name in NAMES if name in self._buffers]
        if isinstance(layout, QuantizedLayout):
            return QuantizedWeight(layout, *tensors)
        assert layout is not None
        return PackedWeight(layout, *tensors)

    def hold_packed(self, packed: PackedWeight | QuantizedWeight) -> None:
        """Take a packed weight in place of what is held."""
        self.drop_weight()
        self.packed_layout = packed.layout
        for name, tensor in zip(NAMES, packed.tensors(), strict=False):
            self.register_buffer(name, tensor)

    def drop_weight(self) -> None:
        """Let go of the weight, in either form."""
        self._parameters.pop("weight", None)
        for name in NAMES:
            self._buffers.pop(name, None)
        self.packed_layout = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedHolder:
        """Convert or move; codes stay what they are, and the dtype that they are decoded to follows."""
        super()._apply(fn, recurse)
        if isinstance(layout := self.packed_layout, QuantizedLayout):
            self.packed_layout = replace(layout, dtype=fn(torch.empty(0, dtype=layout.dtype)).dtype)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.packed_layout is not None and any(prefix + name in state_dict for name in NAMES):
            try:
                self.packed_weight().check(f"{prefix}weight")
            except (ConfigError, NonFiniteError) as error:
                args[-1].append(str(error))  # error_msgs: load_state_dict raises with all of them


class PackedLinear(PackedHolder):
    """A frozen linear layer whose weight is packed: Y = X Wᵀ + b, W decoded a block at a time.

    Nothing of size m × n is kept, so each call decodes: for a few tokens that costs more than the product does.

    Args:
        linear: the nn.Linear (or subclass) whose weight is packed; it lets go of the dense one.
        packed: its weight, packed already (then `linear` may be on the meta device) or quantized; None packs it.
        where: the layer's name in error messages.

    Attributes:
        weight: a dense copy (m, n), decoded at each access. bias: (m,) or None.

    Raises:
        TargetError: `linear` is no linear layer of float64, float32, bfloat16 or float16 weights.
        ConfigError: its weight is on the meta device.

    Example:
        >>> layer = PackedLinear(nn.Linear(8, 4))
        >>> layer(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, packed: PackedWeight | QuantizedWeight | None = None, *, where: str = "PackedLinear"
    ) -> None:
        super().__init__()
        if packed is None:
            check_packable(linear, where)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.hold_packed(packed or PackedWeight.pack(linear.weight, f"{where}.weight"))
        self.register_parameter("bias", linear.bias)
        self.weight_requires_grad = linear.weight.requires_grad
        self._linear = (linear,)  # in a tuple: not a submodule
        for hooks in HOOKS:
            setattr(self, hooks, getattr(linear, hooks))
        self.train(linear.training)
        if isinstance(self.packed_layout, QuantizedLayout):
            release_quantized(linear)
        else:
            release_weight(linear)
        move_hook(linear, self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute Y (…, m) from x (…, n)."""
        return base_linear(x, PackedSource(self.packed_weight()), self.bias)

    def linear(self) -> nn.Linear:
        """Return the module that was packed, without its weight."""
        return self._linear[0]

    def restore(self, *, dense: bool = False) -> nn.Linear:
        """Return the module that was packed, with its weight as it had it.

        Args:
            dense: in place of a quantized one an nn.Linear with the dequantized weight.
        """
        original = self._linear[0]
        if not isinstance(self.packed_layout, QuantizedLayout):
            original.weight = nn.Parameter(self.weight, requires_grad=self.weight_requires_grad)
        elif dense:
            original = plain_linear(original, self.weight)
        else:
            write_quantized(original, self.packed_weight())  # type: ignore[arg-type]  # quantized, as its layout
        original.register_parameter("bias", self.bias)
        move_hook(self, original)
        return original.train(self.training)

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"packed={self.packed_layout}"
        )


def plain_linear(original: nn.Module, weight: Tensor) -> nn.Linear:
    """Return an nn.Linear in the place of another module, with its hooks and a frozen weight (m, n), without a bias."""
    m, n = weight.shape
    plain = nn.Linear(n, m, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    for hooks in HOOKS:
        setattr(plain, hooks, getattr(original, hooks))
    return plain


def check_packable(linear: nn.Module, where: str) -> None:
    """Raise unless `linear` can be packed: a linear layer with a plain floating-point weight that is in memory."""
    if not isinstance(linear, nn.Linear):
        raise TargetError(f"{where} is a {type(linear).__name__}; torch.nn.Linear and its subclasses are packed")
    if torch.nn.utils.parametrize.is_parametrized(linear):
        raise TargetError(
            f"{where} has a parametrization; make it permanent first with "
            f"torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = linear.weight
    if weight.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TargetError(f"{where}.weight is {weight.dtype}: {known} weights are packed, quantized ones are not")
    if weight.is_meta:
        raise ConfigError(f"{where}.weight is on the meta device and has no values to pack; load the model first")


def release_weight(linear: nn.Module) -> None:
    """Put a Parameter without values in the place of a module's weight, whose memory is free if nobody else uses it."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    linear.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
    storage = weight.untyped_storage() if type(weight) in (Tensor, nn.Parameter) and not weight.is_meta else None
    del weight
    if storage is not None:
        give_back_pages(storage)
