"""A frozen weight W, however it is held: as a tensor, packed, quantized or offloaded; of E experts, a stack of theirs.

The kernels ask for W[rows, cols] and never hold W itself. A tensor answers with a view; any other form decodes the
block into the shared workspace, so that no dense m × n tensor exists.

The hash of its values, which an adapter records of its base, is taken of a form:

    float     "float32", "bfloat16", …: spp.files.values_sha256 of the dense weight, packed or not
    quantized "nf4 in blocks of 64", …: of codes and zero points, and of scales as bfloat16, which is all that
              bitsandbytes leaves of them where it has put a weight in another order for some CPUs
"""

from __future__ import annotations

import math
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from spp.files import dtype_name, values_sha256
from spp.files.hashes import tensor_bytes

FLOATS = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
WHOLE = slice(None)
_SAMPLED = 32  # places along each axis that a sample looks at
_known: Any = WeakTensorKeyDictionary()  # {the first tensor of a weight: {form: (its state, hash)}}


class Weight(ABC):
    """A frozen weight W (m, n), or W (E, m, n) of E experts.

    Attributes:
        shape: (m, n) or (E, m, n).
        dtype: of W where it is multiplied.
        device: where blocks are.
        input_axis: −1 for a weight that is stored as its shape says, −2 for one with inputs first, (n, m).
        layout: how to read the tensors of a packed or quantized one; None.
        is_tensor: whether W exists as one tensor, so that a block of any size costs nothing.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    input_axis: int = -1
    layout: Any = None
    is_tensor: ClassVar[bool] = False

    @abstractmethod
    def decode(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        """Write W[…, rows, cols] into `out`, contiguous, of the block's shape and W's dtype and device; return it."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that W is made of: what backward saves."""

    @abstractmethod
    def maker(self) -> Callable[..., Weight]:
        """Return what makes W again from `tensors()`, and holds none of them itself."""

    @abstractmethod
    def bounds(self) -> Tensor:
        """Return a tensor in W's dtype: no non-zero entry is above the least |W| > 0 of the entries that it bounds."""

    @abstractmethod
    def entries(self) -> Tensor:
        """Return a tensor that holds each non-zero value of W once, and zeros."""

    def experts(self) -> Sequence[Weight]:
        """Return W (m, n) of each expert, in the memory of this weight; of a matrix, W itself."""
        return [self]

    def block(self, rows: slice, cols: slice) -> Tensor:
        """Return W[…, rows, cols], to be read only, and only until the next block is asked for."""
        return self.decode(rows, cols, self._scratch(rows, cols))

    def matrix(self) -> Tensor:
        """Return W in `shape`: of a tensor the tensor or its transpose, of any other form a new tensor."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return out if out.is_meta else self.decode(WHOLE, WHOLE, out)

    def dense(self) -> Tensor:
        """Return W as it is stored, with inputs last or first; of any form but a tensor a new tensor."""
        return self.matrix() if self.input_axis == -1 else self.matrix().mT.contiguous()

    def storage(self) -> tuple[Tensor, ...]:
        """Return the tensors in memory that hold the values; none where they are read from a disk at each call."""
        return self.tensors()

    def check(self, where: str) -> None:  # noqa: B027  of a tensor there is nothing to check
        """Raise a ConfigError or NonFiniteError that names `where` unless the tensors belong together."""

    def count_kept(self) -> int:
        """Return how many entries are not zero."""
        return int(torch.count_nonzero(self.entries()))

    @property
    def numel(self) -> int:
        """The entries of W, zeros among them."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def is_meta(self) -> bool:
        """Whether W has no values."""
        return self.device.type == "meta"

    @property
    def form(self) -> str:
        """Name what the hash of W's values is of."""
        return dtype_name(self.dtype)

    def values_sha256(self, form: str | None = None, *, anew: bool = False) -> str | None:
        """Return the hash of the values in a form; None where they are not there, or cannot be had in that form.

        It is computed once: it is known for as long as the tensors of `storage()` are the same, where they were, and
        have not been written to, as far as torch's version counters and a sample of their values can tell.

        Args:
            form: another float dtype than the weight's rounds it first; None is the weight's own.
            anew: compute it, whatever is known.
        """
        form = form or self.form
        if form != self.form and not (self.form in FLOATS and form in FLOATS):
            return None
        held = self.storage()
        state = _state(held)
        known = {} if state is None else _known.setdefault(held[0], {})
        if not anew and form in known and known[form][0] == state:
            return str(known[form][1])
        digest = self._sha256(form)
        if state is not None:
            known[form] = state, digest
        return digest

    def _sha256(self, form: str) -> str | None:
        return values_sha256(self.dense(), FLOATS.get(form))

    def _scratch(self, rows: slice, cols: slice) -> Tensor:
        *experts, m, n = self.shape
        shape = (*experts, len(range(*rows.indices(m))), len(range(*cols.indices(n))))
        return workspace("packed", shape, self.dtype, self.device)


class DenseWeight(Weight):
    """W as a plain tensor as it is stored, with inputs last, or first where `input_axis` is −2; it gets no gradient."""

    is_tensor = True

    def __init__(self, stored: Tensor, input_axis: int = -1) -> None:
        self.stored, self.input_axis = stored, input_axis
        self.dtype, self.device = stored.dtype, stored.device
        *experts, first, last = stored.shape
        self.shape = (*experts, first, last) if input_axis == -1 else (*experts, last, first)

    def dense(self) -> Tensor:
        return self.stored

    def matrix(self) -> Tensor:
        return self.dense() if self.input_axis == -1 else self.dense().mT

    def entries(self) -> Tensor:
        stored = self.dense()
        return stored.detach() if stored.requires_grad else stored  # a new tensor is not recognised as the same one

    def bounds(self) -> Tensor:
        return self.entries() if self.input_axis == -1 else self.entries().mT

    def block(self, rows: slice, cols: slice) -> Tensor:
        return self.bounds()[..., rows, cols]

    def decode(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        return out.copy_(self.block(rows, cols))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bounds(),)

    def storage(self) -> tuple[Tensor, ...]:
        return (self.stored,)

    def maker(self) -> Callable[..., Weight]:
        return DenseWeight

    def experts(self) -> Sequence[Weight]:
        if len(self.shape) == 2:
            return [self]
        return [DenseWeight(stored, self.input_axis) for stored in self.entries().unbind(0)]


def as_weight(weight: Tensor | Weight) -> Weight:
    """Return a tensor (m, n) as a weight, and a weight as it is."""
    return weight if isinstance(weight, Weight) else DenseWeight(weight)


def as_matrices(weight: Tensor, *, transposed: bool) -> list[Tensor]:
    """Return a weight, (out, in) or (E, out, in), or with inputs first, as views (out, in): one, or one an expert."""
    stored = list(weight.unbind(0)) if weight.dim() == 3 else [weight]
    return [matrix.T for matrix in stored] if transposed else stored


def _state(tensors: Sequence[Tensor]) -> Any | None:
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


# ---- Scratch memory that every layer shares: one buffer a use, keyed by thread, device, stream and dtype.
#
# A fresh m × n allocation costs as much as several passes over it, so blocks of W_eff and of G are written into the
# same few megabytes again and again. A buffer is only valid until the next request with the same tag on the same thread
# and stream; nothing that outlives a call may point into it.

_local = threading.local()


def workspace(tag: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised scratch of `shape`, contiguous; the buffer behind it grows as needed and is reused.

    `tag` names the use: two tags never share memory.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (tag, dtype, device, stream)
    buffers: dict[object, Tensor] = _local.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype, device=device)
        if type(buffer) is Tensor:  # a tracing mode's stand-in must not be kept
            buffers[key] = buffer
    return buffer[:size].view(shape)


def release_workspace() -> None:
    """Give the calling thread's scratch memory back."""
    _local.__dict__.pop("buffers", None)


def workspace_bytes() -> int:
    """Return how many bytes of scratch the calling thread holds."""
    return sum(b.numel() * b.element_size() for b in _local.__dict__.get("buffers", {}).values())
