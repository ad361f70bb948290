"""Where the kernels get W from: they ask for W[rows, cols] and never hold W itself.

A tensor answers with a view. Anything that holds W in another form answers with that block written into the shared
workspace, so that no dense m × n tensor exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor


class WeightSource(ABC):
    """A frozen weight W (m, n) that gives blocks of itself.

    Attributes:
        shape: (m, n).
        dtype: of W.
        device: where blocks are.
        is_tensor: whether W exists as one tensor, so that a block of any size costs nothing.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    is_tensor: ClassVar[bool]

    @abstractmethod
    def block(self, rows: slice, cols: slice) -> Tensor:
        """Return W[rows, cols], to be read only, and only until the next block is asked for."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that W is made of: what backward saves."""

    @abstractmethod
    def maker(self) -> Callable[..., WeightSource]:
        """Return what makes this source again from `tensors()`, and holds none of them itself."""

    @abstractmethod
    def kept(self) -> Tensor:
        """Return a tensor in the dtype of W whose non-zero entries are those of W."""


class DenseWeight(WeightSource):
    """W as a plain tensor.

    Args:
        weight: (m, n); it gets no gradient.
    """

    is_tensor = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach() if weight.requires_grad else weight
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.device = weight.device

    def block(self, rows: slice, cols: slice) -> Tensor:
        """Return a view."""
        return self.weight[rows, cols]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return W."""
        return (self.weight,)

    def maker(self) -> Callable[..., WeightSource]:
        """Return the class."""
        return DenseWeight

    def kept(self) -> Tensor:
        """Return W."""
        return self.weight


def source_of(weight: Tensor | WeightSource) -> WeightSource:
    """Return a tensor as a source, and a source as it is."""
    return weight if isinstance(weight, WeightSource) else DenseWeight(weight)
