"""Small dense parameters that train beside the adapter: norms, biases, the output head.

    y = module(x; round(p))        p trained, in float32 where the base has 16 bits; round to the base's dtype

p takes the original's place in its modules, the original waits in the state of the wrapped model: `unwrap` and
`disabled` put it back. A 16-bit norm could not train in its own dtype: near 1, steps of bfloat16 are 2⁻⁸ and AdamW's
are the learning rate. So p is float32 there, and a hook rounds it for each call, with the gradient of the identity:
what is trained is what a merge stores.

Memory: p beside the original, and what the optimizer keeps of p. Norms and biases are small; a head of V × d values in
bfloat16 takes 4 bytes a value more, and AdamW's two moments 8.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spp.distributed.sharded import assign, full, is_sharded
from spp.errors import ConfigError, SPPWarning, arg
from spp.models.projection import find_projections, plain_name
from spp.models.targets import input_embedding, other_sides, output_head, text_side
from spp.rules.adapter import arithmetic_dtype
from spp.weights.offload import offloader

_PRUNED_FROM = 0.1  # the fraction of zeros from which a head is pruned, as spp.certifying.verify counts


@dataclass
class AlsoTrained:
    """A parameter that trains as a whole.

    Attributes:
        holders: the modules that have it, each with its name there.
        original: as it was, of the base's dtype.
        trained: in its place.
        dtype: that `trained` was made in.
        hooks: of the holders; none where that is the original's.
    """

    holders: list[tuple[nn.Module, str]]
    original: nn.Parameter
    trained: nn.Parameter
    dtype: torch.dtype
    hooks: list[RemovableHandle]

    def show(self, parameter: nn.Parameter) -> None:
        """Have the modules hold one of the two; the original follows a model that was moved or converted."""
        if parameter is self.original and not self.trained.is_meta:
            now, then = self.trained.dtype, self.original.dtype
            parameter.data = parameter.data.to(self.trained.device, then if now == self.dtype else now)
        for module, name in self.holders:
            module._parameters[name] = parameter

    def shown(self) -> Any:
        """Return which of the two the modules hold."""
        module, name = self.holders[0]
        return module._parameters[name]

    def follow(self) -> None:
        """Take note of the parameter that fully_shard has put in the place of the trained one."""
        if is_sharded(shown := self.shown()):
            self.trained = shown

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Have `trained` whole where it is sharded, to be read: a context manager that every rank must enter."""
        held = self.trained
        try:
            self._hold(nn.Parameter(full(held).detach(), requires_grad=held.requires_grad))
            yield
        finally:
            self._hold(held)

    def _hold(self, parameter: nn.Parameter) -> None:
        self.trained = parameter
        for module, name in self.holders:
            module._parameters[name] = parameter

    def changed(self) -> bool:
        """Whether rounding to the base's dtype leaves other values than the original's; False on the meta device."""
        if self.trained.is_meta:
            return False
        now = self.trained.detach().to(self.original.dtype)
        return not torch.equal(now, self.original.detach().to(now.device))

    @torch.no_grad()
    def fill(self, value: Tensor) -> None:
        """Take trained values; of a parameter on the meta device, which becomes materialised, in a new one."""
        if not self.trained.is_meta:
            assign(self.trained, value)
            return
        self.trained = nn.Parameter(value.to(self.dtype, copy=True), requires_grad=self.trained.requires_grad)
        self.show(self.trained)


class _Rounded:
    """Hooks of a module: in its forward it has the parameter rounded to the base's dtype."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.held: list[nn.Parameter] = []

    def before(self, module: nn.Module, args: object) -> None:
        """Put the rounded values in the parameter's place."""
        parameter: Any = module._parameters[self.name]
        self.held.append(parameter)
        module._parameters[self.name] = parameter.to(self.dtype)

    def after(self, module: nn.Module, args: object, output: object) -> None:
        """Put the parameter back, after an error too."""
        if self.held:
            module._parameters[self.name] = self.held.pop()


def find_also(model: nn.Module, kinds: Collection[str], targets: Collection[str]) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of what trains beside the adapter, in module order; a shared one under its first name.

    Norms and biases are those of the text side. A norm is a module without parts whose parameters are all of one
    dimension and whose class is one by its name; biases are those of linears.

    Args:
        model: as it was before wrapping.
        kinds: of "norms", "biases", "head".
        targets: paths of the adapted layers.

    Raises:
        ConfigError: there is nothing of a kind, the head is tied or adapted, or a parameter cannot train.
    """
    if not kinds:
        return {}
    modules = {plain_name(path): module for path, module in model.named_modules()}
    found: dict[str, list[str]] = {"norms": [], "biases": [], "head": []}
    sides, others = text_side(model), tuple(f"{side}." for side in other_sides(model))
    linears = {id(p.module) for p in find_projections(model) if p.name == "weight"}
    head = output_head(model)
    for path, module in modules.items():
        inside = any(not side or path.startswith(f"{side}.") for side in sides) and not path.startswith(others)
        own = [f"{path}.{name}".removeprefix(".") for name, p in module._parameters.items() if p is not None]
        if module is head:
            found["head"] += own
        if (inside or module is head) and id(module) in linears:
            found["biases"] += [name for name in own if name.rpartition(".")[2] == "bias"]
        if inside and _is_norm(module):
            found["norms"] += own
    missing = [kind for kind in kinds if not found[kind]]
    if missing:
        there = "; ".join(f"{kind}: {len(names)}, such as {names[0]}" for kind, names in found.items() if names)
        raise ConfigError(
            f"{arg('also_train')} names {', '.join(missing)}, of which {type(model).__name__} has none. It has "
            f"{there or 'none of norms, biases, head'}"
        )
    if "head" in kinds:
        _check_head(model, head, found["head"], targets)
    wanted = {name for kind in kinds for name in found[kind]}
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            key = f"{path}.{name}".removeprefix(".")
            if key in wanted and parameter is not None:
                _check_parameter(key, module, parameter)
                chosen.setdefault(id(parameter), (key, parameter))
    return dict(chosen.values())


@torch.inference_mode(False)  # what is made inside it could never be trained
def put_also(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> dict[str, AlsoTrained]:
    """Put what trains in the place of the originals of a model that the adapter's layers are in already."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, name))
    made = {}
    for key, original in chosen.items():
        dtype = arithmetic_dtype(original.dtype)
        trained = nn.Parameter(original.detach().to(dtype, copy=True))
        one = made[key] = AlsoTrained(holders[id(original)], original, trained, dtype, [])
        one.show(trained)
        for module, name in one.holders if dtype != original.dtype else ():
            hook = _Rounded(name, original.dtype)
            one.hooks.append(module.register_forward_pre_hook(hook.before))
            one.hooks.append(module.register_forward_hook(hook.after, always_call=True))
    return made


def take_also(made: Mapping[str, AlsoTrained]) -> None:
    """Put the originals back."""
    for one in made.values():
        one.show(one.original)
        for hook in one.hooks:
            hook.remove()


def _is_norm(module: nn.Module) -> bool:
    parameters = [p for p in module._parameters.values() if p is not None]
    by_name = any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
    own = module._parameters.get("weight") is not None and all(p.ndim == 1 for p in parameters)
    return by_name and own and not module._modules


def _check_head(model: nn.Module, head: Any, names: Collection[str], targets: Collection[str]) -> None:
    """Raise a ConfigError where the head cannot train by itself; warn where it has zeros that it would lose."""
    what = arg("also_train", "head")
    embedding = input_embedding(model)
    shared = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(id(p) in shared for p in head.parameters(recurse=False)) or getattr(config, "tie_word_embeddings", False):
        raise ConfigError(
            f"{what}: the output head of {type(model).__name__} is tied to its input embedding, which would train "
            f"too. Leave the head out, or untie it first: head = model.get_output_embeddings(); head.weight = "
            f"torch.nn.Parameter(head.weight.detach().clone()); model.config.tie_word_embeddings = False"
        )
    adapted = sorted({name.rpartition(".")[0] for name in names} & set(targets))
    if adapted:
        raise ConfigError(
            f"{what}: the output head {adapted[0]} is among {arg('target_modules', ...)} too, whose zeros stay; leave "
            f"it out of one of them"
        )
    weight = head._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        raise ConfigError(f"{what}: the output head is a {type(head).__name__} without a weight that could train")
    zeros = 0 if weight.is_meta else weight.numel() - int(torch.count_nonzero(weight.detach()))
    if zeros >= _PRUNED_FROM * weight.numel() > 0:
        warnings.warn(
            f"{what}: {zeros / weight.numel():.0%} of the output head's weights are zero, and training it as a whole "
            f"fills them; adapted by {arg('target_modules', ...)}, it keeps them",
            SPPWarning,
            stacklevel=4,
        )


def _check_parameter(key: str, module: nn.Module, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point():
        raise ConfigError(f"{arg('also_train')}: {key} is {parameter.dtype}, which cannot train")
    if offloader(module) is not None:
        raise ConfigError(
            f"{arg('also_train')}: {key} is offloaded by accelerate and cannot train as a whole; keep it on a device, "
            f"or leave its kind out"
        )
