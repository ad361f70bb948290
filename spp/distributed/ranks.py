"""Which process of several this is: torchrun and accelerate launch start one a device and name it by environment."""

from __future__ import annotations

import os
import sys
from typing import Any


def world() -> int:
    """Return the number of processes: of the process group if there is one, else of the launcher's environment."""
    found = group()
    return found.get_world_size() if found else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0: the one that writes, prints and locks is rank 0."""
    found = group()
    return found.get_rank() if found else int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Tell whether this process is the one that writes, prints and locks."""
    return rank() == 0


def group() -> Any:
    """Return torch.distributed if a process group is up, else None; torch is not loaded for the question."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed
