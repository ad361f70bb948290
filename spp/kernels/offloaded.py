"""A weight that is in memory for the length of a call only: backward has it loaded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spp.kernels.sources import DenseWeight, WeightSource
from spp.offload import fetch, offloader, values


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


def offloaded_weight(module: nn.Module, input_axis: int) -> OffloadedWeight | None:
    """Return W (m, n) of a linear that accelerate offloads, None for any other.

    Args:
        module: whose `weight` it is, loaded for a call or not.
        input_axis: −1 for a weight that is stored (m, n), −2 for (n, m).
    """
    hook = offloader(module)
    if hook is None:
        return None
    weight, transposed = values(module), input_axis == -2
    return OffloadedWeight(weight.T if transposed else weight, partial(_load, hook, weight.dtype, transposed))


def _load(hook: object, dtype: torch.dtype, transposed: bool) -> Tensor:
    weight = fetch(hook, "weight", dtype)
    return weight.T if transposed else weight


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
