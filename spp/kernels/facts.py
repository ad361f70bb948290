"""What the kernels find out of a frozen weight once and remember while it stays as it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight or its base -> {(fact, place): (version, value)}


def remembered(fact: str, weight: Tensor, find: Callable[[Tensor], float]) -> float:
    """Return find(weight), computed anew only after the weight changed in place.

    A view, such as one expert of many or the transpose of a Conv1D's weight, is known by where it lies in its base.

    Args:
        fact: names what `find` finds.
        weight: a plain tensor in memory.
    """
    if weight.is_inference():  # it has no version to tell whether it changed
        return find(weight)
    base = weight if weight._base is None else weight._base
    facts: dict[object, tuple[int, float]] = _known.setdefault(base, {})
    place = (fact, weight.data_ptr(), tuple(weight.shape), weight.stride())
    known = facts.get(place)
    if known is None or known[0] != weight._version:
        known = facts[place] = weight._version, find(weight)
    return known[1]
