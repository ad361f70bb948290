"""Packed weights as the kernels ask for them: each block is decoded into the shared workspace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from spp.kernels.choice import by_triton
from spp.kernels.sources import WeightSource
from spp.kernels.workspace import workspace
from spp.packed import Layout, PackedWeight


class PackedSource(WeightSource):
    """W as kept values and codes.

    Args:
        packed: W.
    """

    is_tensor = False

    def __init__(self, packed: PackedWeight) -> None:
        self.packed = packed
        self.shape = packed.shape
        self.dtype = packed.dtype
        self.device = packed.device

    def block(self, rows: slice, cols: slice) -> Tensor:
        """Decode W[rows, cols]."""
        shape = tuple(len(range(*part.indices(size))) for part, size in zip((rows, cols), self.shape, strict=True))
        out = workspace("packed", shape, self.dtype, self.device)
        if self.device.type != "cpu" and by_triton(self.device, self.dtype):
            from spp.kernels.triton import decode

            return decode(self.packed, rows, cols, out)
        return self.packed.decode(rows, cols, out)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return values, codes and, if there are some, starts."""
        return self.packed.tensors()

    def maker(self) -> Callable[..., WeightSource]:
        """Return a function that knows the layout."""
        return partial(_make, self.packed.layout)

    def kept(self) -> Tensor:
        """Return the values; a group that keeps fewer than N has zeros among them."""
        return self.packed.values


def _make(layout: Layout, *tensors: Tensor) -> PackedSource:
    return PackedSource(PackedWeight(layout, *tensors))
