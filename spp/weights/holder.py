"""Modules that hold a frozen weight, whatever its form: a Parameter, packed, or quantized.

Packed, the module has the buffers `weight_values`, `weight_codes` and, for patterns other than N:M, `weight_starts`
(spp.weights.packed.layout), so that they travel with its state dict, `.to`, deepcopy and pickle; `packed_layout` says
how to read them, and `.weight` returns a dense copy.

A module in the place of a linear takes its weight, bias and hooks. The linear keeps placeholders on the meta device
until `restore`, so that nothing but the module that computes holds the weight: whatever shards, moves or frees it, does
so for good.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, NonFiniteError
from spp.weights.base import Weight
from spp.weights.offload import HookedAdapter, parameter_weight, values
from spp.weights.packed.layout import Layout
from spp.weights.packed.matrix import PackedStack, PackedWeight, StackLayout
from spp.weights.quantized.matrix import QuantizedLayout, QuantizedWeight

NAMES = ("weight_values", "weight_codes", "weight_starts")
_KINDS: dict[type, Any] = {Layout: PackedWeight, QuantizedLayout: QuantizedWeight, StackLayout: PackedStack}

WRAPPED = (
    "the model is still wrapped, and save_pretrained would write a checkpoint that transformers cannot load. "
    "Save the adapter with spp.save_adapter(model, path), or merge first: spp.merge(model), then "
    "spp.save_model(model, path). Training with transformers' Trainer? spp.training.SPPTrainer saves adapters; "
    "for TRL's SFTTrainer, spp.integrations.trl.SPPSFTTrainer does."
)
PACKED = (
    "the model is packed, and save_pretrained would write a checkpoint that transformers cannot load: call "
    "spp.unpack(model) first"
)


class HoldsWeight(HookedAdapter):
    """A module with a frozen weight, in any form, and perhaps parameters of an adapter beside it (`resident_names`).

    Attributes:
        packed_layout: how to read the packed tensors; None while the weight is a Parameter.
        input_axis: that of the dense weight as it is stored: −1, (m, n), or −2, (n, m).
        save_refusal: why save_pretrained of a model with such a layer is an error; None where it is none.
    """

    packed_layout: Layout | QuantizedLayout | StackLayout | None = None
    input_axis: int = -1
    save_refusal: ClassVar[str | None] = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight as it is stored; of a packed one a copy, decoded at each access; meta while offloaded."""
        if self.packed_layout is not None:
            return self.held().dense()
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError(f"{type(self).__name__} holds no weight")
        return weight

    @property
    def stored_weight(self) -> Tensor:
        """The tensor that holds W's values, whose address and version tell a write: the Parameter, values or codes."""
        if self.packed_layout is None:
            return self._parameters["weight"]  # type: ignore[return-value]
        return values(self, NAMES[0])

    def held(self) -> Weight:
        """Return the frozen weight; its tensors are the module's."""
        if self.packed_layout is None:
            return parameter_weight(self, input_axis=self.input_axis)
        weight = _KINDS[type(self.packed_layout)](self.packed_layout, *self.stored_tensors())
        weight.input_axis = self.input_axis
        return weight

    def stored_tensors(self) -> list[Tensor]:
        """Return the tensors that hold W: the Parameter, or what is packed; they may be sharded."""
        if self.packed_layout is None:
            return [self.stored_weight]
        return [values(self, name) for name in NAMES if name in self._buffers or name in self._parameters]

    def hold_packed(self, packed: Weight) -> None:
        """Take a packed or quantized weight in place of what is held."""
        self.drop_weight()
        self.packed_layout = packed.layout
        for name, tensor in zip(NAMES, packed.tensors(), strict=False):
            self.register_buffer(name, tensor.detach() if isinstance(tensor, nn.Parameter) else tensor)

    def make_shardable(self) -> None:
        """Hold packed tensors as frozen Parameters: FSDP2 shards these, and leaves buffers whole on every rank."""
        for name in [name for name in NAMES if name in self._buffers]:
            self.register_parameter(name, nn.Parameter(self._buffers.pop(name), requires_grad=False))  # type: ignore[arg-type]

    def drop_weight(self) -> None:
        """Free the weight, in any form."""
        self._parameters.pop("weight", None)
        for name in NAMES:
            self._buffers.pop(name, None)
            self._parameters.pop(name, None)
        self.packed_layout = None

    def resident_names(self) -> tuple[str, ...]:
        """Return the names of the parameters beside the weight that train; they keep the dtype of the arithmetic."""
        return ()

    @abstractmethod
    def sizes(self) -> str:
        """Return the sizes that `repr` shows."""

    def describe(self, *facts: str) -> str:
        """Return what `repr` shows between the brackets: sizes, then `facts`, then the form of a packed weight."""
        packed = () if self.packed_layout is None else (f"packed={self.packed_layout}",)
        return ", ".join((self.sizes(), *facts, *packed))

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return self.describe()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert or move; codes stay what they are, and the dtype that they are decoded to follows."""
        with converting(self, self.resident_names(), fn):
            super()._apply(fn, recurse)
            if isinstance(layout := self.packed_layout, QuantizedLayout):
                self.packed_layout = replace(layout, dtype=fn(torch.empty(0, dtype=layout.dtype, device="cpu")).dtype)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.packed_layout is not None and any(prefix + name in state_dict for name in NAMES):
            try:
                self.held().check(f"{prefix}weight")
            except (ConfigError, NonFiniteError) as error:
                args[-1].append(str(error))  # error_msgs: load_state_dict raises with all of them


@contextlib.contextmanager
def converting(module: nn.Module, names: Sequence[str], fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply `fn`, as nn.Module._apply calls it, to some parameters of a module: they keep the arithmetic's dtype.

    A context manager: the parameters are out of the module's own `_apply` meanwhile, and converted from the values as
    they were, so that no digit is lost on the way.
    """
    own = {name: p for name in names if (p := module._parameters.pop(name, None)) is not None}
    try:
        yield
        for name, parameter in own.items():
            own[name] = _converted(parameter, fn)
    finally:
        module._parameters.update(own)


def _converted(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    with torch.no_grad():
        applied = fn(parameter)
        dtype = torch.float64 if applied.dtype == torch.float64 else torch.float32
        data = applied if applied.dtype == dtype else parameter.detach().to(applied.device, dtype)
        if applied.is_meta != parameter.is_meta:  # a Parameter cannot change to or from meta in place
            return nn.Parameter(data, requires_grad=parameter.requires_grad)
        parameter.data = data
        if parameter.grad is not None:
            parameter.grad.data = parameter.grad.to(data.device, dtype)
    return parameter
