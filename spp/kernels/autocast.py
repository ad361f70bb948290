"""What autocast means for one call of the layer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str, *dtypes: torch.dtype) -> torch.dtype | None:
    """Return the dtype that autocast converts operands to; None where it is off, and for float64, as in torch."""
    if torch.float64 in dtypes or not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which operations run in the dtypes of their operands."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
