"""What every module with a packed weight shares.

It has the buffers `weight_values`, `weight_codes` and, for patterns other than N:M, `weight_starts` (their layout:
spp.packed.layout, of experts spp.packed.stack), so that they travel with its state dict, `.to`, deepcopy and pickle;
`packed_layout` says how to read them, and `.weight` returns a dense copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, NonFiniteError
from spp.files import dtype_name
from spp.offload import values
from spp.packed.held import HeldWeight
from spp.packed.layout import Layout
from spp.packed.quantized import QuantizedLayout, QuantizedWeight
from spp.packed.stack import PackedStack, StackLayout
from spp.packed.weight import PackedWeight

NAMES = ("weight_values", "weight_codes", "weight_starts")


class PackedHolder(nn.Module):
    """A module whose frozen weight is a Parameter, or packed, or quantized, which is held in the same way.

    Attributes:
        packed_layout: how to read the packed tensors; None while the weight is a Parameter.
        input_axis: that of the dense weight as it is stored: −1, (m, n), or −2, (n, m).
    """

    packed_layout: Layout | QuantizedLayout | StackLayout | None = None
    input_axis: int = -1

    @property
    def weight(self) -> Tensor:
        """The frozen weight as it is stored; of a packed one a copy, decoded at each access; meta while offloaded."""
        if self.packed_layout is not None:
            dense = self.packed_weight().dense()
            return dense.T.contiguous() if self.input_axis == -2 and dense.dim() == 2 else dense
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError(f"{type(self).__name__} holds no weight")
        return weight

    def dense_weight(self) -> Tensor:
        """Return the frozen weight with its numbers: the Parameter; packed, a dense copy; offloaded, what is loaded."""
        return values(self) if self.packed_layout is None else self.weight

    def held(self) -> HeldWeight:
        """Return the frozen weight as it is held, whose values can be hashed."""
        if self.packed_layout is None:
            return HeldWeight.of_parameter(self)
        packed = self.packed_weight()
        if isinstance(packed, QuantizedWeight):
            return HeldWeight.of_quantized(packed)
        return HeldWeight(dtype_name(packed.dtype), packed.tensors(), lambda: self.weight)

    @property
    def stored_weight(self) -> Tensor:
        """What holds the weight's numbers, in its dtype and on its device: the Parameter, or the packed values."""
        return self.weight if self.packed_layout is None else self.packed_weight().values

    def packed_matrix(self) -> PackedWeight | QuantizedWeight:
        """Return the packed weight of a linear."""
        packed = self.packed_weight()
        assert not isinstance(packed, PackedStack)  # that of experts
        return packed

    def packed_weight(self) -> PackedWeight | QuantizedWeight | PackedStack:
        """Return the packed weight; the tensors are the module's."""
        layout, tensors = self.packed_layout, [values(self, name) for name in NAMES if name in self._buffers]
        if isinstance(layout, QuantizedLayout):
            return QuantizedWeight(layout, *tensors)
        if isinstance(layout, StackLayout):
            return PackedStack(layout, *tensors)
        assert layout is not None
        return PackedWeight(layout, *tensors)

    def hold_packed(self, packed: PackedWeight | QuantizedWeight | PackedStack) -> None:
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
