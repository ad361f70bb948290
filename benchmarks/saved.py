"""The bytes that autograd keeps from a forward to its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module, beyond: Iterable[Tensor] = ()) -> int:
    """Return how many bytes a forward leaves behind for its backward, each piece of memory counted once.

    Args:
        forward: runs the forward with gradients and returns its result.
        module: its parameters and buffers do not count: they are there anyway.
        beyond: more tensors that do not count.
    """
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # an address is not used twice while its tensor lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(forward())
    for tensor in (*module.parameters(), *module.buffers(), *beyond):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())
