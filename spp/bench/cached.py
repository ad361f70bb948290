"""How much of some files lies in the system's cache: whether a measurement that reads them found it warm."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def cached_share(paths: Iterable[Path]) -> float | None:
    """Return the fraction of the files' pages that are in memory; None where the system does not tell."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    here = pages = 0
    for path in paths:
        with path.open("rb") as file:
            if not path.stat().st_size:
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                data = np.frombuffer(mapped, np.uint8)
                found = np.empty(-(-data.size // mmap.PAGESIZE), np.uint8)
                address, length = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.size)
                failed = mincore(address, length, ctypes.c_void_p(found.ctypes.data))
                del data
            if failed:
                return None
            here, pages = here + int((found & 1).sum()), pages + found.size
    return here / pages if pages else None
