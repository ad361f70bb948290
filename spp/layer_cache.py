"""W_eff, kept between calls that find nothing changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spp.kernels.native import Digest


class CachedWeight:
    """W_eff, and what it was computed from.

    A write through `.data` or by a fused optimizer changes no version counter, so α and β, which are small, are
    compared by their bytes where that does not stall a device; W, which is frozen, by address and version. Generation
    asks for every layer and token, so the answer must cost little beside a product with one token.

    Args:
        weight: what holds W's numbers. params: the rule's parameters. None of them was made in inference mode.
        key: what else W_eff depends on: the rule, the scaling.
        effective: W_eff.
        most: how many numbers an input may have for W_eff to be kept.
    """

    def __init__(
        self, weight: Tensor, params: Sequence[Tensor], key: tuple[object, float], effective: Tensor, most: int
    ) -> None:
        self.effective = effective
        self.key = key
        self.most = most
        self.device = weight.device.type
        self.tensors = [weight, *params]
        self.versions = [t._version for t in self.tensors]
        self.places = [t.data_ptr() for t in self.tensors]
        self.digest: Digest | None = None
        self.copies: list[Tensor] = []
        if self.device == "cpu":
            if all(p.is_contiguous() and type(p) in (Tensor, torch.nn.Parameter) for p in params):
                self.digest = Digest(params)
            else:
                self.copies = [p.detach().clone() for p in params]

    def is_current(self, weight: Tensor, params: Sequence[Tensor], key: tuple[object, float]) -> bool:
        """Whether W_eff computed anew would be the same."""
        return key == self.key and self.holds([weight, *params])

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether W's numbers and the parameters are what they were."""
        for now, before, version, place in zip(tensors, self.tensors, self.versions, self.places, strict=True):
            if now is not before or before._version != version or before.data_ptr() != place:
                return False
        if self.digest is not None:
            return self.digest.holds(self.tensors[1:])
        return all(torch.equal(t, copy) for t, copy in zip(self.tensors[1:], self.copies, strict=False))
