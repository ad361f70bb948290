"""Sparsity patterns, and masks read from bits.

"N:M" keeps at most N of every M consecutive weights along the input dimension ("2:4" is 50 % sparse); a fraction p is
unstructured: the share of weights that is pruned. A weight counts as zero when all its bits but the sign are 0, so -0.0
is a zero, a subnormal is not, and a process that flushes denormals to zero sees the same mask as any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spp.configs.pattern import USUAL_GROUPS
from spp.configs.pattern import Pattern as Pattern  # beside the masks that it describes
from spp.errors import PatternError

DENSE = "dense"
UNSTRUCTURED = "unstructured"
SHIFTS = (7, 6, 5, 4, 3, 2, 1, 0)  # of the bits of a byte: the first entry is in the highest
_CHUNK = 1 << 17  # weights looked at together: bits, bools and packed bytes of a chunk stay in a core's cache

_EXPECTED = 14.0  # groups with too many weights, from which on their absence is no chance: once in 10⁶ tensors

BITS: dict[torch.dtype, torch.dtype] = {  # the integer type whose bits a floating type is read as
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}

_BYTES = np.arange(256, dtype=np.uint8)
_IN_BYTE = np.unpackbits(_BYTES[:, None], axis=1)  # (256, 8)
_COUNT = _IN_BYTE.sum(axis=1, dtype=np.uint8)  # kept weights among the 8 of a byte
_MOST = {m: _IN_BYTE.reshape(256, 8 // m, m).sum(axis=2, dtype=np.uint8).max(axis=1) for m in (2, 4, 8)}


class _Memory:
    """The memory of a tensor in terms of numpy's array interface; an array made from it keeps the tensor alive."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, t: Tensor, dtype: np.dtype[Any]) -> None:
        if not t.is_cpu or not t.data_ptr():
            raise TypeError(f"a tensor on {t.device}, a {type(t).__name__}, has no memory that numpy can read")
        strides = None if t.is_contiguous() else tuple([stride * t.element_size() for stride in t.stride()])
        facts = {"version": 3, "typestr": dtype.str, "shape": tuple(t.shape), "strides": strides}
        self.tensor, self.__array_interface__ = t, {**facts, "data": (t.data_ptr(), False)}  # not read-only


def as_array(t: Tensor) -> npt.NDArray[Any]:
    """Return a CPU tensor as a numpy array of the same memory, whether it requires grad or not.

    `Tensor.numpy` would mark the storage as one that can never be resized, which FSDP2 does to parameters.
    `np.from_dlpack` leaves no mark, but an array of numpy 1.26 that it returns cannot be written to.

    Args:
        t: of a dtype that numpy has, any strides; bfloat16 is viewed as int16 first.
    """
    dtype = np.dtype(str(t.dtype).removeprefix("torch."))
    return np.asarray(_Memory(t, dtype)) if t.numel() else np.empty(tuple(t.shape), dtype)


def nonzero_mask(t: Tensor) -> Tensor:
    """Return a bool tensor of t's shape, True where t is not zero, decided by its bits and never by arithmetic.

    Args:
        t: floating point (float64, 32, 16, bfloat16, float8), integer or bool, any strides and device.
    """
    if t.dtype == torch.bool:
        return t.clone()
    bits = BITS.get(t.dtype)
    if bits is None:
        if t.dtype.is_floating_point or t.dtype.is_complex:
            raise PatternError(f"a mask cannot be read from the bits of {t.dtype}")
        return t.ne(0)
    view = t.detach().view(bits)
    if t.device.type != "cpu" or not t.is_contiguous():
        return view.ne(0).logical_and_(view.ne(torch.iinfo(bits).min))
    mask = torch.empty(t.shape, dtype=torch.bool, device="cpu")
    flat, out = as_array(view.reshape(-1)), as_array(mask.view(-1))
    for start in range(0, len(flat), _CHUNK):
        _nonzero(flat[start : start + _CHUNK], out[start : start + _CHUNK])
    return mask


def magnitude_bits(t: Tensor) -> Tensor:
    """Return the bits of |t| as integers: of finite numbers the larger one has the larger bits."""
    bits = BITS.get(t.dtype)
    if bits is None:
        raise PatternError(f"magnitudes cannot be read from the bits of {t.dtype}")
    return t.detach().view(bits) & torch.iinfo(bits).max


def all_finite(t: Tensor) -> bool:
    """Whether t holds neither NaN nor infinity; one pass, nothing of t's size is allocated."""
    if t.numel() == 0 or not (t.dtype.is_floating_point or t.dtype.is_complex):
        return True
    if t.dtype not in BITS:
        return bool(torch.isfinite(t).all())
    if t.element_size() == 1:
        return all(bool(torch.isfinite(part.float()).all()) for part in t.reshape(-1).split(_CHUNK))
    low, high = torch.aminmax(t.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def pack_bits(t: Tensor) -> npt.NDArray[np.uint8]:
    """Return the mask of t as packed bits: row-major, first weight in the highest bit, the last byte padded with 0."""
    count = t.numel()
    packed = np.empty((count + 7) // 8, dtype=np.uint8)
    for start, part in _chunks(t.detach()):
        if t.device.type == "cpu" and t.dtype in BITS:  # numpy: no bool outlives the cache, no pool of threads to wake
            mask = _nonzero(as_array(part.view(BITS[t.dtype])))
        elif t.device.type == "cpu" and t.dtype == torch.bool:
            mask = as_array(part)
        else:
            mask = as_array(nonzero_mask(part).cpu())
        bits = np.packbits(mask)
        packed[start // 8 : start // 8 + len(bits)] = bits
    return packed


def unpack_bits(bits: npt.NDArray[np.uint8], shape: Sequence[int]) -> Tensor:
    """Return what `pack_bits` packed as a bool mask of `shape`, on the CPU."""
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).view(np.bool_)).view(*shape)


def pack_mask(mask: Tensor) -> Tensor:
    """Return a bool tensor of any shape as the bits of `pack_bits`, uint8 (⌈numel / 8⌉,), on its device."""
    if mask.device.type == "cpu":
        return torch.from_numpy(pack_bits(mask))
    flat = mask.reshape(-1)
    bytes_ = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (bytes_ << torch.tensor(SHIFTS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool tensor of `shape` that `pack_mask` packed, on its device."""
    if bits.device.type == "cpu":
        return unpack_bits(as_array(bits), shape)
    shifts = torch.tensor(SHIFTS, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> shifts & 1).view(-1)[: math.prod(shape)].to(torch.bool).view(*shape)


def count_kept(packed: npt.NDArray[np.uint8]) -> int:
    """Return how many bits of `pack_bits`'s answer are set."""
    return sum(int(_COUNT[packed[i : i + _CHUNK]].sum(dtype=np.int64)) for i in range(0, len(packed), _CHUNK))


def is_nm(mask: Tensor, kept: int, group: int, input_axis: int = -1) -> bool:
    """Whether at most `kept` of each `group` consecutive entries along the input axis are kept.

    Args:
        mask: bool (True = kept) or a weight, whose mask is read from its bits.
        kept: N.
        group: M; a mask whose input dimension it does not divide is not N:M.
        input_axis: the axis that groups run along.
    """
    if mask.dim() == 0 or mask.shape[input_axis] % group:
        return False
    mask = mask.movedim(input_axis, -1)
    if group in USUAL_GROUPS:
        return most_in_a_group(pack_bits(mask), group, kept) <= kept
    rows = max(1, _CHUNK // max(1, mask.shape[-1]))
    parts = nonzero_mask(mask).reshape(-1, mask.shape[-1] // group, group).split(rows)
    return all(part.numel() == 0 or int(part.sum(-1, dtype=torch.int32).max()) <= kept for part in parts)


def detect_pattern(mask: Tensor, input_axis: int = -1) -> str:
    """Return the pattern that a mask has: "N:M", "unstructured" or "dense".

    Usual are N = 1, 2, 4, … ≤ M / 2 of M = 2, 4, 8, 16, 32; named is the one of the lowest N / M that holds, of these
    the one of the smallest M. One whose groups are half empty or more is named where so few weights anywhere would
    hardly hold it by chance: what has been pruned to 2:4 after three quarters of it were zero is 2:4, while three
    quarters of zeros anywhere easily leave no more than 16 of every 32, and are unstructured. A mask without zeros is
    dense; one that is wholly zero is unstructured.

    Args:
        mask: bool (True = kept) or a weight, whose mask is read from its bits.
        input_axis: the axis that groups run along.
    """
    mask = mask.movedim(input_axis, -1) if mask.dim() else mask.reshape(1)
    return detect_packed(pack_bits(mask), mask.numel(), mask.shape[-1])


def detect_packed(packed: npt.NDArray[np.uint8], count: int, inputs: int) -> str:
    """`detect_pattern` of packed bits whose rows are `inputs` long; `count` weights in all."""
    return detect_counted(count_kept(packed), count, inputs, lambda group: most_in_a_group(packed, group, group // 2))


def detect_counted(kept: int, count: int, inputs: int, most: Callable[[int], int]) -> str:
    """`detect_pattern` of a mask that has been counted.

    Args:
        kept: weights that are not zero, of `count`.
        inputs: the length of a row.
        most: the largest number of kept weights in a group of the usual size that it is given; anything above half of
            that size will do for all that are.
    """
    if kept == count:
        return DENSE
    if kept == 0:
        return UNSTRUCTURED
    most, lowest = functools.cache(most), _lowest_share(kept, count)
    share = lowest
    while share <= 0.5:
        for group in USUAL_GROUPS:
            allowed = int(share * group)  # N of the group
            if inputs % group or not allowed or (share > lowest and _by_chance(kept, count, allowed, group)):
                continue
            if most(group) <= allowed:
                return f"{allowed}:{group}"
        share *= 2
    return UNSTRUCTURED


def is_loose(pattern: str, kept: int, count: int) -> bool:
    """Whether the groups of a detected pattern are half empty or more: "unstructured" to earlier versions."""
    allowed, _, group = pattern.partition(":")
    return bool(group) and int(allowed) / int(group) > _lowest_share(kept, count)


def _by_chance(kept: int, count: int, allowed: int, group: int) -> bool:
    """Whether `kept` of `count` weights at random places could well leave at most `allowed` in every group.

    Of ⌊count / M⌋ groups some P(Binomial(M, kept / count) > N) would have more; that none of them has, where _EXPECTED
    would have it, happens once in e^_EXPECTED.
    """
    p = kept / count
    above = sum(math.comb(group, k) * p**k * (1 - p) ** (group - k) for k in range(allowed + 1, group + 1))
    return count // group * above < _EXPECTED


def _lowest_share(kept: int, count: int) -> float:
    """Return the lowest N / M, of 1/2, 1/4, 1/8, …, that allows `kept` of `count` weights; 1/2 where none does."""
    share = 0.5
    while share / 2 * count >= kept:
        share /= 2
    return share


def most_in_a_group(packed: npt.NDArray[np.uint8], group: int, enough: int) -> int:
    """Return the largest number of kept weights in a usual group; stops at the first that is above `enough`."""
    most = 0
    for start in range(0, len(packed), _CHUNK):  # a chunk is a whole number of the longest groups
        part = packed[start : start + _CHUNK]
        counts = _MOST[min(group, 8)][part]
        for _ in range(group.bit_length() - 4):  # rows are whole groups, so pairs never straddle two rows
            counts = counts[0::2] + counts[1::2]
        most = max(most, int(counts.max(initial=0)))
        if most > enough:
            break
    return most


def _nonzero(bits: npt.NDArray[Any], out: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_]:
    """Return which signed integers have a bit set beside the sign."""
    result: npt.NDArray[np.bool_] = np.not_equal(np.bitwise_and(bits, np.iinfo(bits.dtype).max), 0, out=out)
    return result


def _chunks(t: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset, part) of t in row-major order; offsets are multiples of 8, and only a part is ever copied."""
    if t.is_contiguous():
        flat = t.view(-1)
        for start in range(0, flat.numel(), _CHUNK):
            yield start, flat[start : start + _CHUNK]
        return
    width = t[0].numel() if t.dim() and t.shape[0] else 1
    step = 8 * max(1, _CHUNK // (8 * max(1, width)))
    for first in range(0, t.shape[0], step):
        yield first * width, t[first : first + step].reshape(-1)


# ---- What packed bits tell of a tensor whose values are gone: its pattern along any axis.

Bits = npt.NDArray[np.uint8]


def detect_along(
    packed: Bits, shape: Sequence[int], axis: int, kept: int | None = None, most: Sequence[int] | None = None
) -> str:
    """Return the pattern of a tensor from the packed bits of its mask.

    Args:
        packed: of `patterns.pack_bits`, row-major.
        shape: of the tensor, one dimension at least.
        axis: that groups run along, counted from the front.
        kept: the number of set bits, where that is known.
        most: for each usual group the largest number of kept weights in one along the last axis, where that is known;
            a group whose size does not divide the last dimension may have any.
    """
    count = math.prod(shape)
    if axis != len(shape) - 1:
        most = _most_along(packed, shape, axis)
    if most is None:
        return detect_packed(packed, count, shape[axis])
    largest = dict(zip(USUAL_GROUPS, most, strict=True))
    return detect_counted(count_kept(packed) if kept is None else kept, count, shape[axis], largest.__getitem__)


def _most_along(packed: Bits, shape: Sequence[int], axis: int) -> list[int]:
    """Return the largest number of kept weights in a group of each usual size along an axis that is not the last."""
    most = [0] * len(USUAL_GROUPS)
    for mask in _parts(packed, shape, axis):
        turned = np.packbits(np.moveaxis(mask, 0, -1))
        for k, group in enumerate(USUAL_GROUPS):
            if shape[axis] % group == 0:
                most[k] = max(most[k], most_in_a_group(turned, group, group // 2))
    return most


def _parts(packed: Bits, shape: Sequence[int], axis: int) -> Iterator[Bits]:
    """Yield the mask (shape[axis], rest) for each index before the axis, one byte a weight."""
    size = math.prod(shape[axis:])
    for index in range(math.prod(shape[:axis]) if size else 0):
        first, skip = divmod(index * size, 8)
        bits = np.unpackbits(packed[first : (index * size + size + 7) // 8])[skip : skip + size]
        yield bits.reshape(shape[axis], -1)
