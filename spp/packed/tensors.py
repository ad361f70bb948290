"""The tensors of what is packed, of one matrix or of a stack of them."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedTensors:
    """What follows from the tensors alone; `spp.packed.layout` and `spp.packed.stack` say what they are."""

    values: Tensor
    codes: Tensor
    starts: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of W."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """Return (values, codes), for any pattern (values, codes, starts)."""
        return (self.values, self.codes) if self.starts is None else (self.values, self.codes, self.starts)
