"""Checks of options, each a ConfigError that names the option, what it is and what it must be."""

from __future__ import annotations

import math
import os
from pathlib import Path

from spp.errors import ConfigError


def check_path(name: str, value: object) -> str:
    """Return a path or an id as a str."""
    if not isinstance(value, (str, Path, os.PathLike)) or not os.fspath(value):
        raise ConfigError(f"{name} is {value!r}; it must be a path or an id")
    return str(os.fspath(value))


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise unless a value is one of the known ones."""
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; known: {', '.join(known)}")


def check_int(name: str, value: object, *, least: int) -> None:
    """Raise unless a value is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be an int of at least {least}")


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Raise unless a value is a finite number within the bounds that are given."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", least), ("above", above), ("below", below), ("at most", most))
        if bound is not None
    ]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not isinstance(value, (int, float))
        or not number
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
        or (most is not None and value > most)
    ):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number {' and '.join(bounds)}")
