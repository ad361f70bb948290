"""Whether small tensors on the CPU hold the bytes that they held, at the cost of reading them once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from spp.kernels.native.compiler import library


class Digest:
    """The bytes of tensors, to be compared with what they are later; the tensors are not held.

    With the compiled library a checksum of 64 bits, which a change escapes by a chance of about 2⁻⁶⁴; without it a
    copy, compared entry by entry.

    Args:
        tensors: contiguous, on the CPU, of 4 or 8 bytes an entry.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.count = len(tensors)
        self.data = (ctypes.c_void_p * self.count)(*(t.data_ptr() for t in tensors))
        self.bytes = (ctypes.c_int64 * self.count)(*(t.nbytes for t in tensors))
        loaded = library()
        self._digest = None if loaded is None else loaded.spp_digest
        self._copies = [t.detach().clone() for t in tensors] if loaded is None else []
        self._value = self._now()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors, which must be at the addresses where they were, hold what they held."""
        if self._digest is not None:
            return bool(self._digest(self.data, self.bytes, self.count) == self._value)
        return all(torch.equal(t, copy) for t, copy in zip(tensors, self._copies, strict=True))

    def _now(self) -> int:
        return 0 if self._digest is None else int(self._digest(self.data, self.bytes, self.count))
