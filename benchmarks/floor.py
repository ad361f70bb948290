"""The floor of pruning by calibration: the forward passes of each block that no method can avoid.

A block runs once to show what its layers read, and once more, pruned, to give the next block its inputs; nothing needs
the second run of the last block that is pruned. The passes here are these and nothing else: a block is called with the
arguments that the model itself passes to it, recorded beforehand, batch by batch, and only the hidden states between
two blocks are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spp.evaluation import evaluating
from spp.models.targets import resolve_targets
from spp.pruning.blocks import BATCH_TOKENS, Reached, call_model, find_blocks, hidden_name

Call = Callable[[Tensor], Any]  # a block with its recorded arguments: hidden states in, the block's output out


def forward_passes(model: nn.Module, windows: Tensor) -> Callable[[], None]:
    """Return a call that runs each block of a model twice, and the last one that is pruned once.

    Args:
        model: any that `spp.prune` takes.
        windows: token ids (k, L), run in the batches that `spp.prune` makes of them.
    """
    targets = [path for path, _ in resolve_targets(model)]
    root, blocks = find_blocks(model, targets)
    start = len(root) + 1 if root else 0
    blocks = blocks[: 1 + max(int(path[start:].split(".")[0]) for path in targets)]
    batches = windows.to(next(model.parameters()).device).split(max(1, BATCH_TOKENS // windows.shape[1]))
    with evaluating(model):
        recorded = [_record(model, blocks, batch) for batch in batches]

    def run() -> None:
        hidden = [first for first, _ in recorded]
        with evaluating(model):
            for index in range(len(blocks)):
                calls = [calls[index] for _, calls in recorded]
                for call, x in zip(calls, hidden, strict=True):
                    call(x)
                if index < len(blocks) - 1:
                    for batch, call in enumerate(calls):
                        output = call(hidden[batch])
                        hidden[batch] = output[0] if isinstance(output, tuple) else output

    return run


def _record(model: nn.Module, blocks: list[nn.Module], ids: Tensor) -> tuple[Tensor, list[Call]]:
    """Return the first block's hidden states for a batch, and each block with its other arguments."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = None if args else hidden_name(kwargs)
        if not first:
            first.append(args[0] if name is None else kwargs[name])
        calls.append(_with_arguments(block, args[1:], kwargs, name))

    def finish(*_: Any) -> NoReturn:
        raise Reached

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(finish))
    try:
        with torch.no_grad():
            call_model(model, ids)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return first[0], calls


def _with_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> Call:
    """Return a block that takes its hidden states by position, or by `name`; those recorded are not kept."""
    rest = {key: value for key, value in kwargs.items() if key != name}

    def call(x: Tensor) -> Any:
        return block(x, *args, **rest) if name is None else block(**{name: x}, **rest)

    return call
