"""What packed bits tell of a tensor whose values are gone: its pattern along any axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from spp.configs.pattern import USUAL_GROUPS
from spp.patterns import count_kept, detect_counted, detect_packed, most_in_a_group

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
