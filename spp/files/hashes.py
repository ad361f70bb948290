"""Hashes of tensors: of the zero pattern alone, and of the contents as safetensors stores them.

mask_sha256   = sha256 over b"spp-mask-1", the shape as little-endian int64, then the packed bits (row-major, first
                weight in the highest bit) of "is not zero", read from the bits of the tensor.
content_crc32 = zlib.crc32 over the raw little-endian bytes, row-major.
values_sha256 = sha256 over b"spp-values-1", the dtype's name, the shape as little-endian int64, then the sha256 of each
                piece: of each matrix (the last two dimensions) 2^20 weights at a time, row-major, -0.0 as 0.0. Pieces
                may be hashed in any order, by several threads, while they are read or written.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spp.masks.patterns import as_array, pack_bits

_ONE, _POLYNOMIAL = 1 << 31, 0xEDB88320  # of CRC-32, the bits in mirrored order
_PIECE = 1 << 22  # bytes that a copy to the CPU or to row-major order takes at once
VALUES_PIECE = 1 << 20  # weights of a piece of values_sha256: part of the format
_MOST_THREADS = 8
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32", "bfloat16", …"""
    return str(dtype).removeprefix("torch.")


def mask_sha256(t: Tensor) -> str:
    """Return the hex sha256 of the zero pattern of t."""
    return packed_sha256(t.shape, pack_bits(t))


def packed_sha256(shape: tuple[int, ...] | torch.Size, packed: npt.NDArray[np.uint8]) -> str:
    """`mask_sha256` from the packed bits of `patterns.pack_bits`."""
    digest = hashlib.sha256(b"spp-mask-1")
    digest.update(struct.pack(f"<{len(shape)}q", *shape))
    digest.update(packed.data)
    return digest.hexdigest()


def values_sha256(t: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Return the hex sha256 of the values of t as they are in a dtype; None where t is on the meta device.

    Args:
        t: floating point; it may be anywhere and have any strides, and a piece of it is copied at a time at most.
        dtype: round to it first; None is t's own.
    """
    if t.is_meta:
        return None
    dtype, shape, t = dtype or t.dtype, t.shape, t.detach()
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    if threads == 1 or t.numel() <= VALUES_PIECE or not t.is_contiguous():  # copies of pieces would pile up
        return joined_sha256(shape, dtype, [piece_sha256(part, dtype) for part in _value_pieces(t)])
    with ThreadPoolExecutor(threads) as pool:  # hashlib releases Python's lock
        return joined_sha256(shape, dtype, pool.map(lambda part: piece_sha256(part, dtype), _value_pieces(t)))


def piece_sha256(part: Tensor, dtype: torch.dtype) -> bytes:
    """Return the sha256 of one piece of `values_sha256`: values in a row, rounded to a dtype."""
    held = part.to("cpu", dtype).contiguous().view(_INTEGERS[dtype.itemsize])
    bits: npt.NDArray[Any] = np.from_dlpack(held)
    others = bits != np.iinfo(bits.dtype).min  # all but −0.0
    if not others.all():
        bits = bits * others
    return hashlib.sha256(bits.data).digest()


def joined_sha256(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, pieces: Iterable[bytes]) -> str:
    """`values_sha256` from what `piece_sha256` gives of the pieces, in order."""
    digest = hashlib.sha256(b"spp-values-1" + dtype_name(dtype).encode())
    digest.update(struct.pack(f"<{len(shape)}q", *shape))
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _value_pieces(t: Tensor) -> Iterator[Tensor]:
    """Yield the values of t (…, m, n) row-major, of each matrix VALUES_PIECE at a time; one piece, empty, of none."""
    for matrix in t.flatten(0, -3).unbind(0) if t.dim() > 2 else [t]:
        count = matrix.numel()
        if matrix.is_contiguous():
            yield from matrix.reshape(-1).split(VALUES_PIECE) if count else [matrix.reshape(-1)]
            continue
        width = matrix.shape[-1]
        for begin in range(0, count, VALUES_PIECE):
            end = min(begin + VALUES_PIECE, count)
            first = begin // width
            rows = matrix[first : -(-end // width)].reshape(-1)
            yield rows[begin - first * width : end - first * width]


def content_crc32(t: Tensor) -> int:
    """Return zlib.crc32 of the bytes of t."""
    crc = 0
    for piece in tensor_bytes(t):
        crc = zlib.crc32(piece, crc)
    return crc


def combine_crc32(first: int, second: int, length: int) -> int:
    """Return zlib.crc32 of two pieces in a row from that of each; the second has `length` bytes."""
    return _times(_ahead(length), first) ^ second


@lru_cache(maxsize=256)
def _ahead(length: int) -> int:
    """Return x^(8 · length) modulo the polynomial of CRC-32: what moves a checksum ahead by so many bytes."""
    power, square = _ONE, _ONE >> 8  # x^0, x^8: the lowest power of x is the highest bit
    while length:
        if length & 1:
            power = _times(power, square)
        square = _times(square, square)
        length >>= 1
    return power


def _times(a: int, b: int) -> int:
    """Return the product of two polynomials over GF(2), modulo that of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def fingerprint(masks: Mapping[str, str]) -> str:
    """Return the hex fingerprint of a model from the mask_sha256 of each of its projections by key."""
    digest = hashlib.sha256(b"spp-base-1")
    for key in sorted(masks):
        digest.update(key.encode() + b"\0" + masks[key].encode() + b"\n")
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str | None:
    """Return a hash of all values of a model, by the names of its state dict; None where they are not all in memory."""
    try:
        return fingerprint({name: f"{content_crc32(value):08x}" for name, value in model.state_dict().items()})
    except (NotImplementedError, RuntimeError, AttributeError, TypeError):  # offloaded, sharded, state of another kind
        return None


def content_sha256(t: Tensor) -> str:
    """Return the hex sha256 of the bytes of t."""
    digest = hashlib.sha256()
    for piece in tensor_bytes(t):
        digest.update(piece)
    return digest.hexdigest()


def tensor_bytes(t: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of t in row-major order; a contiguous CPU tensor is never copied."""
    t = t.detach()
    if t.numel() == 0:
        return
    if t.is_contiguous():
        parts = [t.reshape(-1)] if t.device.type == "cpu" else list(t.reshape(-1).split(_PIECE // t.element_size()))
    else:
        rows = max(1, _PIECE // max(1, t[0].numel() * t.element_size()))
        parts = list(t.split(rows))
    for part in parts:
        flat = part.contiguous().cpu().reshape(-1)
        yield as_array(flat.view(torch.uint8)).data
