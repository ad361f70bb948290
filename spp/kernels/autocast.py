"""What autocast means for one call of the layer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_NOTHING: AbstractContextManager[object] = nullcontext()


def autocast_dtype(device_type: str, *dtypes: torch.dtype) -> torch.dtype | None:
    """Return the dtype that autocast converts operands to; None where it is off, and for float64, as in torch."""
    if not _enabled(device_type) or torch.float64 in dtypes:
        return None
    return torch.get_autocast_dtype(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which operations run in the dtypes of their operands; free where autocast is off."""
    return torch.autocast(device_type, enabled=False) if _enabled(device_type) else _NOTHING


def _enabled(device_type: str) -> bool:
    return _available(device_type) and torch.is_autocast_enabled(device_type)


@cache
def _available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
