"""What tensors are made while something runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Remembers the shapes of the floating tensors that operations make in memory, but for views.

    Attributes:
        shapes: as they came. most: the most numbers that one of them has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor) and not result.is_meta and not func.is_view and result.is_floating_point():
                self.shapes.append(tuple(result.shape))
                self.most = max(self.most, result.numel())
        return results
