"""Adapters under accelerate's hooks: they stay on the device of the calls, while the frozen weight beside them goes.

A hook moves every parameter of its module: to the meta device when it is put on, to the device and back around each
call. An optimizer needs α and β to be the same parameters all the time. So a module with an adapter takes note of them
when a hook is coming, puts them back once it is there, and has it work without seeing them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from spp.weights.offload import execution_device, fetch, offloader, single_hooks


class HookedAdapter(nn.Module):
    """A module whose adapter no hook of accelerate takes away, whether the hook or the adapter came first."""

    def resident_names(self) -> tuple[str, ...]:
        """Return the names of the parameters that stay."""
        raise NotImplementedError

    def hook_changed(self) -> None:
        """Take note that the module has another hook now, or none."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":  # accelerate sets it, moves the parameters, and then sets _hf_hook
            self.__dict__["_before_hook"] = {n: self._parameters[n] for n in self.resident_names()}
        elif name == "_hf_hook":
            self._put_back(value)
            value = _blind(value, self.resident_names())
        super().__setattr__(name, value)
        if name == "_hf_hook":
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

    def init_hook(self, module: nn.Module) -> Any:
        with _aside(module, self._kept):
            return super().init_hook(module)  # type: ignore[misc]

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _aside(module, self._kept):
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with _aside(module, self._kept):
            return super().post_forward(module, output)  # type: ignore[misc]

    def detach_hook(self, module: nn.Module) -> Any:
        with _aside(module, self._kept):
            return super().detach_hook(module)  # type: ignore[misc]


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
