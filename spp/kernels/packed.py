"""Packed and quantized weights as the kernels ask for them: each block is decoded into the shared workspace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from spp.kernels.choice import by_triton
from spp.kernels.sources import WeightSource
from spp.kernels.workspace import workspace
from spp.packed import PackedWeight, QuantizedWeight


class PackedSource(WeightSource):
    """W as kept values and codes, or as quantized codes and scales.

    Args:
        packed: W.
    """

    is_tensor = False

    def __init__(self, packed: PackedWeight | QuantizedWeight) -> None:
        self.packed = packed
        self.shape = packed.shape
        self.dtype = packed.dtype
        self.device = packed.device

    def block(self, rows: slice, cols: slice) -> Tensor:
        """Decode W[rows, cols]."""
        shape = tuple(len(range(*part.indices(size))) for part, size in zip((rows, cols), self.shape, strict=True))
        out = workspace("packed", shape, self.dtype, self.device)
        packed = self.packed
        if isinstance(packed, PackedWeight) and self.device.type != "cpu" and by_triton(self.device, self.dtype):
            from spp.kernels.triton import decode

            return decode(packed, rows, cols, out)
        return packed.decode(rows, cols, out)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what the packed weight is made of."""
        return self.packed.tensors()

    def maker(self) -> Callable[..., WeightSource]:
        """Return a function that knows the layout."""
        return partial(_make, type(self.packed), self.packed.layout)

    def kept(self) -> Tensor:
        """Return the values, zeros among them; of a quantized weight, a bound a block (`QuantizedWeight.values`)."""
        return self.packed.values


def _make(kind: Callable[..., PackedWeight | QuantizedWeight], layout: object, *tensors: Tensor) -> PackedSource:
    return PackedSource(kind(layout, *tensors))
