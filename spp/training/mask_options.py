"""What mask updates can be told, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable

from spp.training.checks import check_choice, check_int, check_number

DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "cubic": lambda done: (1 - done) ** 3,
}
DROPS = ("activation", "magnitude")
GROWS = ("gradient", "saliency")


def check_mask_updates(
    every: object, fraction: object, until: object, decay: object, drop: object, grow: object
) -> None:
    """Raise a ConfigError, naming it, for an option that makes no sense; what they mean, MaskUpdates says."""
    check_int("mask_update_every", every, least=1)
    check_number("mask_update_fraction", fraction, least=0.0, most=1.0)
    check_number("mask_update_until", until, above=0.0, most=1.0)
    check_choice("mask_update_decay", decay, tuple(DECAYS))
    check_choice("mask_update_drop", drop, DROPS)
    check_choice("mask_update_grow", grow, GROWS)
