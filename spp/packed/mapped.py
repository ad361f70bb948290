"""Pages of a mapped file, given back when the tensor in them is gone.

safetensors maps a whole file, and its tensors are slices of the mapping: one that nothing refers to any more keeps its
pages until the last tensor of the file goes, and a page that was written to (by pruning in place, say) stays in memory
as this process's own copy. A model whose weights are packed one after the other would hold both forms to the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")


def give_back_pages(storage: torch.UntypedStorage) -> bool:
    """Give the whole pages of a storage back, if it lies in a private mapping of a file and no tensor uses it.

    Its contents are lost: what the pages held is read from the file, should anybody look. Where the system or torch
    cannot tell that nobody will (no Linux, another view of the numbers, memory without a file), nothing happens.

    Args:
        storage: of a CPU tensor that has been let go of; the only reference to it is the caller's.

    Returns:
        Whether pages were given back.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or sys.platform != "linux" or storage.device.type != "cpu" or not storage.nbytes():
        return False
    if count(storage._cdata) != 1:
        return False
    page = mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if start >= end or not _in_private_file_mapping(start, end):
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return bool(madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED) == 0)


def _in_private_file_mapping(start: int, end: int) -> bool:
    """Whether [start, end) lies in one private mapping of a file, as /proc tells it."""
    with contextlib.suppress(OSError, ValueError):
        for line in _MAPS.read_text().splitlines():
            addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
            first, last = (int(text, 16) for text in addresses.split("-"))
            if first <= start < last:
                return end <= last and permissions[3] == "p" and inode != "0" and bool(path)
    return False
