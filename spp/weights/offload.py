"""Weights that accelerate has offloaded: where they are, how they are read and written, and adapters beside them.

accelerate puts a hook around a module's forward (`module._hf_hook`). One that offloads keeps the module's parameters
on the meta device, loads them before each call from a map, which is in memory or reads files, and frees them after it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, partialmethod
from typing import Any

import torch
from torch import Tensor, nn

from spp.distributed.sharded import is_sharded
from spp.errors import ConfigError
from spp.weights.base import DenseWeight, Weight


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


def values(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a parameter or buffer of a module with its values.

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


# ---- A weight that is in memory for the length of a call only: backward loads it again.


class OffloadedWeight(DenseWeight):
    """W as accelerate loads it: for a call, or when it is first asked for; backward saves nothing of it.

    Args:
        stored: W as it is stored: its values during a call, else the meta tensor.
        input_axis: of `stored`.
        load: returns the values.
        device: of the calls.
        memory: the tensor in memory that is loaded from; None where that is a file.
    """

    def __init__(
        self,
        stored: Tensor,
        input_axis: int,
        load: Callable[[], Tensor],
        device: torch.device | None = None,
        memory: Tensor | None = None,
    ) -> None:
        super().__init__(stored, input_axis)
        self.device = device if device is not None and stored.is_meta else stored.device
        self._load, self._memory = load, memory

    def dense(self) -> Tensor:
        if self.stored.is_meta:
            self.stored = self._load()
        return self.stored

    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def storage(self) -> tuple[Tensor, ...]:
        return () if self._memory is None else (self._memory,)

    def maker(self) -> Callable[..., Weight]:
        return partial(_loaded, self._load, self.input_axis)

    def experts(self) -> Sequence[Weight]:
        """Return a view of each expert; backward loads all of them once, and frees them with the last one's."""
        if len(self.shape) == 2:
            return [self]
        stack = _Stack(self._load)
        return [_Expert(stored, self.input_axis, stack, e) for e, stored in enumerate(self.entries().unbind(0))]

    @property
    def is_meta(self) -> bool:
        return self.entries().is_meta


def _loaded(load: Callable[[], Tensor], input_axis: int) -> OffloadedWeight:
    return OffloadedWeight(load(), input_axis, load)


class _Stack:
    """The fused weight that backward loads for all experts that had tokens."""

    def __init__(self, load: Callable[[], Tensor]) -> None:
        self.expected = 0
        self._load = load
        self._held: Tensor | None = None

    def take(self, expert: int) -> Tensor:
        """Return an expert's weight as it is stored."""
        held = self._load() if self._held is None else self._held
        self.expected -= 1
        self._held = held if self.expected > 0 else None
        return held[expert]


class _Expert(OffloadedWeight):
    """One expert of a fused weight, which expects to be loaded once for each backward."""

    def __init__(self, stored: Tensor, input_axis: int, stack: _Stack, expert: int) -> None:
        super().__init__(stored, input_axis, partial(stack.take, expert))
        self._stack = stack

    def maker(self) -> Callable[..., Weight]:
        """Return what loads W, and expect that it will be asked to."""
        self._stack.expected += 1
        return super().maker()


def parameter_weight(module: nn.Module, name: str = "weight", input_axis: int = -1) -> DenseWeight:
    """Return what a module holds as a Parameter, which accelerate may have offloaded."""
    parameter = module._parameters.get(name)
    stored: Tensor = getattr(module, name) if parameter is None else parameter
    hook = None if parameter is None else offloader(module)
    if hook is None:
        return DenseWeight(stored, input_axis)
    load = partial(_fetch_or_meta, hook, name, tuple(stored.shape), stored.dtype)
    device, memory = execution_device(hook) or torch.device("cpu"), in_memory(module, name)
    return OffloadedWeight(stored, input_axis, load, device, memory)


def _fetch_or_meta(hook: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return fetch(hook, name, dtype)
    except KeyError:  # a module on the meta device for good
        return torch.empty(shape, dtype=dtype, device="meta")


# ---- Adapters under accelerate's hooks: they stay on the device of the calls, while the frozen weight goes.
#
# A hook moves every parameter of its module: to the meta device when it is put on, to the device and back around each
# call. An optimizer needs α and β to be the same parameters all the time. So a module with an adapter takes note of
# them when a hook is coming, puts them back once it is there, and has it work without seeing them.


class HookedAdapter(nn.Module):
    """A module whose adapter no hook of accelerate takes away, whether the hook or the adapter came first."""

    def resident_names(self) -> tuple[str, ...]:
        """Return the names of the parameters that stay."""
        raise NotImplementedError

    def hook_changed(self) -> None:
        """Take note that the module has another hook now, or none, or that its weight is sharded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":  # accelerate sets it, moves the parameters, and then sets _hf_hook
            self.__dict__["_before_hook"] = {n: self._parameters[n] for n in self.resident_names()}
        elif name == "_hf_hook":
            self._put_back(value)
            value = _blind(value, self.resident_names())
        super().__setattr__(name, value)
        if name == "_hf_hook" or (name == "weight" and is_sharded(value)):
            self.hook_changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "_hf_hook":
            self.hook_changed()

    def _put_back(self, hook: Any) -> None:
        """Restore the parameters that were here before the hook came, on the device of its calls."""
        before, device = self.__dict__.pop("_before_hook", None), execution_device(hook)
        for name in self.resident_names():
            parameter = self._parameters[name]
            if before is not None and (kept := before.get(name)) is not None and kept is not parameter:
                if device is not None and not kept.is_meta:
                    kept.data = kept.data.to(device)
                    if kept.grad is not None:
                        kept.grad.data = kept.grad.to(device)
                self._parameters[name] = kept
            elif before is None and parameter is not None and parameter.is_meta:  # a hook in the place of another one
                for one in single_hooks(hook):
                    if getattr(one, "offload", False) and name in (one.weights_map or ()):
                        value = fetch(one, name, parameter.dtype).clone()
                        self._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)


class _Blind:
    """A mixin before the class of an offloading hook: the hook ignores some parameters."""

    _kept: tuple[str, ...]

    def _without(self, call: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _aside(module, self._kept):
            return getattr(super(), call)(module, *args, **kwargs)

    init_hook = partialmethod(_without, "init_hook")
    pre_forward = partialmethod(_without, "pre_forward")
    post_forward = partialmethod(_without, "post_forward")
    detach_hook = partialmethod(_without, "detach_hook")


@contextlib.contextmanager
def _aside(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: module._parameters.pop(name) for name in names if name in module._parameters}
    try:
        yield
    finally:
        module._parameters.update(kept)


@cache
def _blind_class(kind: Any) -> Any:
    return type(f"Blind{kind.__name__}", (_Blind, kind), {})


def _blind(hook: Any, names: tuple[str, ...]) -> Any:
    """Return a copy of the hook that ignores these parameters; `isinstance` still sees the original class."""
    if hasattr(hook, "hooks"):
        blind = copy.copy(hook)
        blind.hooks = tuple(_blind(one, names) for one in hook.hooks)
        return blind
    if not names or isinstance(hook, _Blind) or not getattr(hook, "offload", False):
        return hook
    blind = copy.copy(hook)
    blind.__class__ = _blind_class(type(hook))  # type: ignore[arg-type]  # a class is hashable
    blind._kept = names
    blind.original_devices = {n: d for n, d in getattr(hook, "original_devices", {}).items() if n not in names}
    return blind


def _seeing(hook: Any) -> Any:
    """Return the hook that `_blind` copied."""
    if hasattr(hook, "hooks"):
        seeing = copy.copy(hook)
        seeing.hooks = tuple(_seeing(one) for one in hook.hooks)
        return seeing
    if not isinstance(hook, _Blind):
        return hook
    seeing = copy.copy(hook)
    seeing.__class__ = type(hook).__mro__[2]
    del seeing._kept
    return seeing


def move_hook(source: nn.Module, target: nn.Module) -> None:
    """Give the hook of a module, if it has one, to the module that has its weight from now on.

    A weight that the hook does not know, such as one that was packed when the hook came, stays in memory with all of
    its module, without the hook.
    """
    hook, own = source.__dict__.get("_hf_hook"), offloader(source)
    if hook is None:
        return
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    idle: Any = ModelHook()
    source._hf_hook = idle  # the real one would load the weight as it goes
    remove_hook_from_module(source)
    held = dict(target.named_parameters(recurse=False))
    resident = target.resident_names() if isinstance(target, HookedAdapter) else ()
    if own is not None and "weight" in held and not held["weight"].is_meta:
        for name, parameter in held.items():
            if parameter.is_meta and name not in resident:
                loaded = nn.Parameter(fetch(own, name, parameter.dtype), requires_grad=parameter.requires_grad)
                target.register_parameter(name, loaded)
        return
    add_hook_to_module(target, idle)  # which moves nothing: all is where the hook had put it
    target._hf_hook = hook if resident else _seeing(hook)


@contextlib.contextmanager
def let_go_on_error(module: nn.Module) -> Iterator[None]:
    """Context manager: free what the hook loaded where a call ends early, as activation checkpointing ends it."""
    try:
        yield
    except BaseException:
        if offloader(module) is not None and hasattr(offloader(module), "tied_pointers_to_remove"):
            hook: Any = module.__dict__["_hf_hook"]
            hook.post_forward(module, None)
        raise
