"""Checks of options, each a ConfigError that names the option, what it is and what it must be; numbers in JSON."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp.errors import ConfigError, arg

DTYPES = ("float32", "bfloat16", "float16")
AUTO_DTYPES = ("auto", *DTYPES)  # auto is the checkpoint's own
DEVICES = ("auto", "cpu", "cuda")
DATA_FORMATS = ("auto", "text", "alpaca", "chat")
LARGEST_INT = 2**63 - 1  # that tensors and iterators count to
LARGEST_SEED = 2**32 - 1  # of NumPy, which transformers seeds too
BOS = ("auto", "always", "never")  # where windows of text begin with the BOS token
PROTOCOLS = ("per-window", "paper")  # of a perplexity: where BOS stands (spp.evaluation.windows)
CHARTS = ("png", "svg", "pdf")


def check_path(name: str, value: object) -> str:
    """Return a path or an id as a str."""
    if not isinstance(value, (str, Path, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise ConfigError(f"{arg(name)} is {value!r}; it must be a path or an id")
    return str(os.fspath(value))


def check_chart(name: str, path: str | os.PathLike[str]) -> None:
    """Raise unless a file's ending is that of a format that charts are drawn in."""
    if Path(path).suffix.removeprefix(".") not in CHARTS:
        raise ConfigError(f"{arg(name)} is {os.fspath(path)}; its name must end in .{', .'.join(CHARTS)}")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise unless a value is one of the known ones."""
    if value not in known:
        raise ConfigError(f"{arg(name)} is {value!r}; known: {', '.join(known)}")


def check_flag(name: str, value: object) -> None:
    """Raise unless a value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{arg(name)} is {value!r}; it must be True or False")


def check_int(name: str, value: object, *, least: int, most: int = LARGEST_INT) -> None:
    """Raise unless a value is an int of at least `least`, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{arg(name)} is {value!r}; it must be an int of at least {least}")
    if value > most:
        raise ConfigError(f"{arg(name)} is {value!r}; it must be an int of at most {most}")


def check_seed(value: object) -> None:
    """Raise unless a seed is an int or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{arg('seed')} is {value!r}; it must be an int or None")


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
    if (
        not isinstance(value, (int, float))
        or not is_number(value)
        or not math.isfinite(value)
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
        or (most is not None and value > most)
    ):
        raise ConfigError(f"{arg(name)} is {value!r}; it must be a finite number {' and '.join(bounds)}")


def is_number(value: object) -> bool:
    """Whether a value is a float, or an int that float() takes."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # beyond, float() is an error of its own
    return isinstance(value, float)


def check_regex(field: str, pattern: str) -> None:
    """Raise unless a pattern is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{arg(field)}: {pattern!r} is not a regular expression: {error}") from None


def check_names(field: str, names: object) -> str | tuple[str, ...] | None:
    """Return what `target_modules` or `exclude_modules` is, names as a tuple; a ConfigError where it makes no sense."""
    if names is None:
        return None
    if isinstance(names, str):
        if not names:
            raise ConfigError(f"{arg(field)} is an empty string; pass None for the default, or names")
        check_regex(field, names)
        return names
    if isinstance(names, (Sequence, set, frozenset)) and all(isinstance(n, str) and n for n in names):
        if not names:
            raise ConfigError(f"{arg(field)} is empty; pass None for the default, or names")
        return tuple(sorted(names)) if isinstance(names, (set, frozenset)) else tuple(names)
    raise ConfigError(f"{arg(field)} is {names!r}; it must be None, a string, or a list of names")


def parse_names(values: Sequence[str]) -> str | tuple[str, ...]:
    """Return what `--target-modules` means: `all-linear`, one regular expression, or names."""
    if len(values) == 1 and (values[0] == "all-linear" or not values[0].replace("_", "").replace(".", "").isalnum()):
        return values[0]
    return tuple(values)


def is_suffix(path: str, name: str) -> bool:
    """Whether `name` is the path of a module, or of its parameter `weight`, or the last components of it."""
    return f".{path}".endswith("." + name) or f".{path}".endswith(f".{name}.weight")


def name_matches(path: str, name: str) -> bool:
    """Whether `name` means the module at `path`: as `is_suffix`, or a regular expression for the whole path."""
    return is_suffix(path, name) or any(re.fullmatch(name, p) for p in (path, path.removesuffix(".weight")))


# ---- Numbers that JSON does not have: null in their place, and in "non_finite" {JSON pointer (RFC 6901): name}.

NON_FINITE = "non_finite"
_NAMES = ("NaN", "Infinity", "-Infinity")


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON-ready values with null for NaN and infinity; "non_finite" says where which of them was.

    Example:
        >>> finite({"loss": {"dense": 2.5, "pruned": float("inf")}})
        {'loss': {'dense': 2.5, 'pruned': None}, 'non_finite': {'/loss/pruned': 'Infinity'}}
    """
    found: dict[str, str] = {}

    def stored(value: Any, pointer: str) -> Any:
        if isinstance(value, Mapping):
            parts = {str(key): one for key, one in value.items()}
            return {key: stored(one, f"{pointer}/{_escaped(key)}") for key, one in parts.items()}
        if isinstance(value, (list, tuple)):
            return [stored(one, f"{pointer}/{i}") for i, one in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            found[pointer] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
            return None
        return value

    made: dict[str, Any] = stored(values, "")
    return {**made, NON_FINITE: found} if found else made


def with_non_finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return what `finite` was given.

    Raises:
        ValueError: "non_finite" names a place that there is not, or where a number is.
    """
    found = values.get(NON_FINITE)
    if not isinstance(found, dict) or not all(name in _NAMES for name in found.values()):
        return values
    for pointer, name in found.items():
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]] or [""]
        place: Any = values
        try:
            for part in path:
                place = place[int(part) if isinstance(place, list) else part]
            key: Any = int(last) if isinstance(place, list) else last
            empty = place[key] is None
        except (KeyError, IndexError, TypeError, ValueError):
            empty = False
        if not empty:
            raise ValueError(f"{NON_FINITE} names {pointer!r}, where no null is")
        place[key] = float(name)
    return {name: value for name, value in values.items() if name != NON_FINITE}


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
