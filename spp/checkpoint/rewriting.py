"""A checkpoint that is written anew with some of its weights changed: what is shared by all who work on it.

    for each shard of the base: for each tensor: read → change and check, or copy → write and hash; then the certificate

What is not changed is copied byte for byte, or converted where another dtype is asked for.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

from spp.certificate import BaseRecord, Certificate, TensorLayout, TensorRecord
from spp.checkpoint.saving import certified_keys
from spp.checkpoint.scanning import Bytes, describe
from spp.checkpoint.sources import input_axes
from spp.errors import NonFiniteError
from spp.files import CheckpointReader
from spp.files.header import size_of
from spp.kernels.native import elementwise
from spp.kernels.native.elementwise import Found, Matrix
from spp.merge_model import DTYPES
from spp.targets import is_projection_key


class ValueHashes(ABC):
    """Hashes the values of a weight while they are read."""

    @abstractmethod
    def add(self, piece: int, data: Bytes) -> None:
        """Take the bytes of a piece; several threads may."""

    @abstractmethod
    def finish(self) -> None:
        """Put the pieces together."""


class Rewriting(ABC):
    """A checkpoint that is written anew, and what its certificate will say.

    Args:
        reader: of the checkpoint.
        dtype: of all floating tensors of the output; None keeps each one's own.
        changed: keys of the tensors that `make` makes anew.
        certified: keys of tensors that are among the certificate's, besides the projections and the matrices that a
            certificate of the checkpoint names.

    Attributes:
        tensors, other: of the certificate, of what has been made.
        by_torch: held by who works on a whole weight: one at a time is in memory.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype | None,
        changed: Collection[str],
        certified: Collection[str],
    ) -> None:
        self.reader, self.dtype = reader, dtype
        before = {key for key in certified_keys(reader.directory) if self._is_matrix(key)}
        self.changed, self._certified = frozenset(changed), before.union(certified)
        self.axes = input_axes(reader)
        self.tensors: dict[str, TensorRecord] = {}
        self.other: dict[str, int] = {}
        self.by_torch = threading.Lock()

    def _is_matrix(self, key: str) -> bool:
        return key in self.reader and len(self.reader.shape(key)) == 2 and self.reader.dtype(key).is_floating_point

    @abstractmethod
    def make(self, key: str, tensor: Tensor) -> Tensor:
        """Return what is written in place of a changed tensor, contiguous and in the dtype of the output.

        Args:
            tensor: what is there, mapped from its file.
        """

    def keeps_zeros(self, key: str) -> bool:
        """Whether the zeros of a weight stay where they are."""
        return True

    def stored(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor of the output has."""
        found = self.reader.dtype(key)
        return self.dtype if self.dtype is not None and found in DTYPES else found

    def size(self) -> int:
        """Return the bytes of all tensors of the output."""
        return sum(size_of(self.stored(key), self.reader.shape(key)) for key in self.reader)

    def is_weight(self, key: str) -> bool:
        """Whether the certificate describes the zeros of a tensor."""
        return key in self._certified or is_projection_key(key, len(self.reader.shape(key)))

    def matrices(self, key: str) -> list[Matrix] | None:
        """Return what the compiled pass needs to make a weight; None where torch has to do it.

        Here of those that are converted only: who changes some by a compiled pass says how.
        """
        before, after, shape = self.reader.dtype(key), self.stored(key), self.reader.shape(key)
        library = elementwise.compiled(before, after)
        if library is None or key in self.changed or len(shape) not in (2, 3) or math.prod(shape) == 0:
            return None
        return [Matrix(library, math.prod(shape[:-1]), shape[-1], before, after)]

    def keep(self, key: str, dtype: torch.dtype, bits: Bytes, found: Found) -> None:
        """Record a weight that was made.

        Args:
            dtype: the weight's, in the output.
            bits: its packed mask.
            found: what is known of its bytes.
        """
        facts, mask = describe(self.reader.shape(key), dtype, self.axes[key], bits, found)
        self.tensors[key] = TensorRecord(
            facts.shape, facts.dtype, self.axes[key], facts.pattern, facts.zeros, mask, found.crc
        )

    def changed_by(self, key: str, found: list[Found]) -> None:
        """Check and record what the compiled pass made of a changed weight, after `keep`.

        Args:
            found: what is known of each of its matrices.
        """
        raise NotImplementedError(key)  # whose `matrices` are never a changed weight's

    def value_hashes(self, key: str, pieces: int) -> ValueHashes | None:
        """Return what takes the pieces of a weight as they are read; None where nobody asks for its values."""
        return None

    def certificate(self, base: BaseRecord | None = None) -> Certificate:
        """Return the certificate of what has been made."""
        layout = {k: TensorLayout.of(self.reader.shape(k), self.stored(k)) for k in self.other}
        return Certificate(self.tensors, self.other, base, other_layout=layout)

    def require_finite(self, key: str, finite: bool) -> None:
        """Raise unless a weight of the base is finite."""
        if not finite:
            raise NonFiniteError(f"{key} of {self.reader.directory} holds NaN or infinity; mend the base first")

    def overflow(self, key: str) -> NonFiniteError:
        """Return the error of a tensor that is not finite in the dtype of the output."""
        return NonFiniteError(f"{key} overflows in {self.stored(key)}; merge to a wider dtype")
