"""The functions of merge.c: a weight merged, its mask packed, its groups counted and its bytes summed up in one pass.

All take pieces of PIECE entries at most, one after the other or on several threads (they release Python's lock), and
what they find adds up to the same bits either way. The twins are spp.merging.weight and spp.masks.patterns in plain
torch.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.files.hashes import combine_crc32
from spp.kernels.choice import VARIABLE, kernels
from spp.kernels.native.compiler import DTYPES, Refused, Source, i32, i64, prepared
from spp.masks.patterns import as_array, pack_bits
from spp.rules import Adapter, effective_weight, get_rule
from spp.rules.adapter import WHOLE
from spp.rules.base import Rule
from spp.rules.spp import Factors
from spp.rules.terms import TermFactors

MERGE = Source("merge", 3, ("avx2", "f16c", "pclmulqdq", "popcnt"))
PIECE = 2**20  # entries; a multiple of the 4096 that are summed up together, so part of what a report says
_SIZES = 5  # of groups that are counted

pointer = ctypes.c_void_p
Bytes = npt.NDArray[np.uint8]


class _Term(ctypes.Structure):
    _fields_ = [("alpha", pointer), ("scaled_beta", pointer), ("r", i64)]


class _Plan(ctypes.Structure):
    _fields_ = [
        *(("terms", pointer), ("count", i64), ("rows", i64), ("cols", i64)),
        *((name, ctypes.c_int32) for name in ("transposed", "dtype", "stored_as")),
    ]


class _Findings(ctypes.Structure):
    _fields_ = [
        *((name, i64) for name in ("kept", "rescued", "changed", "updated", "moved")),
        *(("inner", ctypes.c_double), ("square", ctypes.c_double), ("largest", ctypes.c_float)),
        *(("finite_before", ctypes.c_int32), ("finite_after", ctypes.c_int32)),
        *(("most", ctypes.c_int32 * _SIZES), ("crc", ctypes.c_uint32)),
    ]


@dataclass(frozen=True)
class Found:
    """The facts found of some consecutive entries of a tensor.

    Attributes:
        kept: how many are not zero.
        rescued: how many of these rounded to zero.
        changed: how many are zero before or after, and not both.
        updated: how many have an update that is not zero; moved: how many of these are not what W alone rounds to.
        inner, square: ⟨change, update⟩ and ⟨update, update⟩.
        largest: the largest |change| / |W|.
        finite_before, finite_after: whether all are finite.
        most: the largest number of kept ones in a group of each usual size along the last axis.
        crc: zlib.crc32 of the bytes after; size: how many these are.
    """

    kept: int = 0
    rescued: int = 0
    changed: int = 0
    updated: int = 0
    moved: int = 0
    inner: float = 0.0
    square: float = 0.0
    largest: float = 0.0
    finite_before: bool = True
    finite_after: bool = True
    most: tuple[int, ...] = (0,) * _SIZES
    crc: int = 0
    size: int = 0

    def then(self, other: Found) -> Found:
        """Return what is known of these entries and of those that follow."""
        return Found(
            self.kept + other.kept,
            self.rescued + other.rescued,
            self.changed + other.changed,
            self.updated + other.updated,
            self.moved + other.moved,
            self.inner + other.inner,
            self.square + other.square,
            max(self.largest, other.largest),
            self.finite_before and other.finite_before,
            self.finite_after and other.finite_after,
            tuple(map(max, self.most, other.most)),
            combine_crc32(self.crc, other.crc, other.size),
            self.size + other.size,
        )


def library() -> Any:
    """Return the compiled library, None where torch does the work: by choice, or because there is none here.

    Raises:
        ConfigError: SPP_KERNELS=native asks for it, and there is none; the message says why.
    """
    choice = kernels()
    if choice not in ("auto", "native"):
        return None
    loaded, refusal = _load()
    if loaded is None and choice == "native":
        raise ConfigError(f"{VARIABLE}=native: {refusal}; use auto or torch")
    return loaded


def why_not() -> str | None:
    """Return why there is no compiled library on this machine; None where there is one."""
    return _load()[1]


def crc32(library: Any, data: Bytes) -> int:
    """Return zlib.crc32 of contiguous bytes."""
    return int(library.spp_crc32(0, data.ctypes.data, data.size))


def scan(library: Any, address: int, dtype: torch.dtype, count: int, bits: Bytes) -> Found:
    """Look at entries as they are, from an address on, and write the packed bits of their mask."""
    found = _Findings(finite_before=1, finite_after=1)
    library.spp_scan(address, DTYPES[dtype], count, bits.ctypes.data, ctypes.byref(found))
    return _found(found, count * dtype.itemsize)


def scan_file(library: Any, file: int, offset: int, dtype: torch.dtype, count: int, bits: Bytes) -> Found:
    """`scan` entries of an open file, which begin at its byte `offset`.

    Raises:
        OSError: it cannot be read. EOFError: it ends too early.
    """
    found = _Findings(finite_before=1, finite_after=1)
    _require(library.spp_scan_file(file, offset, DTYPES[dtype], count, bits.ctypes.data, ctypes.byref(found)))
    return _found(found, count * dtype.itemsize)


def crc32_file(library: Any, file: int, offset: int, size: int) -> int:
    """Return zlib.crc32 of bytes of an open file; raises as `scan_file`."""
    found = _Findings()
    _require(library.spp_crc32_file(file, offset, size, ctypes.byref(found)))
    return int(found.crc)


class Matrix:
    """A weight as it is stored, with what it is to be multiplied by.

    Args:
        library: from `library`.
        rows, cols: as stored: (outputs, inputs), or `transposed` (inputs, outputs).
        dtype, stored_as: before and after, keys of DTYPES.
        terms: from `terms_of`; none to convert it alone.
    """

    def __init__(
        self,
        library: Any,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        stored_as: torch.dtype,
        terms: Sequence[Factors] = (),
        *,
        transposed: bool = False,
    ) -> None:
        self._library = library
        self._kept = [(f.alpha.contiguous(), f.scaled_beta.contiguous()) for f in terms]  # the plan points into them
        self._terms = (_Term * len(terms))(*(_Term(a.data_ptr(), b.data_ptr(), len(a)) for a, b in self._kept))
        self.count = rows * cols
        self.stored_as = stored_as
        self._plan = _Plan(
            ctypes.addressof(self._terms), len(terms), rows, cols, transposed, DTYPES[dtype], DTYPES[stored_as]
        )

    def merge(self, weight: int, out: int, bits: Bytes, begin: int, end: int) -> Found:
        """Merge entries [begin, end) of the matrix, PIECE at most; `begin` is a multiple of PIECE.

        Args:
            weight, out: addresses of entry `begin`.
            bits: (end - begin + 7) // 8 bytes for the packed mask.
        """
        found = _Findings(finite_before=1, finite_after=1)
        self._library.spp_merge(
            ctypes.byref(self._plan), weight, out, bits.ctypes.data, begin, end, ctypes.byref(found)
        )
        return _found(found, (end - begin) * self.stored_as.itemsize)

    def merge_file(self, file: int, offset: int, out: int, bits: Bytes, begin: int, end: int) -> Found:
        """`merge` entries of an open file, where `begin` is at byte `offset`; raises as `scan_file`."""
        found = _Findings(finite_before=1, finite_after=1)
        _require(
            self._library.spp_merge_file(
                ctypes.byref(self._plan), file, offset, out, bits.ctypes.data, begin, end, ctypes.byref(found)
            )
        )
        return _found(found, (end - begin) * self.stored_as.itemsize)


def terms_of(rule: Rule, factors: Any) -> list[Factors] | None:
    """Return the terms that a rule multiplies W by 1 plus the sum of; None for a rule that is not of that form."""
    if isinstance(factors, Factors) and rule.name == "spp":
        return [factors]
    if isinstance(factors, TermFactors) and all(isinstance(term, Factors) for term in factors.terms):
        return list(factors.terms)  # type: ignore[arg-type]  # they are
    return None


def merge_matrix(rule: Rule, weight: Tensor, factors: Any, stored_as: torch.dtype) -> tuple[Tensor, Found] | None:
    """Return (W_merged (m, n), what was found), rounded to nearest; None where torch has to do it.

    W may be such a matrix transposed; `factors` are the rule's in float32.
    """
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu"
    terms = terms_of(rule, factors)
    possible = plain and terms and weight.dtype in DTYPES and stored_as in DTYPES
    compiled = library() if possible else None
    if compiled is None or terms is None:
        return None
    transposed = not weight.is_contiguous()
    stored = weight.detach().t() if transposed else weight.detach()
    if not stored.is_contiguous():
        return None
    rows, cols = stored.shape
    matrix = Matrix(compiled, rows, cols, weight.dtype, stored_as, terms, transposed=transposed)
    merged = torch.empty(stored.shape, dtype=stored_as, device="cpu")
    bits, found = np.empty(PIECE // 8, np.uint8), Found()
    for begin in range(0, matrix.count, PIECE):
        end = min(begin + PIECE, matrix.count)
        source = stored.data_ptr() + begin * weight.dtype.itemsize
        target = merged.data_ptr() + begin * stored_as.itemsize
        found = found.then(matrix.merge(source, target, bits, begin, end))
    return merged.t() if transposed else merged, found


def _found(found: _Findings, size: int) -> Found:
    counts = (found.kept, found.rescued, found.changed, found.updated, found.moved)
    sums = (found.inner, found.square, found.largest)
    return Found(
        *counts, *sums, bool(found.finite_before), bool(found.finite_after), tuple(found.most), found.crc, size
    )


def _require(failed: int) -> None:
    """Raise what a function says that reads a file."""
    if failed < 0:
        raise EOFError
    if failed:
        raise OSError(failed, os.strerror(failed))


def compiled(*dtypes: torch.dtype) -> Any:
    """Return the compiled library where there is one and it knows these dtypes, else None."""
    return library() if all(dtype in DTYPES for dtype in dtypes) else None


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    return prepared(MERGE, _declare_and_probe, "weights are merged and checked by torch")


def _declare_and_probe(library: Any) -> None:
    """Raise Refused unless a small weight is merged, read as a mask and summed up as torch and zlib do it."""
    library.spp_crc32.argtypes, library.spp_crc32.restype = [ctypes.c_uint32, pointer, i64], ctypes.c_uint32
    library.spp_scan.argtypes, library.spp_scan.restype = [pointer, i32, i64, pointer, pointer], None
    library.spp_merge.argtypes = [pointer, pointer, pointer, pointer, i64, i64, pointer]
    library.spp_merge.restype = None
    library.spp_crc32_file.argtypes = [i32, i64, i64, pointer]
    library.spp_scan_file.argtypes = [i32, i64, i32, i64, pointer, pointer]
    library.spp_merge_file.argtypes = [pointer, i32, i64, pointer, pointer, i64, i64, pointer]
    rule, m, n = get_rule("spp"), 37, 75
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(m, n, generator=generator, device="cpu") * (
            torch.rand(m, n, generator=generator, device="cpu") < 0.5
        )
        weight[0] = torch.finfo(dtype).smallest_normal  # scaled by a small factor, these are rescued
        weight = weight.to(dtype)
        params = [
            torch.randn(5, n, generator=generator, device="cpu"),
            torch.randn(m, 1, generator=generator, device="cpu"),
        ]
        params[0][0], params[1][0] = 0.25, 1.0
        params[0][0, :9] = -0.5  # M = 0
        expected = effective_weight(weight, Adapter(rule, params, 2.0))
        update, out, bits = (
            torch.empty(m, n, device="cpu"),
            torch.empty_like(weight),
            np.empty((m * n + 7) // 8, np.uint8),
        )
        matrix = Matrix(library, m, n, dtype, dtype, [rule.prepare(params, 2.0, m, torch.float32)])
        found = matrix.merge(weight.data_ptr(), out.data_ptr(), bits, 0, m * n)
        data = as_array(expected.view(torch.uint8)).tobytes()
        if not torch.equal(out.view(torch.uint8), expected.view(torch.uint8)) or found.crc != zlib.crc32(data):
            raise Refused(f"the compiled merge in {dtype} is not torch's on a small weight")
        rule.delta(weight, rule.prepare(params, 2.0, m, torch.float32), WHOLE, WHOLE, update)
        if (found.updated, found.moved) != (int(update.count_nonzero()), int((expected != weight).sum())):
            raise Refused(f"the compiled counts in {dtype} are not torch's on a small weight")
        seen = scan(library, out.data_ptr(), dtype, m * n, np.empty_like(bits))
        if not np.array_equal(bits, pack_bits(weight)) or found.kept != seen.kept or found.rescued != 9:
            raise Refused(f"the compiled mask in {dtype} is not torch's on a small weight")
