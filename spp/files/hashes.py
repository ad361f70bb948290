"""Hashes of tensors: of the zero pattern alone, and of the contents as safetensors stores them.

mask_sha256   = sha256 over b"spp-mask-1", the shape as little-endian int64, then the packed bits (row-major, first
                weight in the highest bit) of "is not zero", read from the bits of the tensor.
content_crc32 = zlib.crc32 over the raw little-endian bytes, row-major.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.patterns import as_array, pack_bits

_ONE, _POLYNOMIAL = 1 << 31, 0xEDB88320  # of CRC-32, the bits in mirrored order
_PIECE = 1 << 22  # bytes that a copy to the CPU or to row-major order takes at once


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
