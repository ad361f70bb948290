"""A linear layer whose weight is packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, TargetError
from spp.kernels import base_linear
from spp.layers.host import LinearHost
from spp.models.projection import input_axis_of, is_conv1d
from spp.weights import DTYPES, PackedWeight, QuantizedWeight
from spp.weights.holder import PACKED


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
        """Compute Y (…, m) from x (…, n)."""
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
