"""JSON files: written with sorted keys, read with every way of being malformed turned into CheckpointError."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from spp.configs.checks import with_non_finite
from spp.errors import CheckpointError, output_error

LARGEST_JSON = 200_000_000  # bytes; the index of the largest public models is below 10 MB
DEEPEST_JSON = 64  # objects and arrays inside each other; configs have a handful


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write obj with sorted keys, two spaces of indentation and a newline at the end."""
    text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise output_error(error, path) from error


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Return the object in a JSON file, with the numbers in it that spp.configs.checks.finite has taken out.

    Args:
        path: the file.
        what: its name for messages, such as "the adapter's config".

    Raises:
        CheckpointError: it is missing, no regular file, no JSON, names a key twice, or is not an object.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{what} is not a regular file: {path}")
        if status.st_size > LARGEST_JSON:
            raise CheckpointError(f"{what} has {status.st_size} bytes, which is too large to be true: {path}")
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{what} is missing: {path}") from None
    except OSError as error:
        raise CheckpointError(f"{what} cannot be read: {path}: {error.strerror}") from error
    found = parse_object(data, f"{what} ({path})")
    try:
        return with_non_finite(found)
    except ValueError as error:
        raise CheckpointError(f"{what} ({path}) is malformed: {error}") from None


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in data; anything else is a CheckpointError that starts with `what`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}; an object was expected")
    _check_contents(value, what)
    return value


def _check_contents(value: Any, what: str) -> None:
    """Refuse deep nesting and text that is no Unicode, which readers of the value would fail on."""
    layer: list[Any] = [value]
    for _ in range(DEEPEST_JSON):
        inner = [x for one in layer for x in ((*one, *one.values()) if isinstance(one, dict) else one)]
        for text in inner:
            if isinstance(text, str) and not text.isascii():
                _check_text(text, what)
        layer = [item for item in inner if isinstance(item, (dict, list))]
    if layer:
        raise CheckpointError(f"{what} nests objects or arrays more than {DEEPEST_JSON} deep")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{what} holds text that is no Unicode: {text[:60]!r}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise CheckpointError(f"the key {', '.join(map(repr, twice[:5]))} occurs twice")
    return value
