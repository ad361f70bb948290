"""A frozen weight as it is held, and the hash of its values: what an adapter remembers of its base.

    float     "float32", "bfloat16", …: spp.files.values_sha256 of the dense weight, packed or not
    quantized "nf4 in blocks of 64", …: of codes and zero points, and of scales as bfloat16, which is all that
              bitsandbytes leaves of them where it has put a weight in another order for some CPUs

A hash is computed once: it is known for as long as the tensors that hold the numbers are the same, where they were, and
have not been written to, as far as torch's version counters and a sample of their values can tell.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from spp.files import dtype_name, values_sha256
from spp.files.hashes import tensor_bytes
from spp.weights.offload import in_memory, values
from spp.weights.quantized.matrix import QuantizedLayout, QuantizedWeight

FLOATS = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
_SAMPLED = 32  # places along each axis that a sample looks at
_known: Any = WeakTensorKeyDictionary()  # {the first tensor of a weight: {form: (its state, hash)}}


@dataclass(frozen=True)
class HeldWeight:
    """A frozen weight as it is held.

    Args:
        form: what a hash is of, as above.
        tensors: that hold the numbers; none where they are read from a disk each time.
        dense: returns the weight as it is stored, with its numbers or on the meta device.
        quantized: the weight, where it is quantized.
    """

    form: str
    tensors: tuple[Tensor, ...]
    dense: Callable[[], Tensor]
    quantized: QuantizedWeight | None = None

    @classmethod
    def of_parameter(cls, module: nn.Module, name: str = "weight") -> HeldWeight:
        """Return what a module holds as a tensor, which accelerate may have offloaded."""
        held: Tensor = getattr(module, name)
        kept = in_memory(module, name) if held.is_meta else held
        named = name in module._parameters
        dense = (lambda: values(module, name)) if named else (lambda: held)
        return cls(dtype_name(held.dtype), () if kept is None else (kept,), dense)

    @classmethod
    def of_tensor(cls, weight: Tensor) -> HeldWeight:
        """Return a weight that is a tensor."""
        return cls(dtype_name(weight.dtype), (weight,), lambda: weight)

    @classmethod
    def of_quantized(cls, weight: QuantizedWeight) -> HeldWeight:
        """Return a quantized weight."""
        return cls(_form(weight.layout), weight.tensors(), weight.dense, weight)

    def sha256(self, form: str | None = None) -> str | None:
        """Return the hash of the values in a form; None where they are not there, or cannot be had in that form.

        Args:
            form: another float dtype than the weight's rounds it first; None is the weight's own.
        """
        form = form or self.form
        if form != self.form and (self.quantized is not None or form not in FLOATS):
            return None
        state = _state(self.tensors)
        known = {} if state is None else _known.setdefault(self.tensors[0], {})
        if form in known and known[form][0] == state:
            return str(known[form][1])
        digest = self._sha256(form)
        if state is not None:
            known[form] = state, digest
        return digest

    def _sha256(self, form: str) -> str | None:
        weight = self.quantized
        if weight is None:
            return values_sha256(self.dense(), FLOATS.get(form))
        if weight.device.type == "meta":
            return None
        digest = hashlib.sha256(f"spp-values-1{form}{tuple(weight.shape)}".encode())
        points = () if weight.nested is None or weight.layout.form != "affine" else (weight.nested,)
        for tensor in (weight.codes, weight.scales().bfloat16(), *points):
            for piece in tensor_bytes(tensor):
                digest.update(piece)
        return digest.hexdigest()


def _form(layout: QuantizedLayout) -> str:
    """Return in words how a quantized weight is stored; what differs between two of a form is values."""
    if layout.form == "affine":
        return f"codes from {layout.low} to {layout.high} in blocks of {layout.block_rows} x {layout.block}"
    return f"{layout.form} in blocks of {layout.block}" if layout.block else f"{layout.form} by rows"


def _state(tensors: tuple[Tensor, ...]) -> Any | None:
    """Return what changes when a tensor is written to; None where nothing would tell."""
    if not tensors or any(t.is_meta or t.is_inference() for t in tensors):
        return None
    return tuple((id(t), t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride(), _sample(t)) for t in tensors)


def _sample(t: Tensor) -> int:
    """Return a checksum of a few of a tensor's values: a write through `.data` leaves no other trace."""
    part = t.detach()[tuple(slice(None, None, -(-size // _SAMPLED) or 1) for size in t.shape)]
    crc = 0
    for piece in tensor_bytes(part.contiguous()):
        crc = zlib.crc32(piece, crc)
    return crc
