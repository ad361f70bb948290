"""A linear layer whose weight is packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, TargetError
from spp.kernels import PackedSource, base_linear
from spp.offload_hooks import move_hook
from spp.packed import (
    DTYPES,
    PackedHolder,
    PackedWeight,
    QuantizedLayout,
    QuantizedWeight,
    release_quantized,
    write_quantized,
)
from spp.targets_layout import features, input_axis_of, is_conv1d

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class PackedLinear(PackedHolder):
    """A frozen linear layer whose weight is packed: Y = X Wᵀ + b, W decoded a block at a time.

    Nothing of size m × n is kept, so each call decodes: for a few tokens that costs more than the product does.

    Args:
        linear: the nn.Linear (or subclass, or transformers' Conv1D) that lets go of its dense weight.
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

    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Module, packed: PackedWeight | QuantizedWeight | None = None, *, where: str = "PackedLinear"
    ) -> None:
        super().__init__()
        if packed is None:
            check_packable(linear, where)
        self.out_features, self.in_features = features(linear)
        self.input_axis = input_axis_of(linear)
        self.hold_packed(packed or pack_linear(linear, where))
        self._parameters["bias"] = linear._parameters["bias"]  # as it is, also where accelerate makes new ones empty
        self.weight_requires_grad = linear.get_parameter("weight").requires_grad
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
        return base_linear(x, PackedSource(self.packed_matrix()), self.bias)

    def linear(self) -> nn.Module:
        """Return the module that was packed, without its weight."""
        return self._linear[0]

    def restore(self, *, dense: bool = False) -> nn.Module:
        """Return the module that was packed, with its weight as it had it.

        Args:
            dense: in place of a quantized one an nn.Linear with the dequantized weight.
        """
        original = self._linear[0]
        if not isinstance(self.packed_layout, QuantizedLayout):
            original.register_parameter("weight", nn.Parameter(self.weight, requires_grad=self.weight_requires_grad))
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
    if torch.nn.utils.parametrize.is_parametrized(linear):
        raise TargetError(
            f"{where} has a parametrization; make it permanent first with "
            f"torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = linear.get_parameter("weight")
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
