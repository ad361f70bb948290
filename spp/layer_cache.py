"""W_eff, kept between calls that find nothing changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CachedWeight:
    """W_eff, and what it was computed from.

    A write through `.data` or by a fused optimizer changes no version counter, so α and β, which are small, are
    compared by value where that does not stall a device; W, which is frozen, by address and version.
    """

    def __init__(self, weight: Tensor, params: Sequence[Tensor], key: object, effective: Tensor) -> None:
        self.effective = effective
        self.state = self._state(weight, params, key)
        self.values = [p.detach().clone() for p in params]

    def is_current(self, weight: Tensor, params: Sequence[Tensor], key: object) -> bool:
        """Whether W_eff computed anew would be the same; `key` is what else it depends on: the rule, the scaling."""
        if self.state != self._state(weight, params, key):
            return False
        return weight.device.type != "cpu" or all(torch.equal(p, v) for p, v in zip(params, self.values, strict=True))

    @staticmethod
    def _state(weight: Tensor, params: Sequence[Tensor], key: object) -> tuple[object, ...]:
        return (key, *((t.data_ptr(), t._version) for t in (weight, *params)))
