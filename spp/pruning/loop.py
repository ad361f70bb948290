"""The passes over a model's blocks: the pruning one, and OWL's count of outliers before it.

for each block: statistics of what its layers read → prune them → run it again for the inputs of the next block
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from spp.configs.pruning import METHODS, OWL, Method
from spp.masks.owl import outlier_share, owl_fractions
from spp.masks.patterns import Pattern
from spp.masks.wanda import wanda_score
from spp.models.projection import Projection
from spp.pruning.blocks import BlockRunner
from spp.pruning.collect import gather_inputs
from spp.pruning.layer import LayerInputs, prune_layer
from spp.pruning.report import LayerReport

Layers = Mapping[str, Projection]


class BlockStore:
    """Where blocks come from and go to; this one is for a model in memory, where there is nothing to do."""

    def resident(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Have the weights of a block in memory."""
        return contextlib.nullcontext()

    def has(self, index: int) -> bool:
        """Whether a block is pruned already."""
        return False

    def finish(self, index: int, done: Mapping[str, LayerReport]) -> None:
        """Take a resident block that was pruned just now."""


def layers_by_block(layers: Layers, root: str, count: int) -> list[dict[str, Projection]]:
    """Return the layers in each of the blocks `root`.0, `root`.1, …"""
    starts = [f"{root}.{index}" if root else str(index) for index in range(count)]
    return [
        {path: layer for path, layer in layers.items() if path == start or path.startswith(start + ".")}
        for start in starts
    ]


def prune_blocks(
    runner: BlockRunner | None,
    of_block: Sequence[Layers],
    method: Method,
    patterns: Mapping[str, Pattern],
    windows: Tensor,
    store: BlockStore | None = None,
) -> dict[str, LayerReport]:
    """Prune block by block and return what was done to each layer, finished blocks excepted.

    Args:
        runner: at the first block; None prunes without calibration.
        of_block: each block's layers by path.
        method: how.
        patterns: {path: to what}.
        windows: token ids (k, L).
        store: of the blocks.
    """
    store = store or BlockStore()
    last = max((index for index in range(len(of_block)) if not store.has(index)), default=-1)
    done: dict[str, LayerReport] = {}
    bar = tqdm(range(last + 1), desc=f"pruning ({method.name})", unit="block", disable=None)
    for index in bar:
        with store.resident(index):
            if not store.has(index):
                inputs: dict[str, list[LayerInputs]] = {}
                if runner is not None and of_block[index]:
                    inputs = gather_inputs(runner, index, of_block[index], method, windows)
                found = {
                    path: prune_layer(layer, inputs.pop(path, None), method, patterns[path])
                    for path, layer in of_block[index].items()
                }
                store.finish(index, found)
                done |= found
                if found:
                    error = max(layer.relative_error or 0.0 for layer in found.values())
                    bar.set_postfix(error=f"{error:.3f}", refresh=False)
            if runner is not None and index < last:
                runner.propagate(index)
    return done


def owl_patterns(
    runner: BlockRunner,
    of_block: Sequence[Layers],
    owl: OWL,
    fraction: float,
    windows: Tensor,
    store: BlockStore | None = None,
) -> dict[str, Pattern]:
    """Return each layer's pattern from the outliers of its block in the dense model, `fraction` on average."""
    store = store or BlockStore()
    held = [index for index, inside in enumerate(of_block) if inside]
    outliers = []
    for index in tqdm(range(held[-1] + 1), desc="counting outliers", unit="block", disable=None):
        with store.resident(index):
            if of_block[index]:
                inputs = gather_inputs(runner, index, of_block[index], METHODS["wanda"], windows, keep=True)
                scores = [
                    wanda_score(matrix, known.collector.stats().norm)
                    for path, layer in of_block[index].items()
                    for matrix, known in zip(layer.matrices(), inputs[path], strict=True)
                    if known.collector.count
                ]
                outliers.append(outlier_share(scores, owl.threshold))
            else:
                runner.propagate(index)
    fractions = owl_fractions(outliers, fraction, owl.spread)
    return {
        path: Pattern(fraction=round(block_fraction, 6))
        for index, block_fraction in zip(held, fractions, strict=True)
        for path in of_block[index]
    }
