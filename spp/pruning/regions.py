"""The regions of a decoder block that are reconstructed, and what they read and must give on a batch.

A region is a module of the block that holds target projections (the attention, the MLP), with the norm that it alone
reads from and the residual connection around both, or the whole block. Its inputs and the dense region's output are
computed batch by batch, by running the block, and kept nowhere: the two streams of hidden states are all that grows
with the number of windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import TargetError
from spp.layers.host import LinearHost
from spp.models.projection import Projection
from spp.pruning.blocks import BlockRunner, Reached, hidden_name, replaced_forwards


@dataclass(frozen=True)
class Region:
    """A part of a block that is trained by itself.

    Args:
        block: that it is a part of.
        path: of its module in the block; "" is the block.
        norm_path: of the module whose output it alone reads, if that is one of the block without target projections.
        argument: where among its arguments the hidden states are: a place, or a name.
        projections: the targets in it.
        residual: whether the block adds what the norm reads to the module's output; then the sum is the region's
            output, and what the pruned blocks before it have done to the hidden states is made up for, too.
        last: whether its output is the block's.
    """

    block: nn.Module
    path: str
    norm_path: str | None
    argument: int | str
    projections: Sequence[Projection]
    residual: bool = False
    last: bool = False

    @property
    def module(self) -> nn.Module:
        """Its module."""
        return self.block.get_submodule(self.path)

    @property
    def norm(self) -> nn.Module | None:
        """The module whose output it reads."""
        return None if self.norm_path is None else self.block.get_submodule(self.norm_path)

    def modules(self) -> list[nn.Module]:
        """Return every module whose parameters belong to it."""
        return [*self.module.modules(), *(self.norm.modules() if self.norm is not None else ())]

    def named(self) -> Region:
        """Return it without its modules, as it can be sent to another rank: projections are paths."""
        paths: Any = [layer.path for layer in self.projections]
        return replace(self, block=None, projections=paths)  # type: ignore[arg-type]

    def told(self, block: nn.Module, layers: Mapping[str, Projection]) -> Region:
        """Return a named region with the modules of a block."""
        return replace(self, block=block, projections=[layers[path] for path in self.projections])  # type: ignore[index]

    def numel(self) -> int:
        """Return how many values its modules hold."""
        return sum(value.numel() for module in self.modules() for value in module.parameters(recurse=False))

    def trained(self) -> Iterator[tuple[nn.Module, str, bool]]:
        """Yield the module and the name of each parameter that is trained, and whether its zeros stay."""
        weights = {(id(p.module), p.name) for p in self.projections}
        seen: set[int] = set()
        for module in self.modules():
            for name, value in module._parameters.items():
                masked = (id(module), name) in weights
                if value is None or id(value) in seen or not value.is_floating_point():
                    continue
                if masked or value.dim() <= 1 or name.endswith("bias"):
                    seen.add(id(value))
                    yield module, name, masked

    def output(self, call: Call, dtype: torch.dtype) -> Tensor:
        """Return the region's output for a call that was recorded, in another dtype."""
        to = torch.empty(0, dtype=dtype, device=next(self.module.parameters()).device)  # the dense may be elsewhere
        args, kwargs = list(_cast(call.args, to)), _cast(call.kwargs, to)
        if self.norm is not None:
            places: Any = args if isinstance(self.argument, int) else kwargs
            places[self.argument] = self.norm(*_cast(call.norm_args, to), **_cast(call.norm_kwargs, to))
        return self.sum(call, hidden_of(self.module(*args, **kwargs)))

    def sum(self, call: Call, output: Tensor) -> Tensor:
        """Return the region's output of the module's, on the device and in the dtype of that."""
        return output + _hidden_argument(call.norm_args, call.norm_kwargs)[1].to(output) if self.residual else output


@dataclass
class Call:
    """The arguments of a region's call in the forward of its block, and those of its norm."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    norm_args: tuple[Any, ...] = ()
    norm_kwargs: dict[str, Any] = field(default_factory=dict)

    def without_normed(self, region: Region) -> Call:
        """Return the call without what the norm gave, which the region computes anew."""
        if region.norm_path is None:
            return self
        place = region.argument
        args = [None if number == place else value for number, value in enumerate(self.args)]
        kwargs = {name: None if name == place else value for name, value in self.kwargs.items()}
        return replace(self, args=tuple(args), kwargs=kwargs)


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a module's output: the tensor, or the first of several."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise TargetError(f"a module returns a {type(found).__name__}, not hidden states; it cannot be reconstructed")
    return found


def _cast(value: Any, to: Tensor) -> Any:
    """Return arguments on the device of a tensor, floating ones in its dtype."""
    if isinstance(value, Tensor):
        return value.to(to) if value.is_floating_point() else value.to(to.device)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_cast(part, to) for part in value)
    if type(value) is dict:
        return {name: _cast(part, to) for name, part in value.items()}
    return value


# ---- The weights of a block of which there are two kinds, pruned and dense.


class DenseBlock:
    """The dense values of a block that is to be pruned in place; `held` puts them there for a while.

    Args:
        block: with its dense values.
        copy: False where the block gets other parameters instead of other values.
    """

    def __init__(self, block: nn.Module, *, copy: bool = True) -> None:
        self._values = [
            (module, name, nn.Parameter(value.detach().clone() if copy else value.detach(), requires_grad=False))
            for module in block.modules()
            for name, value in module._parameters.items()
            if value is not None
        ]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Exchange the block's parameters for the dense ones: a context manager."""
        before = [module._parameters[name] for module, name, _ in self._values]
        for module, name, value in self._values:
            module._parameters[name] = value
        try:
            yield
        finally:
            for (module, name, _), now in zip(self._values, before, strict=True):
                module._parameters[name] = now


@dataclass(frozen=True)
class Streams:
    """The hidden states of the repaired and of the dense model, at the same block.

    Args:
        repaired, dense: runners of the same windows in the same batches.
        dense_values: a context manager around each run of the dense block.
        sizes: windows of each batch.
        held: how many batches, the last ones, are held out.
    """

    repaired: BlockRunner
    dense: BlockRunner
    dense_values: Callable[[], contextlib.AbstractContextManager[None]]
    sizes: Sequence[int]
    held: int

    def advance(self, index: int) -> None:
        """Run a dense block and keep its outputs as the inputs of the next, unless that is done."""
        if self.dense.next == index:
            with self.dense_values():
                self.dense.propagate(index)


class Examples:
    """The call of a region on each batch, and the dense region's output, the target.

    They are kept from the first use on while there is room, and computed anew where there is not. The output of a block
    is what the dense stream holds anyway.

    Args:
        streams: at the state in which block `index` is next; the dense one may be behind it afterwards.
        index: of the block.
        region: of the block.
        inputs: "repaired" or "dense".
        room: bytes that may be kept.
    """

    def __init__(self, streams: Streams, index: int, region: Region, inputs: str, room: int) -> None:
        self._streams, self._index, self._region = streams, index, region
        self._repaired, self._room = inputs == "repaired", room
        self._kept: dict[int, tuple[Call, Tensor]] = {}
        self._advanced = self._repaired and region.last
        if self._advanced:
            streams.advance(index)

    def __getitem__(self, batch: int) -> tuple[Call, Tensor]:
        if batch in self._kept:
            return self._kept[batch]
        call, target = self._make(batch)
        size = _bytes([*call.args, *call.kwargs.values(), *call.norm_args, *call.norm_kwargs.values()])
        size = None if size is None else size + (0 if self._advanced else _bytes(target) or 0)
        if size is not None and size <= self._room:
            self._room -= size
            self._kept[batch] = (call, target)
        return call, target

    def _make(self, batch: int) -> tuple[Call, Tensor]:
        streams, region = self._streams, self._region
        call, output = Call(), None
        if self._advanced:
            target = hidden_of(streams.dense.kept(batch))
        else:
            with streams.dense_values():
                call, output = _run_region(streams.dense, self._index, batch, region, to_end=True)
            target = region.sum(call, hidden_of(output).detach())
        if self._repaired:
            call, _ = _run_region(streams.repaired, self._index, batch, region, to_end=False)
        return call.without_normed(region), target


def _bytes(value: Any) -> int | None:
    """Return the bytes of the tensors in arguments; None where something in them may change from call to call."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if type(value) in (tuple, list):
        sizes = [_bytes(part) for part in value]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    if type(value) is dict and not value:
        return 0
    return 0 if value is None or isinstance(value, (bool, int, float, str)) else None


def _run_region(runner: BlockRunner, index: int, batch: int, region: Region, *, to_end: bool) -> tuple[Call, Any]:
    """Run a block as far as a region's call, or its end; return the call and the output."""
    block, call = runner.block(index), Call()
    module = block.get_submodule(region.path)
    forward = module.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        call.args, call.kwargs = args, kwargs
        raise Reached(forward(*args, **kwargs) if to_end else None)

    recorded: dict[nn.Module, Callable[..., Any]] = {module: record}
    if region.norm_path is not None:
        norm = block.get_submodule(region.norm_path)
        norm_forward = norm.forward

        def record_norm(*args: Any, **kwargs: Any) -> Any:
            call.norm_args, call.norm_kwargs = args, kwargs
            return norm_forward(*args, **kwargs) if to_end else _hidden_argument(args, kwargs)[1]

        recorded[norm] = record_norm
    with replaced_forwards(recorded):
        output = runner.visit(index, batch)
    return call, output


# ---- Which regions a block has, as one run of it shows.


def find_regions(runner: BlockRunner, index: int, layers: Collection[Projection], kind: str) -> list[Region]:
    """Return the regions of a block in the order in which it calls them.

    Args:
        runner: at the state in which block `index` is next.
        index: of the block.
        layers: projections in the block.
        kind: "submodule" or "block".
    """
    block = runner.block(index)
    if not layers:
        return []
    if kind == "block":
        return [Region(block, "", None, 0, list(layers), last=True)]
    places = {id(m.linear() if isinstance(m, LinearHost) else m): path for path, m in block.named_modules()}
    inside = [(places[id(layer.module)], layer) for layer in layers]
    parts = list(dict.fromkeys(_part_of(block, path) for path, _ in inside))
    others = [name for name, child in block.named_children() if not any(_is_in(part, name) for part in parts)]
    made: dict[str, Any] = {}  # outputs in this run by path
    read: dict[str, Any] = {}  # hidden states that went in
    reads: dict[str, tuple[int | str, str | None]] = {}

    def enter(path: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            argument, hidden = _hidden_argument(args, kwargs)
            source = next((other for other, output in made.items() if output is hidden), None)
            reads.setdefault(path, (argument, source))
            read.setdefault(path, hidden)

        return note

    def leave(path: str) -> Any:
        return lambda _, args, output: made.setdefault(path, output)

    hooks = [block.get_submodule(p).register_forward_pre_hook(enter(p), with_kwargs=True) for p in (*parts, *others)]
    hooks += [block.get_submodule(path).register_forward_hook(leave(path)) for path in (*parts, *others)]
    try:
        streams = [given := hidden_of(runner.visit(index, 0))]
    finally:
        for hook in hooks:
            hook.remove()
    sources = [source for _, source in reads.values()]
    streams += [hidden for hidden in read.values() if isinstance(hidden, Tensor)]
    found = []
    for path, (argument, source) in reads.items():
        if path not in parts:
            continue
        norm = source if source in others and sources.count(source) == 1 else None
        held = [layer for name, layer in inside if _is_in(name, path)]
        residual = norm is not None and _is_sum(streams, read[norm], hidden_of(made[path]))
        last = residual and norm is not None and torch.equal(read[norm] + hidden_of(made[path]), given)
        found.append(Region(block, path, norm, argument, held, residual, last))
    return found


def _is_sum(streams: Sequence[Tensor], one: Tensor, other: Tensor) -> bool:
    """Whether the sum of two tensors is one of the hidden states that were seen."""
    if one.shape != other.shape:
        return False
    expected = one + other
    alike = (stream.reshape(expected.shape) for stream in streams if stream.numel() == expected.numel())  # OPT flattens
    return any(torch.equal(stream, expected) for stream in alike)


def _hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Any]:
    """Return the place or name of the hidden states among arguments, and them."""
    if args:
        return 0, args[0]
    name = hidden_name(kwargs)
    return name, kwargs[name]


def _is_in(path: str, part: str) -> bool:
    return path == part or path.startswith(part + ".")


def _part_of(block: nn.Module, path: str) -> str:
    """Return the path of the outermost module that is called and holds what is at `path`: no mere list of modules."""
    names = path.split(".")
    for count in range(1, len(names) + 1):
        part = ".".join(names[:count])
        if not isinstance(block.get_submodule(part), (nn.ModuleList, nn.ModuleDict)):
            return part
    return path
