"""Weights of which each rank holds a shard: FSDP2's (DTensor), and DeepSpeed's ZeRO-3 (empty, beside a flat shard).

    full      the whole tensor: a collective, so every rank must ask for it
    local     what this rank holds
    like      this rank's shard of a whole tensor, without communication
    assign    a parameter takes whole values; with ZeRO-3 a collective

α and β are ordinary parameters of their block and are sharded with it; a layer computes with whole tensors, since the
engine gathers a block before its forward and its backward. What asks for weights outside of these meets shards.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spp.distributed.ranks import rank, world
from spp.errors import WrapError

MEETING = 60.0  # seconds that a rank waits for the others to call what all have to
_meetings = itertools.count()


def is_sharded(t: object) -> bool:
    """Whether a tensor is a shard of one; costs next to nothing for a Tensor or Parameter."""
    if hasattr(t, "ds_id"):
        return True
    return type(t) is not Tensor and type(t) is not nn.Parameter and hasattr(t, "full_tensor")


def full(t: Tensor) -> Tensor:
    """Return the whole tensor; of a sharded one a gathered copy, which every rank must ask for."""
    if hasattr(t, "ds_id"):
        with _zero().GatheredParameters([t]):
            return t.detach().clone()
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


def local(t: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; it shares the memory."""
    if hasattr(t, "ds_tensor"):
        return t.ds_tensor
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def whole_shape(t: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor."""
    return tuple(getattr(t, "ds_shape", t.shape))


def like(value: Tensor, target: Tensor) -> Tensor:
    """Return a whole tensor in the form of `target`: this rank's shard of it where that is sharded.

    Args:
        value: of the shape of `target`, the same on every rank.
    """
    if not is_sharded(target) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    shard = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
    return shard.to(local(target).device)  # offloaded shards are on the CPU


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter the values of a whole tensor, the same on every rank; every rank must call it."""
    value = value.to(parameter.dtype)
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(like(value, parameter))
        return
    with _zero().GatheredParameters([parameter], modifier_rank=0):
        if rank() == 0:
            parameter.copy_(value)


def _zero() -> Any:
    return importlib.import_module("deepspeed").zero


def holds_shards(model: nn.Module) -> bool:
    """Whether any parameter of a model is sharded, or is between two uses."""
    return any(is_sharded(p) for p in model.parameters()) or any(_units(model))


def settle(model: nn.Module) -> None:
    """Free what a call in evaluation has gathered, so that every parameter is a shard again."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that fully_shard was given."""
    return (module for module in model.modules() if hasattr(module, "set_reshard_after_forward"))


@contextlib.contextmanager
def gathered(modules: Iterable[nn.Module], names: Any) -> Iterator[None]:
    """Have whole parameters in the place of sharded ones, to be read: a context manager that every rank must enter.

    Args:
        modules: whose own parameters are meant.
        names: a function from a module to the names of its parameters.
    """
    held: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules:
            for name in names(module):
                parameter: Any = module._parameters[name]
                if is_sharded(parameter):
                    held.append((module, name, parameter))
                    whole = full(parameter).detach()
                    module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


def refuse_shards(model: nn.Module, what: str, instead: str) -> None:
    """Raise a WrapError for a model whose weights are sharded.

    Args:
        what: was asked for. instead: what to do.
    """
    if holds_shards(model):
        raise WrapError(f"{what} needs whole weights, and this model's are sharded over {world()} ranks: {instead}")


def meet(what: str, limit: float | None = None) -> None:
    """Wait until every rank has called this, so that one that is alone gets an error and does not hang.

    Raises:
        WrapError: not all came within `limit` seconds; None is MEETING.
    """
    limit = MEETING if limit is None else limit
    from torch.distributed import distributed_c10d

    store, key = distributed_c10d._get_default_store(), f"spp/meeting/{next(_meetings)}/{what}"
    end, here = time.monotonic() + limit, store.add(key, 1)
    while here < world():
        if time.monotonic() > end:
            raise WrapError(
                f"{what} of a model that is sharded gathers from every rank, and only {here} of {world()} ranks called "
                f"it within {limit:g} s: call it on all of them, and rank 0 writes"
            )
        time.sleep(0.005)
        here = store.add(key, 0)


# ---- Optimizers, in the format of one process.


@torch.no_grad()
def full_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return optimizer.state_dict() as one process has it, on the CPU; every rank must ask for it."""
    found: dict[str, Any] = optimizer.state_dict()
    found["state"] = {
        key: {name: full(v).cpu() if isinstance(v, Tensor) else v for name, v in state.items()}
        for key, state in found["state"].items()
    }
    return found


@torch.no_grad()
def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Load what one process or `full_optimizer_state` has, onto however many ranks there are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        key: {n: like(v, parameters[key]) if isinstance(v, Tensor) and v.dim() else v for n, v in values.items()}
        for key, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
