"""A weight that is in memory for the length of a call only: backward has it loaded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from spp.kernels.sources import DenseWeight, WeightSource


class OffloadedWeight(DenseWeight):
    """W as it is loaded for this call; nothing of it is kept for backward.

    Args:
        weight: (m, n).
        load: returns the same again, in backward.
    """

    def __init__(self, weight: Tensor, load: Callable[[], Tensor]) -> None:
        super().__init__(weight)
        self.load = load

    def tensors(self) -> tuple[Tensor, ...]:
        """Return nothing."""
        return ()

    def maker(self) -> Callable[..., OffloadedWeight]:
        """Return what loads W."""
        return partial(_make, self.load)


def _make(load: Callable[[], Tensor]) -> OffloadedWeight:
    return OffloadedWeight(load(), load)


class OffloadedExperts:
    """The matrices of a fused weight that is in memory for the length of a call only.

    Backward loads the weight once for all experts that had tokens, and lets go of it with the last of them.

    Args:
        load: returns the matrices (m, n) of all experts, in backward.
    """

    def __init__(self, load: Callable[[], Sequence[Tensor]]) -> None:
        self.expected = 0
        self._load = load
        self._held: Sequence[Tensor] | None = None

    def sources(self, matrices: Sequence[Tensor]) -> list[WeightSource]:
        """Return the matrices, as they are loaded for this call, as sources."""
        return [_Expert(matrix, partial(self._take, e), self) for e, matrix in enumerate(matrices)]

    def _take(self, expert: int) -> Tensor:
        held = self._load() if self._held is None else self._held
        self.expected -= 1
        self._held = held if self.expected > 0 else None
        return held[expert]


class _Expert(OffloadedWeight):
    def __init__(self, weight: Tensor, load: Callable[[], Tensor], experts: OffloadedExperts) -> None:
        super().__init__(weight, load)
        self.experts = experts

    def maker(self) -> Callable[..., OffloadedWeight]:
        """Return what loads W, and expect that it will be asked to."""
        self.experts.expected += 1
        return super().maker()
