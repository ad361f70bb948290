"""A model's decoder blocks, run one at a time with exactly what the model itself passes to each.

The model's own forward is called for every batch. Blocks before the one that is wanted do not compute: the last of
them returns the output that was kept of it, those before it hand their input on. The output of the wanted one ends the
call. So position ids, masks, rotary embeddings, whatever else an architecture passes and what it does between two
blocks are its own. Kept are the output of one block, and what blocks put into a mapping that they all are passed (keys
and values of a layer that later layers use too).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spp.distributed.sums import members, place, together
from spp.errors import NonFiniteError, TargetError, arg
from spp.masks.patterns import all_finite
from spp.models.targets import input_embedding

BATCH_TOKENS = 2048  # windows are run together up to this many tokens


class Reached(Exception):
    """Ends the model's forward once what was wanted is known."""

    def __init__(self, output: Any = None) -> None:
        self.output = output


def find_blocks(model: nn.Module, targets: Sequence[str]) -> tuple[str, list[nn.Module]]:
    """Return the path and the blocks of the decoder: the list with the most parameters that holds targets.

    Args:
        model: any module whose forward runs a list of blocks one after another.
        targets: module paths, all of which must be inside the blocks.

    Raises:
        TargetError: there is no such list, or some targets lie outside it.
    """
    for kind in (nn.ModuleList, nn.Sequential):
        found = [
            (sum(p.numel() for p in module.parameters()), path, list(module))
            for path, module in model.named_modules()
            if isinstance(module, kind) and any(_inside(target, path) for target in targets)
        ]
        if found:
            _, path, blocks = max(found, key=lambda item: item[0])
            break
    else:
        raise TargetError(
            "the model has no list of blocks (nn.ModuleList) that holds the target modules, so it cannot be "
            f"run block by block; {arg('method', 'magnitude')} without calibration does not need to"
        )
    outside = [target for target in targets if not _inside(target, path)]
    if outside:
        raise TargetError(
            f"{len(outside)} target modules lie outside the decoder blocks {path!r} and cannot be calibrated with "
            f"them: {', '.join(outside[:5])}{', …' if len(outside) > 5 else ''}; leave them out with "
            f"{arg('exclude_modules')}, or use {arg('method', 'magnitude')} for them"
        )
    if len({id(block) for block in blocks}) < len(blocks):
        raise TargetError(f"some blocks of {path!r} are the same module: pruning one would change the other")
    return path, blocks


def _inside(target: str, path: str) -> bool:
    return not path or target.startswith(path + ".")


def share_of(
    windows: int, together: int, sizes: Sequence[int] | None, place: int, members: int
) -> list[tuple[int, int]]:
    """Return the first window and the last but one of each batch of a rank; rank 0 has a part of the first batch.

    Args:
        windows: of all ranks.
        together: windows of a batch where no sizes are given: a rank's share is cut into such batches.
        sizes: windows of each batch of all ranks; the rank has a part of each, which may be none. The larger parts go
            round.
        place: of the rank.
        members: how many ranks there are.

    Example:
        >>> share_of(5, 2, None, 0, 2), share_of(5, 2, None, 1, 2)
        ([(0, 2), (2, 3)], [(3, 5)])
    """

    def part(first: int, size: int, number: int) -> tuple[int, int]:
        return first - (-number * size // members), first - (-(number + 1) * size // members)

    if sizes is None:
        first, last = part(0, windows, place)
        return [(start, min(start + together, last)) for start in range(first, last, together)]
    starts = [sum(sizes[:batch]) for batch in range(len(sizes))]
    return [
        part(start, size, (place - batch) % members)
        for batch, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


class BlockRunner:
    """Runs one block after another on batches of windows, keeping the hidden states between them.

    Args:
        model: in eval mode.
        path: of the list of blocks, for messages.
        blocks: in the order in which the model runs them.
        windows: token ids (k, L); of several ranks each runs its share.
        sizes: windows of each batch, of which each rank has a part; None runs up to BATCH_TOKENS tokens together.

    Attributes:
        places: how many tokens of `windows` come before each batch that this rank has a part of.
        next: the block that is next.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        blocks: Sequence[nn.Module],
        windows: Tensor,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._path = path
        self._blocks = blocks
        windows = windows.to(_input_device(model))
        spans = share_of(len(windows), max(1, BATCH_TOKENS // windows.shape[1]), sizes, place(), members())
        self._batches = [windows[first:last] for first, last in spans]
        self.places = [first * windows.shape[1] for first, last in spans if first < last]
        self._outputs: list[Any] = [None] * len(self._batches)  # of the block before the next one, as it returned them
        self._shared = [_Shared() for _ in self._batches]
        self.next = 0

    def __len__(self) -> int:
        return len(self._batches)

    def holds(self, batch: int) -> bool:
        """Whether this rank has windows of a batch."""
        return len(self._batches[batch]) > 0

    def run(self, index: int, *, keep: bool) -> Iterator[int]:
        """Run block `index` on its inputs batch by batch; what is of interest in it, hooks have seen.

        Args:
            index: of the block that is next.
            keep: take the outputs as the inputs of the next block; else drop them, and let hooks raise `Reached` to
                spare the rest of the block.

        Yields:
            The number of each batch once it is through.

        Raises:
            NonFiniteError: an output that is to be kept holds NaN or infinity.
        """
        for batch in filter(self.holds, range(len(self._batches))):
            output = self._run(index, batch)
            if keep:
                self._check(index, output)
                self._outputs[batch] = output
            self._shared[batch].end(keep=keep)
            yield batch
        self.next += keep

    def kept(self, batch: int) -> Any:
        """Return the output of the block before the next one."""
        return self._outputs[batch]

    def block(self, index: int) -> nn.Module:
        """Return block `index`."""
        return self._blocks[index]

    def visit(self, index: int, batch: int) -> Any:
        """Run block `index`, the next, on one batch; return its output, or that of the `Reached` which ends it."""
        try:
            return self._run(index, batch)
        finally:
            self._shared[batch].end(keep=False)

    def propagate(self, index: int) -> None:
        """Run block `index` and keep its outputs as the inputs of the next one."""
        with together():
            for _ in self.run(index, keep=True):
                pass

    def _check(self, index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise TargetError(f"{self._path}.{index} returns a {type(output).__name__}, not hidden states")
        if not all_finite(hidden):
            raise NonFiniteError(
                f"the output of {self._path}.{index} holds NaN or infinity",
                remedy=f"load the model in a wider dtype, such as {arg('dtype', torch.float32)}",
            )

    def _run(self, index: int, batch: int) -> Any:
        """Return the output of a block on a batch: the model's forward, as far as that block."""
        block = self._blocks[index]
        stop = block.register_forward_hook(_stop)
        shared = block.register_forward_pre_hook(self._shared[batch].fill, with_kwargs=True)
        try:
            with replaced_forwards(_stand_ins(self._blocks[:index], self._outputs[batch])):
                call_model(self._model, self._batches[batch])
        except Reached as reached:
            return reached.output
        finally:
            stop.remove()
            shared.remove()
        raise TargetError(f"the model's forward does not run {self._path}.{index}; it cannot be calibrated")


def _stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> NoReturn:
    raise Reached(output)


class _Shared:
    """The entries that blocks put into mappings which they all are passed, by argument, for one batch."""

    def __init__(self) -> None:
        self._entries: dict[int | str, dict[Any, Any]] = {}
        self._passed: dict[int | str, tuple[MutableMapping[Any, Any], dict[Any, Any]]] = {}  # to the last block

    def fill(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put what earlier blocks have left into the mappings that a block is passed: a forward pre-hook."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        mappings = {argument: value for argument, value in given if isinstance(value, MutableMapping)}
        for argument, mapping in mappings.items():
            mapping.update(self._entries.get(argument, {}))
        self._passed = {argument: (mapping, dict(mapping)) for argument, mapping in mappings.items()}

    def end(self, *, keep: bool) -> None:
        """Keep what the block has added, or forget it; the mappings themselves are freed."""
        for argument, (mapping, before) in self._passed.items() if keep else ():
            added = {key: value for key, value in mapping.items() if before.get(key, self) is not value}
            self._entries.setdefault(argument, {}).update(added)
        self._passed = {}


def _stand_ins(blocks: Sequence[nn.Module], kept: Any) -> dict[nn.Module, Callable[..., Any]]:
    """Return forwards that compute nothing: the last block gives what was kept of it, those before hand on their input.

    Args:
        blocks: all before the one that is to compute.
        kept: the output of the last of them.
    """

    def give(*args: Any, **kwargs: Any) -> Any:
        return _copied(kept)

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs[hidden_name(kwargs)]
        return (hidden, *_copied(kept[1:])) if isinstance(kept, tuple) else hidden

    return {block: give if block is blocks[-1] else hand_on for block in blocks}


@contextlib.contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Exchange the forwards of some modules: a context manager."""
    before = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _copied(output: Any) -> Any:
    """Return a block's output with its tensors copied: what comes next may change them in place."""
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    return output.clone() if isinstance(output, Tensor) else output


def call_model(model: nn.Module, ids: Tensor) -> None:
    """Run the model's forward on token ids (k, L), without a cache where that can be said."""
    parameters = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in parameters else {}
    if "input_ids" in parameters:
        model(input_ids=ids, **options)
    else:
        model(ids, **options)


def hidden_name(kwargs: dict[str, Any]) -> str:
    """Return which of a block's keyword arguments holds the hidden states, where none is positional."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())


def _input_device(model: nn.Module) -> torch.device:
    return next((input_embedding(model) or model).parameters(), torch.empty(0, device="cpu")).device
