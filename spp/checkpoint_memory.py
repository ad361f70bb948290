"""Give freed memory back to the system while a model goes through memory block by block.

glibc keeps freed chunks of some megabytes in its heap, and what is allocated in between splits them: in a stream of
blocks the process would grow by about a block a block, up to the size of the model that is never held.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any


def trim_memory() -> None:
    """Return freed heap memory to the system; does nothing where the C library is not glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
