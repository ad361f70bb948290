"""Packed checkpoints: how pruned matrices are stored in safetensors files. Format version 1.

A packed checkpoint is a Hugging Face checkpoint like any other, model.safetensors or shards with their index, in which
some tensors are packed. A packed tensor K is stored as

    K           int64 (5 + d,)   its descriptor: 1 (the format version), the input axis, N, M, 0, and K's d = 2 or 3
                                 dimensions
    K_values    K's dtype        the kept weights
    K_codes     uint8            where they belong
    K_starts    int32 or int64   where stretches of rows begin; only where N = M = 0

Values, codes and starts are those of a matrix W (m, n) as `spp.weights.packed.layout` stores it: K with its input axis
last and its other axes made one, so that experts lie one below the other; n is K's length along the input axis. N:M is
the pattern of the layout, both 0 for any pattern. The number behind them is always 0. Everything else is stored as it
is. A zero is a zero: −0.0 is not kept.

A loader that does not know the format meets, under K, a tensor of another shape and stops, instead of going on with a
weight that it never found. config.json says the same to transformers, {"quantization_config": {"quant_method":
"spp_packed", "format_version": 1}}, which spp.integrations.transformers knows. sparsity.json is the certificate of the
dense checkpoint: of what is read here, and what `spp export --dense` gives back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp._version import __version__
from spp.configs.pattern import USUAL_GROUPS
from spp.errors import CheckpointError, ConfigError, call
from spp.files import CheckpointReader, dtype_name, read_json
from spp.files.formats import PACKED
from spp.files.hashes import tensor_bytes
from spp.masks.patterns import as_array
from spp.weights.packed.layout import Layout
from spp.weights.packed.matrix import DTYPES, PackedWeight

FORMAT_VERSION = 1
QUANT_METHOD = PACKED
SUFFIXES = ("_values", "_codes", "_starts")
_HEAD = 5  # numbers of a descriptor before the shape
_LARGEST = 2**62  # elements of a tensor
_TOGETHER = 1 << 22  # weights that are decoded, or whose codes are checked, together


@dataclass(frozen=True)
class Descriptor:
    """How one packed tensor is to be read.

    Args:
        shape: of the tensor, two or three dimensions.
        input_axis: counted from the front.
        layout: of the matrix that it is packed as.
    """

    shape: tuple[int, ...]
    input_axis: int
    layout: Layout

    @classmethod
    def of(cls, shape: Sequence[int], input_axis: int, pattern: str, kept: int, itemsize: int) -> Descriptor:
        """Return the smallest way to pack a tensor whose zeros have a pattern; arguments as of `Layout.smallest`."""
        return cls(tuple(shape), input_axis, Layout.smallest(*_matrix(shape, input_axis), pattern, kept, itemsize))

    @classmethod
    def read(cls, numbers: Sequence[int], where: str) -> Descriptor:
        """Return the descriptor that a checkpoint holds; anything that is none is a CheckpointError naming `where`."""
        if not numbers or numbers[0] < 1:
            raise CheckpointError(f"{where} is no descriptor of a packed tensor: {str(list(numbers))[:80]}")
        check_version(numbers[0], where)
        axis, kept, group, width, *shape = numbers[1:] if len(numbers) >= _HEAD else [0] * 4
        if len(shape) not in (2, 3) or min(shape) < 0 or math.prod(n or 1 for n in shape) > _LARGEST:
            raise CheckpointError(f"{where}: no possible shape of a packed tensor: {str(shape)[:80]}")
        if axis not in (len(shape) - 2, len(shape) - 1):
            raise CheckpointError(f"{where}: input axis {axis} of the shape {shape}")
        if width:
            raise CheckpointError(
                f"{where}: codes of width {width} are indices within groups, not a mask (width 0). Index codes were "
                f"never released and are not read: pack the dense checkpoint again, "
                f"{call('export_packed', 'directory, output')}"
            )
        found = Layout(*_matrix(shape, axis), kept, group)
        if found != Layout(found.rows, found.cols) and not _is_known(found):
            raise CheckpointError(f"{where}: no layout of {kept}:{group} for {shape}")
        return cls(tuple(shape), axis, found)

    def tensor(self) -> Tensor:
        """Return what is stored under the tensor's own key."""
        layout = self.layout
        numbers = (FORMAT_VERSION, self.input_axis, layout.kept, layout.group, 0, *self.shape)
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the tensor as the matrix (m, n) that is packed: a view, or of transposed experts a copy."""
        return weight.movedim(self.input_axis, -1).reshape(self.layout.rows, self.layout.cols)

    def stored(self, kept: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return {suffix: (dtype, shape)} of everything that is stored for `kept` weights of a dtype."""
        layout = self.layout
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "": (torch.int64, (_HEAD + len(self.shape),)),
            "_values": (dtype, (layout.rows, layout.row_values) if layout.is_nm else (kept,)),
            "_codes": (torch.uint8, (layout.rows, layout.row_bytes)),
        }
        if not layout.is_nm:
            found["_starts"] = (torch.int32 if kept < 2**31 else torch.int64, (layout.rows, layout.stretches))
        return found

    def pieces(self, packed: PackedWeight) -> Iterator[Tensor]:
        """Yield the tensor of a packed matrix in row-major order: rows, or, where inputs come first, matrices."""
        if packed.numel == 0:  # however many rows of nothing a file may claim
            return
        last = self.input_axis == len(self.shape) - 1
        rows = max(1, _TOGETHER // max(1, self.layout.cols) if last else self.shape[-1])
        for first in range(0, self.layout.rows, rows):
            part = slice(first, min(first + rows, self.layout.rows))
            piece = torch.empty(part.stop - part.start, self.layout.cols, dtype=packed.dtype, device="cpu")
            piece = packed.decode(part, slice(None), piece)
            yield piece if last else piece.T.contiguous()

    def dense(self, packed: PackedWeight) -> Tensor:
        """Return the tensor of a packed matrix."""
        out = torch.empty(self.shape, dtype=packed.dtype, device="cpu")
        if packed.numel == 0:
            return out
        for index, matrix in enumerate(out.unbind(0) if out.dim() == 3 else [out]):
            target = matrix if self.input_axis == out.dim() - 1 else matrix.T
            rows = slice(index * target.shape[0], (index + 1) * target.shape[0])
            if target.is_contiguous():
                packed.decode(rows, slice(None), target)
            else:
                target.copy_(packed.decode(rows, slice(None), torch.empty(target.shape, dtype=out.dtype, device="cpu")))
        return out


class DenseReader(CheckpointReader):
    """Read a checkpoint's tensors dense, packed or not: keys, shapes, dtypes and bytes are those of the dense one.

    Args:
        directory: of a plain or a packed checkpoint.

    Attributes:
        packed: {key: descriptor} of the packed tensors; empty for a plain checkpoint.

    Raises:
        CheckpointError: as CheckpointReader, or a packed tensor is malformed or of a newer format.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.packed: dict[str, Descriptor] = {}
        self._parts: set[str] = set()
        super().__init__(directory)
        try:
            self._find_packed()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DenseReader:
        return self

    def keys(self) -> list[str]:
        """Return the sorted names of all tensors."""
        stored = super().keys()
        return [key for key in stored if key not in self._parts]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) and key not in self._parts

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.packed[key].shape if key in self.packed else super().shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return super().dtype(f"{key}_values" if key in self.packed else key)

    def shards(self) -> dict[str, list[str]]:
        """Return file name -> its tensors (those whose descriptors it holds) in the order in which they lie."""
        return {name: [k for k in keys if k not in self._parts] for name, keys in super().shards().items()}

    def raw(self, key: str) -> memoryview:
        """Return a tensor's bytes: those on the disk, or decoded ones."""
        if key not in self.packed:
            return super().raw(key)
        return as_array(self.tensor(key).reshape(-1).view(torch.uint8)).data.toreadonly()

    def pieces(self, key: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes; of a packed one some rows at a time."""
        if key not in self.packed:
            yield from super().pieces(key)
            return
        for piece in self.packed[key].pieces(self.packed_weight(key)):
            yield from tensor_bytes(piece)

    def lies_in_file(self, key: str) -> bool:
        """Whether a tensor's bytes are those of its file: not so, if it is packed."""
        return key not in self.packed and super().lies_in_file(key)

    def tensor(self, key: str) -> Tensor:
        """Return a tensor on the CPU: mapped from the file, or decoded."""
        descriptor = self.packed.get(key)
        return super().tensor(key) if descriptor is None else descriptor.dense(self.packed_weight(key))

    def packed_weight(self, key: str) -> PackedWeight:
        """Return a packed tensor as it is stored, mapped from its files, every place in it checked.

        Raises:
            CheckpointError: codes, starts and values do not belong together.
        """
        parts = [super(DenseReader, self).tensor(key + suffix) for suffix in self._suffixes(key)]
        weight = PackedWeight(self.packed[key].layout, *parts)
        try:
            _check(weight)
        except ConfigError as error:
            raise CheckpointError(f"{self.directory / self.file_of(key)}: {key}: {error}") from None
        return weight

    def stored_bytes(self, key: str) -> int:
        """Return the bytes that a tensor takes on the disk."""
        parts = [key, *(key + suffix for suffix in self._suffixes(key))] if key in self.packed else [key]
        return sum(len(super(DenseReader, self).raw(part)) for part in parts)

    def _suffixes(self, key: str) -> tuple[str, ...]:
        return SUFFIXES[:2] if self.packed[key].layout.is_nm else SUFFIXES

    def _find_packed(self) -> None:
        config = self.directory / "config.json"
        settings = packed_settings(read_json(config, "the model's config")) if config.exists() else None
        if settings is not None:
            check_version(settings.get("format_version"), str(config))
        stored = super().keys()
        found = [key for key in stored if f"{key}_values" in self and f"{key}_codes" in self]
        for key in stored:
            halves = [key + suffix for suffix in SUFFIXES[:2] if key + suffix in self]
            if len(halves) == 1 and super().dtype(key) == torch.int64 and len(super().shape(key)) == 1:
                lost = next(key + suffix for suffix in SUFFIXES[:2] if key + suffix not in self)
                raise CheckpointError(
                    f"{self.directory / self.file_of(key)}: {lost} is missing, and there is {halves[0]}"
                )
        for key in found:
            where = f"{self.directory / self.file_of(key)}: {key}"
            dtype, shape = super().dtype(key), super().shape(key)
            if dtype != torch.int64 or len(shape) != 1 or shape[0] > _HEAD + 3:
                raise CheckpointError(
                    f"{where} is {dtype_name(dtype)} {shape}, and there is {key}_codes: expected the descriptor of a "
                    f"packed tensor"
                )
            descriptor = Descriptor.read(super().tensor(key).tolist(), where)
            self._check_parts(key, descriptor, where)
            self.packed[key] = descriptor
        self._parts = {key + suffix for key in found for suffix in self._suffixes(key)}
        nested = sorted(self._parts & self.packed.keys())
        if nested:
            raise CheckpointError(f"{self.directory}: {nested[0]} is a packed tensor and a part of another one")

    def _check_parts(self, key: str, descriptor: Descriptor, where: str) -> None:
        """Raise unless the parts of a packed tensor have the dtypes and shapes that the descriptor asks for."""
        dtype, values = super().dtype(f"{key}_values"), super().shape(f"{key}_values")
        if dtype not in DTYPES:
            known = ", ".join(map(dtype_name, DTYPES))
            raise CheckpointError(f"{where}_values is {dtype_name(dtype)}; {known} are packed")
        for suffix, wanted in descriptor.stored(math.prod(values), dtype).items():
            if key + suffix not in self:
                raise CheckpointError(f"{where}{suffix} is missing")
            found = super().dtype(key + suffix), super().shape(key + suffix)
            if found != wanted:
                asked = f"{dtype_name(wanted[0])} {wanted[1]}"
                raise CheckpointError(f"{where}{suffix} is {dtype_name(found[0])} {found[1]}, expected {asked}")


def is_packed(reader: CheckpointReader) -> bool:
    """Whether there are packed tensors in a checkpoint that is read as it is stored."""
    return any(f"{key}_values" in reader and f"{key}_codes" in reader for key in reader)


def packed_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the config of a packed checkpoint says about the format; None for that of any other one."""
    settings = config.get("quantization_config")
    return settings if isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD else None


def is_packed_directory(directory: Path) -> bool:
    """Whether the config of a checkpoint says that it is packed."""
    path = directory / "config.json"
    return path.exists() and packed_settings(read_json(path, "the model's config")) is not None


def check_version(version: object, where: str) -> None:
    """Raise a CheckpointError for a format version that this library does not read."""
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: the format_version of packed weights is {version!r:.40}, which is none")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has packed weights of format_version {version}; this spp ({__version__}) reads up to "
            f"{FORMAT_VERSION}: install a newer spp"
        )


def _matrix(shape: Sequence[int], input_axis: int) -> tuple[int, int]:
    others = [length for axis, length in enumerate(shape) if axis != input_axis]
    return math.prod(others), shape[input_axis]


def _is_known(layout: Layout) -> bool:
    kept, group = layout.kept, layout.group
    usual = group in USUAL_GROUPS and 1 <= kept <= group // 2 and not kept & (kept - 1)
    return usual and layout.cols % group == 0 and Layout.of(layout.rows, layout.cols, f"{kept}:{group}") == layout


def _check(weight: PackedWeight) -> None:
    """Raise a ConfigError unless a packed weight's places are possible and written in the one way that there is."""
    layout, codes = weight.layout, as_array(weight.codes)
    if weight.numel == 0:
        if weight.values.numel():
            raise ConfigError(f"{weight.values.numel()} values of a weight without entries")
        return
    spare = 8 * layout.row_bytes - layout.cols
    if spare and bool((codes[:, -1] & (1 << spare) - 1).any()):
        raise ConfigError("bits are set behind the end of a row")
    if not layout.is_nm:
        weight.check()
        return
    step = max(1, _TOGETHER // max(1, layout.cols))
    for first in range(0, layout.rows, step):
        part = slice(first, min(first + step, layout.rows))
        rows = replace(layout, rows=part.stop - part.start)
        PackedWeight(rows, weight.values[part], weight.codes[part]).check()
