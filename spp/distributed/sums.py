"""Sums over the ranks of a process group, errors that end all, values of one; alone, each leaves things as they are.

Every rank calls each of these in the same order. What can fail on one rank runs inside `together`, and sums follow it
at once: so no rank waits for one that has failed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from spp.distributed.ranks import group, rank, world
from spp.errors import RankError, SPPError

Failure = TypeVar("Failure", bound=BaseException)

_SHARED = "_shared"  # the attribute of an error that all ranks raise
_FAILED = "spp/failed"  # the key of the group's store under which a rank that fails says why
_CLOSED = ("onnection closed", "onnection reset", "Broken pipe", "NCCL", "imed out", "imeout")
_LIMIT = datetime.timedelta(minutes=30)  # that a rank waits for the others, at the start and in each sum


def members() -> int:
    """Return how many ranks compute together: those of the process group, 1 without one."""
    return world() if group() else 1


def place() -> int:
    """Return this rank's number among them, from 0."""
    return rank() if group() else 0


def gathered(value: Any) -> list[Any]:
    """Return the value of each rank, in their order.

    Args:
        value: of this rank, which can be pickled.
    """
    if members() == 1:
        return [value]
    values = [None] * members()
    dist.all_gather_object(values, value)
    return values


def of_first(value: Any) -> Any:
    """Return the value of rank 0.

    Args:
        value: of this rank; only that of rank 0 counts.
    """
    if members() == 1:
        return value
    values = [value if place() == 0 else None]
    dist.broadcast_object_list(values, 0)
    return values[0]


@contextlib.contextmanager
def together(*, named: bool = False) -> Iterator[None]:
    """Run what can fail on one rank: an error of one is raised by all, that of the lowest rank: a context manager.

    Args:
        named: a rank that fails raises its own error, and the others one that names the rank, an SPPError of the same
            class or a RuntimeError.
    """
    if members() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        if is_shared(found):
            raise
        error = found
    failed = [(number, found) for number, found in enumerate(gathered(_told(error))) if found is not None]
    if not failed:
        return
    if named and error is not None:
        error.__dict__[_SHARED] = True
        raise error
    number, first = failed[0]
    if named:
        kind = type(first) if isinstance(first, SPPError) else RuntimeError
        first = kind(f"rank {number}: {first}")
    first.__dict__[_SHARED] = True
    raise first from error


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """Run steps that sum over the ranks: where one fails, the others end with what it says: a context manager.

    Unlike in `together`, the others may be in the midst of a sum. The rank that fails leaves its message in the group's
    store and then the group, which ends their sum with an error.

    Raises:
        RankError: another rank failed, or was lost.
    """
    if members() == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        yield
    except Exception as error:
        found = _failure(store, error)
        found.__dict__[_SHARED] = True
        if found is error:
            raise
        raise found from error


def _failure(store: Any, error: Exception) -> Exception:
    """Return what ends this rank: its own error, which it tells the others, or that of the rank that failed first."""
    try:
        if isinstance(error, SPPError) or not isinstance(error, RuntimeError):
            store.set(_FAILED, f"rank {place()}: {error}")
            return error
        if store.check([_FAILED]):
            return RankError(store.get(_FAILED).decode())
    except Exception:  # the store went with the rank that held it
        return RankError("rank 0 has ended; what it printed says why")
    return _lost(store, error)


def _lost(store: Any, error: Exception) -> Exception:
    """Return what to say of a RuntimeError: that a rank was lost, if a connection was closed, else the error."""
    if not any(word in str(error) for word in _CLOSED):
        store.set(_FAILED, f"rank {place()}: {error}")
        return error
    return RankError(f"another rank was lost without a word: {str(error).splitlines()[0]}")


def largest(value: int) -> int:
    """Return the largest of a number over the ranks."""
    if members() == 1:
        return value
    found = torch.tensor([value], dtype=torch.int64, device=device_of_group())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def is_shared(error: BaseException) -> bool:
    """Tell whether all ranks raise an error, so that one of them may speak for all."""
    return bool(error.__dict__.get(_SHARED))


def shared_as(error: Failure, other: BaseException) -> Failure:
    """Return an error, noted as one that all ranks raise if all raise another one, which it tells more of."""
    error.__dict__[_SHARED] = is_shared(other)
    return error


def _told(error: Exception | None) -> Exception | None:
    """Return an error as it can be sent: one of Python's or of spp's own."""
    if error is None or type(error).__module__.partition(".")[0] in ("builtins", "spp"):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def add_(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place; every rank gets the same bits."""
    if members() > 1:
        wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.contiguous()
        dist.all_reduce(wide)
        if wide is not tensor:
            tensor.copy_(wide)
    return tensor


def total(value: float) -> float:
    """Return the sum of a number over the ranks."""
    if members() == 1:
        return value
    dtype, device = torch.float64, device_of_group()
    return float(add_(torch.tensor(value, dtype=dtype, device=device)))


def send_(tensor: Tensor, source: int) -> None:
    """Give every rank the values that a tensor has on rank `source`, bit for bit."""
    if members() > 1:
        values = tensor.detach()
        whole = values.contiguous()
        dist.broadcast(whole.reshape(-1).view(torch.uint8), source)
        if whole.data_ptr() != values.data_ptr():
            values.copy_(whole)


def device_of_group() -> torch.device:
    """Return where a tensor lies that has no place of its own: on the CPU, unless the group knows only GPUs."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Make the process group of a launcher's ranks, unless there is one, and end it afterwards: a context manager.

    A rank takes the GPU of its local number.
    """
    if world() == 1 or group():
        yield
        return
    own = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if own:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if own else "gloo", timeout=_LIMIT)
    try:
        yield
    finally:
        dist.destroy_process_group()
