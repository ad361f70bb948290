"""Quantized checkpoints read as plain weights, some rows at a time.

bitsandbytes   4 bits   K uint8, K.absmax, K.quant_map, K.quant_state.bitsandbytes__nf4 (or fp4): JSON as bytes; nested
                        scales: K.nested_absmax, K.nested_quant_map
               8 bits   K int8 (m, n), and beside it SCB (m,)
fp8                     K float8 (m, n), K_scale_inv or K_scale: a weight is zero where its own bits are
GPTQ                    qweight (n·b/32, m), qzeros (n/g, m·b/32), scales (n/g, m), g_idx (n,): 32/b codes an int32, the
                        first in the lowest bits, along n in qweight and along m in qzeros; z = stored + 1, except in
                        the checkpoint_format gptq_v2
AWQ, gemm               qweight (n, m/8), qzeros (n/g, m/8), scales (n/g, m): eight codes an int32 along m, those of
                        columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on
compressed-tensors      P.compressed, P.bitmask, P.shape, and, of sparse-bitmask, P.row_offsets: P.weight (m, n) without
                        its zeros, as sparse-bitmask or sparse-24-bitmask has it

Of GPTQ and AWQ W[j, i] = (code[i, j] − z[g(i), j]) · scale[g(i), j]: zero where the code is the zero point. A form
that is not wholly there, or has other shapes than these, is left as it is stored.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from spp.errors import CheckpointError, ConfigError, DependencyError, NonFiniteError
from spp.files import dtype_name
from spp.files.formats import format_of
from spp.files.hashes import tensor_bytes
from spp.masks.patterns import as_array
from spp.weights.base import FLOATS
from spp.weights.packed.disk import DenseReader
from spp.weights.quantized.matrix import QuantizedLayout, QuantizedWeight

_TOGETHER = 1 << 22  # weights that are decoded together
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_STATE = "quant_state.bitsandbytes__"
_SCALES = ("_scale_inv", "_scale")
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # of each byte
Get = Callable[[str], Tensor]


class Stored(ABC):
    """One quantized weight on disk.

    Attributes:
        form: for messages, such as "nf4".
        parts: keys of the tensors that it is made of.
        shape: (m, n).
        dtype: of the weight.
        lossless: whether it is stored with all its digits.
    """

    form: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    lossless = False

    @abstractmethod
    def open(self, get: Get, where: str) -> Callable[[slice], Tensor]:
        """Return what decodes rows of the weight; its scales are checked.

        Args:
            get: returns one of `parts` as it is stored.
            where: the name of the weight in messages.

        Raises:
            CheckpointError: the parts do not belong together. NonFiniteError: a scale is NaN or infinite.
        """


class _BitsAndBytes(Stored):
    def __init__(self, key: str, parts: tuple[str, ...], settings: dict[str, Any]) -> None:
        self._key, self.parts, self._settings = key, parts, settings
        self.shape = tuple(settings["shape"])
        self.dtype = FLOATS[settings["dtype"]]
        self.form = settings["quant_type"]

    def open(self, get: Get, where: str) -> Callable[[slice], Tensor]:
        """Decode with bitsandbytes, of which only the operator is used."""
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise DependencyError("bitsandbytes is missing, which decodes such weights: spp[quantized]") from error
        said, nested, size = self._settings, None, 0
        scales = get(f"{self._key}.absmax") if self.form != "int8" else get(self.parts[1])
        if f"{self._key}.nested_absmax" in self.parts:
            table, inner = get(f"{self._key}.nested_quant_map"), get(f"{self._key}.nested_absmax")
            offset = torch.tensor([float(said["nested_offset"])], device="cpu")
            nested = torch.cat([table.float(), offset, inner.float()]).view(torch.int32)
            size = int(said["nested_blocksize"])
        else:
            scales = scales.float().view(torch.int32)
        codes = get(self._key)
        codes = codes if self.form == "int8" else codes.reshape(-1)
        (m, n), block = self.shape, int(said.get("blocksize", 0))
        layout = QuantizedLayout(self.form, m, n, self.dtype, block, size)
        weight = QuantizedWeight(layout, codes, scales, nested)
        try:
            weight.check(where)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        return lambda rows: weight.decode(
            rows, slice(0, n), torch.empty(rows.stop - rows.start, n, dtype=self.dtype, device="cpu")
        )


class _Scaled(Stored):
    form = "float8"

    def __init__(self, key: str, scale: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._key, self._scale = key, scale
        self.parts, self.shape, self.dtype = (key, scale), shape, dtype

    def open(self, get: Get, where: str) -> Callable[[slice], Tensor]:
        """Return the weight as it is stored, with NaN where its scale is one: zeros are what is looked at."""
        scale, weight = get(self._scale), get(self._key)
        if not bool(torch.isfinite(scale.float()).all()):
            raise NonFiniteError(f"{where}: {self._scale} holds scales that are NaN or infinite; save it again")
        if not bool((scale.float() != 0).all()):
            raise CheckpointError(f"{where}: {self._scale} holds scales of 0, so its own bits do not tell its zeros")
        return lambda rows: weight[rows]


class _Affine(Stored):
    """A weight of GPTQ or AWQ, of which codes are integers and zero points as well.

    Args:
        path: of its module.
        bits: of a code.
        offset: what is added to a stored zero point.
        along_inputs: whether codes are packed along n, as GPTQ does it.
    """

    dtype = torch.float32

    def __init__(self, path: str, reader: DenseReader, bits: int, offset: int, *, along_inputs: bool) -> None:
        self._path, self._bits, self._offset, self._along_inputs = path, bits, offset, along_inputs
        self.form = "GPTQ" if along_inputs else "AWQ"
        names = ("qweight", "qzeros", "scales", *(("g_idx",) if along_inputs else ()))
        self.parts = tuple(f"{path}.{name}" for name in names)
        rows, cols = reader.shape(self.parts[0])
        each = 32 // bits
        n, m = (rows * each, cols) if along_inputs else (rows, cols * each)
        self.shape = (m, n)
        groups = reader.shape(self.parts[2])[0]
        expected = [reader.shape(self.parts[0]), (groups, m // each), (groups, m), *([(n,)] if along_inputs else [])]
        if [reader.shape(part) for part in self.parts] != expected or (not along_inputs and n % max(groups, 1)):
            raise ValueError(f"{path}: shapes of another layout")

    def open(self, get: Get, where: str) -> Callable[[slice], Tensor]:
        """Unpack some columns of the codes, which are rows of the weight."""
        qweight, qzeros, scales, *index = map(get, self.parts)
        (m, n), bits, each = self.shape, self._bits, 32 // self._bits
        if not bool(torch.isfinite(scales.float()).all()):
            raise NonFiniteError(f"{where}: {self.parts[2]} holds scales that are NaN or infinite; save it again")
        zeros = self._columns(qzeros, slice(0, m)) + self._offset  # (n / g, m)
        if int(zeros.max()) >= 2**bits:
            raise CheckpointError(f"{where}: {self.parts[1]} holds zero points beyond the {bits} bits of a code")
        groups = scales.shape[0]
        of = index[0].long() if index else torch.arange(n, device="cpu") // (n // groups)
        if int(of.min()) < 0 or int(of.max()) >= groups:
            raise CheckpointError(f"{where}: {self.parts[3]} names groups that have no scales: {groups} have")
        shifts = torch.arange(each, dtype=torch.int32, device="cpu") * bits

        def decode(rows: slice) -> Tensor:
            if self._along_inputs:
                codes = (qweight[:, None, rows] >> shifts[:, None]) & (2**bits - 1)  # (n / each, each, rows)
                codes = codes.reshape(n, -1)
            else:
                codes = self._columns(qweight, rows)
            values = (codes - zeros[:, rows][of]).float() * scales[:, rows][of].float()
            return values.T.contiguous()

        return decode

    def _columns(self, packed: Tensor, wanted: slice) -> Tensor:
        """Return columns of a matrix whose int32 hold several columns each."""
        each = 32 // self._bits
        order = torch.arange(each, device="cpu") if self._along_inputs else torch.tensor(_AWQ_ORDER, device="cpu")
        places = torch.empty(each, dtype=torch.int32, device="cpu")
        places[order] = torch.arange(each, dtype=torch.int32, device="cpu") * self._bits
        first, last = wanted.start // each, -(-wanted.stop // each)
        codes = (packed[:, first:last, None] >> places) & (2**self._bits - 1)
        return codes.reshape(packed.shape[0], -1)[:, wanted.start - first * each : wanted.stop - first * each]


class Bitmask(Stored):
    """A weight of compressed-tensors without its zeros.

    Bit j of row i of the bitmask (m, ⌈n/8⌉), the lowest of a byte first, says whether W[i, j] is among the values, and
    these lie row by row. A row of sparse-bitmask begins at its row_offsets (m,); one of sparse-24-bitmask has n/2
    values. A vector is stored as a row.

    Args:
        path: what the names of its parts begin with.
        reader: of the checkpoint.
    """

    lossless = True

    def __init__(self, path: str, reader: DenseReader) -> None:
        self._reader, self.key = reader, f"{path.removesuffix('.weight')}.weight"
        names = ("compressed", "bitmask", "shape", "row_offsets")
        self._offsets = f"{path}.row_offsets" in reader
        self.parts = tuple(f"{path}.{name}" for name in names if name != "row_offsets" or self._offsets)
        self.form = "sparse-bitmask" if self._offsets else "sparse-24-bitmask"
        if self.parts[2] not in reader:
            self._refuse(f"{self.parts[2]} is missing")
        if self.key in reader:
            self._refuse("the weight is there as well")
        numbers = reader.tensor(self.parts[2]).reshape(-1)
        whole = not numbers.is_floating_point() and numbers.numel() in (1, 2)
        self.shape = tuple(map(int, numbers.tolist())) if whole else ()
        if not self.shape or min(self.shape) < 0:
            self._refuse(f"{self.parts[2]} is no shape of a matrix")
        self.dtype = reader.dtype(self.parts[0])
        m, n = self._rows_and_cols()
        found, expected = reader.shape(self.parts[1]), (*self.shape[:-1], -(-n // 8))
        if found != expected or reader.dtype(self.parts[1]) != torch.uint8:
            kind = dtype_name(reader.dtype(self.parts[1]))
            self._refuse(f"{self.parts[1]} is {kind} {found}; a weight {self.shape} needs uint8 {expected}")
        if not self._offsets and math.prod(reader.shape(self.parts[0])) * 2 != m * n:
            self._refuse(f"{self.parts[0]} is {reader.shape(self.parts[0])}; a weight {self.shape} has half its values")

    def _rows_and_cols(self) -> tuple[int, int]:
        return math.prod(self.shape[:-1]), self.shape[-1]

    def _refuse(self, problem: str) -> NoReturn:
        directory = self._reader.directory
        raise CheckpointError(
            f"{directory}: {self.key} (compressed as {self.form}): {problem}; the file is cut short or damaged: fetch "
            f"or save it again"
        )

    def open(self, get: Get, where: str) -> Callable[[slice], Tensor]:
        """Return what puts the values of some rows into their places; the parts are compared with each other first."""
        m, n = self._rows_and_cols()
        values, bits = get(self.parts[0]).reshape(-1), as_array(get(self.parts[1]).reshape(m, -(-n // 8)))
        counts = _ONES[bits].sum(axis=1, dtype=np.int64)
        ends = np.cumsum(counts)
        total = int(counts.sum())
        if total != values.numel():
            self._refuse(f"{self.parts[0]} holds {values.numel()} values, and {self.parts[1]} has places for {total}")
        if n % 8 and bool((bits[:, -1] >> n % 8).any()):
            self._refuse(f"{self.parts[1]} has places behind the {n} columns")
        if self._offsets:
            told = get(self.parts[3]).reshape(-1).tolist()
            if told != (ends - counts).tolist():
                self._refuse(f"{self.parts[3]} are not where the rows of {self.parts[1]} begin")

        def decode(rows: slice) -> Tensor:
            first, last = (0, m) if len(self.shape) == 1 else (rows.start, rows.stop)
            mask = np.unpackbits(bits[first:last], axis=1, count=n, bitorder="little").view(np.bool_)
            start = int(ends[first] - counts[first]) if first < last else 0
            part = values[start : start + int(counts[first:last].sum())]
            whole = torch.zeros(last - first, n, dtype=self.dtype, device="cpu")
            whole.masked_scatter_(torch.from_numpy(mask), part)
            return whole if len(self.shape) == 2 else whole.view(-1)[rows]

        return decode


class DequantizedReader(DenseReader):
    """Read a checkpoint's weights plain, where they are quantized or compressed in a form that is known here.

    Keys, shapes, dtypes and bytes are those of plain weights; what is not known stays as it is stored.

    Attributes:
        quantized: {key of a weight: how it is stored}.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.quantized: dict[str, Stored] = {}
        self._hidden: frozenset[str] = frozenset()
        super().__init__(directory)
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DequantizedReader:
        return self

    def keys(self) -> list[str]:
        """Return the sorted names of all tensors, those of quantized weights among them."""
        return sorted((set(super().keys()) - self._hidden) | self.quantized.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.quantized or (super().__contains__(key) and key not in self._hidden)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.quantized[key].shape if key in self.quantized else super().shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self.quantized[key].dtype if key in self.quantized else super().dtype(key)

    def file_of(self, key: str) -> str:
        """Return the name of the file that holds a tensor, or the first part of it."""
        return super().file_of(self.quantized[key].parts[0] if key in self.quantized else key)

    def shards(self) -> dict[str, list[str]]:
        """Return file name -> its tensors, the decoded ones last; a file that holds none is not there."""
        shards = {name: [k for k in keys if k not in self._hidden] for name, keys in super().shards().items()}
        for key in self.quantized:
            shards[self.file_of(key)].append(key)
        return {name: keys for name, keys in shards.items() if keys}

    def release(self, key: str) -> None:
        """Give the memory back in which a mapped tensor lies, or its parts do."""
        for part in self.quantized[key].parts if key in self.quantized else (key,):
            super().release(part)

    def raw(self, key: str) -> memoryview:
        """Return a tensor's bytes: those on the disk, or decoded ones."""
        if key not in self.quantized:
            return super().raw(key)
        return as_array(self.tensor(key).reshape(-1).view(torch.uint8)).data.toreadonly()

    def pieces(self, key: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes; of a quantized one some rows at a time."""
        if key not in self.quantized:
            yield from super().pieces(key)
            return
        for block in self._blocks(key):
            yield from tensor_bytes(block)

    def lies_in_file(self, key: str) -> bool:
        """Whether a tensor's bytes are those of its file."""
        return key not in self.quantized and super().lies_in_file(key)

    def tensor(self, key: str) -> Tensor:
        """Return a tensor on the CPU: mapped from the file, or decoded."""
        return torch.cat(list(self._blocks(key))) if key in self.quantized else super().tensor(key)

    def _blocks(self, key: str) -> Iterator[Tensor]:
        stored = self.quantized[key]
        how = "compressed" if stored.lossless else "quantized"
        decode = stored.open(super().tensor, f"{self.directory}: {key} ({how} as {stored.form})")
        step = max(1, _TOGETHER // max(1, math.prod(stored.shape[1:])))
        for start in range(0, max(stored.shape[0], 1), step):  # once, of no rows
            yield decode(slice(start, min(start + step, stored.shape[0])))

    def _find(self) -> None:
        stored = super().keys()
        config = self.config()
        found: dict[str, Stored] = {}
        for key in stored:
            try:
                one = self._known(key, config)
            except CheckpointError:  # parts that contradict each other
                raise
            except (KeyError, ValueError, TypeError):  # parts of another layout, or not wholly there
                one = None
            if one is not None:
                found[one[0]] = one[1]
        self._hidden = frozenset(part for one in found.values() for part in one.parts)
        self.quantized = found

    def _known(self, key: str, config: dict[str, Any]) -> tuple[str, Stored] | None:
        """Return (key of the weight, how it is stored) where a tensor is the first part of one that is known."""
        parent, _, name = key.rpartition(".")
        dtype = super().dtype(key)
        if name == "absmax":
            return parent, self._four_bits(parent)
        if name == "compressed" and f"{parent}.bitmask" in self and dtype in FLOATS.values():
            one = Bitmask(parent, self)
            return one.key, one
        if name == "SCB" and f"{parent}.weight" in self:
            return f"{parent}.weight", self._eight_bits(parent)
        if dtype.is_floating_point and dtype.itemsize == 1:
            scale = next((f"{key}{end}" for end in _SCALES if f"{key}{end}" in self), None)
            return None if scale is None else (key, _Scaled(key, scale, super().shape(key), dtype))
        if name == "qweight" and dtype == torch.int32:
            affine = self._affine(parent, config)
            return None if affine is None else (f"{parent}.weight", affine)
        return None

    def _four_bits(self, key: str) -> Stored:
        names = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4"]
        parts = [part for name in names if (part := f"{key}.{name}") in self]
        (state,) = (part for part in parts if _STATE in part)
        settings = json.loads(bytes(super().tensor(state).tolist()))
        if settings["quant_type"] not in ("nf4", "fp4") or len(settings["shape"]) != 2:
            raise ValueError(f"{key}: of another form")
        if super().dtype(key) != torch.uint8:
            raise ValueError(f"{key}: codes in {dtype_name(super().dtype(key))}")
        return _BitsAndBytes(key, (key, *parts), settings)

    def _eight_bits(self, path: str) -> Stored:
        key, scales = f"{path}.weight", f"{path}.SCB"
        shape = super().shape(key)
        if super().dtype(key) != torch.int8 or len(shape) != 2 or super().shape(scales) != shape[:1]:
            raise ValueError(f"{key}: of another form")
        rest = tuple(part for part in (f"{path}.weight_format",) if part in self)
        return _BitsAndBytes(key, (key, scales, *rest), {"quant_type": "int8", "shape": shape, "dtype": "float32"})

    def _affine(self, path: str, config: dict[str, Any]) -> Stored | None:
        """Return a weight of GPTQ or AWQ, where config.json says all that the tensors leave open."""
        settings, said = config.get("quantization_config"), format_of(config)
        if said is None or not isinstance(settings, dict) or said.method not in ("gptq", "awq"):
            return None
        bits = settings.get("bits", settings.get("w_bit"))
        if said.method == "awq":
            known = bits == 4 and str(settings.get("version", "gemm")).lower() == "gemm"
            return _Affine(path, self, 4, 0, along_inputs=False) if known else None
        version = {"gptq": 1, "gptq_v2": 0}.get(settings.get("checkpoint_format", "gptq"))
        if bits not in (2, 4, 8) or version is None:
            return None
        return _Affine(path, self, bits, version, along_inputs=True)
