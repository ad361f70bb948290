"""Weights that accelerate has offloaded: where they are, how they are read and written.

accelerate puts a hook around a module's forward (`module._hf_hook`). One that offloads keeps the module's parameters
on the meta device, loads them before each call from a map, which is in memory or reads files, and frees them after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import ConfigError
from spp.weights.base import DenseWeight, WeightSource


def offloader(module: nn.Module) -> Any | None:
    """Return the hook that offloads a module's own parameters, None where none does."""
    for hook in single_hooks(module.__dict__.get("_hf_hook")):
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            return hook
    return None


def single_hooks(hook: Any) -> Iterator[Any]:
    """Yield a hook, or in order those that it runs one after the other; nothing for None."""
    if hasattr(hook, "hooks"):
        for one in hook.hooks:
            yield from single_hooks(one)
    elif hook is not None:
        yield hook


def execution_device(hook: Any) -> torch.device | None:
    """Return the device that a hook has the calls of its module on; None where it does not say."""
    devices = [getattr(one, "execution_device", None) for one in single_hooks(hook)]
    return next((torch.device(device) for device in devices if device is not None), None)


def is_offloaded(module: nn.Module, name: str = "weight") -> bool:
    """Whether a parameter of a module is loaded for its calls only."""
    held = module._parameters.get(name)
    return held is not None and held.is_meta and offloader(module) is not None


def home(module: nn.Module, weight: Tensor) -> torch.device:
    """Return the device that an adapter of a module belongs on: its weight's, or of an offloaded one that of the calls.

    Args:
        weight: what holds the module's numbers, on the meta device where it is offloaded.
    """
    away = weight.is_meta and offloader(module) is not None
    return (execution_device(module.__dict__["_hf_hook"]) or torch.device("cpu")) if away else weight.device


def values(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a parameter or buffer of a module with its numbers.

    Args:
        name: in the module itself.

    Returns:
        What the module holds; where that is offloaded, its values on the device of the module's calls, to be read only;
        of a module on the meta device for good, the meta tensor.
    """
    parameter = module._parameters.get(name)
    held = module._buffers[name] if parameter is None else parameter
    assert held is not None
    hook = offloader(module) if held.is_meta else None
    if hook is None:
        return held
    try:
        return fetch(hook, name, held.dtype)
    except KeyError:
        return held


def fetch(hook: Any, name: str, dtype: torch.dtype) -> Tensor:
    """Return what a hook would load under a name.

    Raises:
        KeyError: it would load nothing.
    """
    value: Tensor = hook.weights_map[name]
    return value.detach().to(device=execution_device(hook) or "cpu", dtype=dtype)


def in_memory(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return the tensor in memory that an offloaded parameter is loaded from; None where that is a file, or nothing."""
    hook = offloader(module)
    where: Any = None if hook is None else hook.weights_map
    while hasattr(where, "dataset"):  # a view of the entries below a prefix
        name, where = where.prefix + name, where.dataset
    where = getattr(where, "state_dict", where)  # those in memory go before those on disk
    return where.get(name) if isinstance(where, dict) else None


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Store new values of an offloaded parameter, where `in_memory` has found one."""
    stored = in_memory(module, name)
    assert stored is not None
    with torch.no_grad():
        stored.copy_(value)


def check_offloading(model: nn.Module) -> None:
    """Raise a ConfigError where one hook offloads a module with all that is in it, adapters too.

    accelerate does so for `preload_module_classes`: it loads copies of every parameter below before each call, and an
    optimizer would never see those.
    """
    for path, module in model.named_modules():
        for hook in single_hooks(module.__dict__.get("_hf_hook")):
            if getattr(hook, "offload", False) and getattr(hook, "place_submodules", False):
                raise ConfigError(
                    f"{path or 'the model'} is offloaded by accelerate as a whole (preload_module_classes), and "
                    f"adapters in it would be too; dispatch the model without preload_module_classes"
                )


# ---- A weight that is in memory for the length of a call only: backward has it loaded again.


class OffloadedWeight(DenseWeight):
    """W as it is loaded for this call; nothing of it is kept for backward.

    Args:
        weight: (m, n).
        load: returns the same again, in backward.
    """

    def __init__(self, weight: Tensor, load: Callable[[], Tensor]) -> None:
        super().__init__(weight)
        self.load = load

    def tensors(self) -> tuple[Tensor, ...]:
        """Return nothing."""
        return ()

    def maker(self) -> Callable[..., OffloadedWeight]:
        """Return what loads W."""
        return partial(_make, self.load)


def _make(load: Callable[[], Tensor]) -> OffloadedWeight:
    return OffloadedWeight(load(), load)


def offloaded_weight(module: nn.Module, input_axis: int) -> OffloadedWeight | None:
    """Return W (m, n) of a linear that accelerate offloads, None for any other.

    Args:
        module: whose `weight` it is, loaded for a call or not.
        input_axis: −1 for a weight that is stored (m, n), −2 for (n, m).
    """
    hook = offloader(module)
    if hook is None:
        return None
    weight, transposed = values(module), input_axis == -2
    return OffloadedWeight(weight.T if transposed else weight, partial(_load, hook, weight.dtype, transposed))


def _load(hook: object, dtype: torch.dtype, transposed: bool) -> Tensor:
    weight = fetch(hook, "weight", dtype)
    return weight.T if transposed else weight


class OffloadedExperts:
    """The matrices of a fused weight that is in memory for the length of a call only.

    Backward loads the weight once for all experts that had tokens, and frees it after the last of them.

    Args:
        load: returns the matrices (m, n) of all experts, in backward.
    """

    def __init__(self, load: Callable[[], Sequence[Tensor]]) -> None:
        self.expected = 0
        self._load = load
        self._held: Sequence[Tensor] | None = None

    def sources(self, matrices: Sequence[Tensor]) -> list[WeightSource]:
        """Return the matrices, as they are loaded for this call, as sources."""
        return [_Expert(matrix, partial(self._take, e), self) for e, matrix in enumerate(matrices)]

    def _take(self, expert: int) -> Tensor:
        held = self._load() if self._held is None else self._held
        self.expected -= 1
        self._held = held if self.expected > 0 else None
        return held[expert]


class _Expert(OffloadedWeight):
    def __init__(self, weight: Tensor, load: Callable[[], Tensor], experts: OffloadedExperts) -> None:
        super().__init__(weight, load)
        self.experts = experts

    def maker(self) -> Callable[..., OffloadedWeight]:
        """Return what loads W, and expect that it will be asked to."""
        self.experts.expected += 1
        return super().maker()
