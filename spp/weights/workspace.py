"""Scratch memory that every layer shares: one buffer a use, keyed by thread, device, stream and dtype.

A fresh m × n allocation costs as much as several passes over it, so blocks of W_eff and of G are written into the same
few megabytes again and again. A buffer is only valid until the next request with the same tag on the same thread
and stream; nothing that outlives a call may point into it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_local = threading.local()


def workspace(tag: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised scratch of `shape`, contiguous; the buffer behind it grows as needed and is reused.

    Args:
        tag: names the use; two tags never share memory.
        shape, dtype, device: of the result.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (tag, dtype, device, stream)
    buffers: dict[object, Tensor] = _local.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype, device=device)
        if type(buffer) is Tensor:  # a tracing mode's stand-in must not be kept
            buffers[key] = buffer
    return buffer[:size].view(shape)


def release_workspace() -> None:
    """Give the calling thread's scratch memory back."""
    _local.__dict__.pop("buffers", None)


def workspace_bytes() -> int:
    """Return how many bytes of scratch the calling thread holds."""
    return sum(b.numel() * b.element_size() for b in _local.__dict__.get("buffers", {}).values())
