"""MaskUpdateOptions: when and how masks move while an adapter trains (what is done: spp.training.mask_updates)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from spp.configs.checks import check_choice, check_int, check_number

# How the share that is exchanged shrinks, by the part of the updates that is done.
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "cubic": lambda done: (1 - done) ** 3,
}
DROPS = ("activation", "magnitude")
GROWS = ("gradient", "saliency")


@dataclass(frozen=True, kw_only=True)
class MaskUpdateOptions:
    """The options of mask updates; TuneConfig has each with the prefix `mask_update_`.

    Args:
        every: k, optimizer steps between two updates.
        fraction: share of a layer's kept weights that the first update exchanges at most, in [0, 1].
        until: part of the steps, in (0, 1], after which masks stay.
        decay: how the fraction shrinks to 0 until then, "cosine" or "cubic".
        drop: what goes, by "activation" or "magnitude".
        grow: what comes, by "gradient" or "saliency".

    Raises:
        ConfigError: an option makes no sense; the message names it as TuneConfig does.
    """

    every: int
    fraction: float = 0.1
    until: float = 0.75
    decay: str = "cosine"
    drop: str = "activation"
    grow: str = "gradient"

    def __post_init__(self) -> None:
        check_int("mask_update_every", self.every, least=1)
        check_number("mask_update_fraction", self.fraction, least=0.0, most=1.0)
        check_number("mask_update_until", self.until, above=0.0, most=1.0)
        check_choice("mask_update_decay", self.decay, tuple(DECAYS))
        check_choice("mask_update_drop", self.drop, DROPS)
        check_choice("mask_update_grow", self.grow, GROWS)
