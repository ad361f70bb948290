"""The passes over a model's blocks, in memory or streamed: the pruning one, and OWL's count of outliers before it.

    for each block: statistics of what its layers read → prune them → run it again for the inputs of the next block

With reconstruction (spp.pruning.fitting) the dense model's hidden states are kept beside those, and the block is
trained to give the dense block's outputs before it runs again.

So the next block gets the inputs that a pruned model has (SparseGPT and Wanda, their published procedure). Only one
block's statistics and the current hidden states exist at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from tqdm import tqdm

from spp.configs.pruning import METHODS
from spp.distributed.sums import gathered, members, of_first, place, send_, together
from spp.masks.patterns import Pattern
from spp.masks.wanda import outlier_share, owl_fractions, wanda_score
from spp.models.projection import Projection
from spp.pruning.blocks import BlockRunner
from spp.pruning.collect import gather_inputs
from spp.pruning.fitting import fit_block
from spp.pruning.layer import LayerInputs, prune_layer
from spp.pruning.plan import PrunePlan
from spp.pruning.regions import DenseBlock, Streams
from spp.pruning.report import BlockReport, LayerReport

Layers = Mapping[str, Projection]


class BlockStore:
    """Where blocks come from and go to; this one is for a model in memory, where there is nothing to do."""

    def resident(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Hold the weights of a block in memory: a context manager."""
        return contextlib.nullcontext()

    def has(self, index: int) -> bool:
        """Whether a block is pruned already."""
        return False

    def dense(self, index: int, block: nn.Module) -> DenseBlock:
        """Return the values of a resident block before it was pruned."""
        return DenseBlock(block)

    def finish(self, index: int, done: Mapping[str, LayerReport], repaired: BlockReport | None) -> None:
        """Take a resident block that was pruned, and maybe reconstructed, just now."""

    def patterns(self, find: Callable[[], dict[str, Pattern]]) -> dict[str, Pattern]:
        """Return the patterns that `find` finds, in this run or an earlier one."""
        return find()


def layers_by_block(layers: Layers, root: str, count: int) -> list[dict[str, Projection]]:
    """Return the layers in each of the blocks `root`.0, `root`.1, …"""
    starts = [f"{root}.{index}" if root else str(index) for index in range(count)]
    return [
        {path: layer for path, layer in layers.items() if path == start or path.startswith(start + ".")}
        for start in starts
    ]


def prune_blocks(
    plan: PrunePlan,
    of_block: Sequence[Layers],
    make_runner: Callable[[], BlockRunner],
    store: BlockStore,
) -> tuple[dict[str, LayerReport], dict[int, BlockReport]]:
    """Prune block by block; return what was done to each layer, and to each block that was reconstructed.

    Finished blocks are left out.

    Args:
        plan: what to do.
        of_block: each block's layers by path.
        make_runner: returns one at the first block; not called without calibration.
        store: of the blocks.
    """
    patterns = plan.patterns
    if plan.options.owl is not None:
        patterns = store.patterns(lambda: owl_patterns(plan, of_block, make_runner(), store))
    runner = make_runner() if plan.calibrated else None
    options = plan.options.reconstruct
    teacher = None if options is None else make_runner()
    last = max((index for index in range(len(of_block)) if not store.has(index)), default=-1)
    done: dict[str, LayerReport] = {}
    repaired: dict[int, BlockReport] = {}
    bar = tqdm(range(last + 1), desc=f"pruning ({plan.method.name})", unit="block", disable=None)
    for index in bar:
        with store.resident(index):
            dense = None if teacher is None else store.dense(index, teacher.block(index))
            if not store.has(index):
                found = _prune_block(plan, index, of_block[index], patterns, runner)
                if runner and teacher and dense and options:
                    streams = Streams(runner, teacher, dense.held, *plan.batches)
                    repaired[index] = fit_block(streams, index, of_block[index], options)
                store.finish(index, found, repaired.get(index))
                done |= found
                error = max((layer.relative_error or 0.0 for layer in found.values()), default=0.0)
                bar.set_postfix_str(f"error={error:.3f}{repair_text(repaired.get(index))}", refresh=False)
            if teacher and dense and index < last and teacher.next == index:
                with dense.held():
                    teacher.propagate(index)
            if runner is not None and index < last:
                runner.propagate(index)
    return done, repaired


def repair_text(block: BlockReport | None) -> str:
    """Return what a progress bar shows of a block that was reconstructed."""
    if block is None or block.before is None:
        return ""
    return f", repaired {block.before:.3f} → {block.after:.3f}"


def _prune_block(
    plan: PrunePlan, index: int, layers: Layers, patterns: Mapping[str, Pattern], runner: BlockRunner | None
) -> dict[str, LayerReport]:
    """Prune the layers of a block; of several ranks each prunes some, one all that read one input, and gives them."""
    inputs: dict[str, list[LayerInputs]] = {}
    if runner is not None and layers:
        inputs = gather_inputs(runner, index, layers, plan.method, plan.windows)
    groups = {id(known[0].collector): None for known in inputs.values()}
    turns = {group: turn % members() for turn, group in enumerate(groups)}
    owners = {path: turns[id(inputs[path][0].collector)] if path in inputs else 0 for path in layers}
    done: dict[str, LayerReport] = {}
    with together():
        for path, layer in layers.items():
            known = inputs.pop(path, None)
            if owners[path] == place():
                done[path] = prune_layer(layer, known, plan.method, patterns[path], plan.options.keep_zeros)
    for path, layer in layers.items():
        send_(layer.weight, owners[path])
    everything = {path: report for of_rank in gathered(done) for path, report in of_rank.items()}
    return {path: everything[path] for path in layers}


def owl_patterns(
    plan: PrunePlan, of_block: Sequence[Layers], runner: BlockRunner, store: BlockStore
) -> dict[str, Pattern]:
    """Return each layer's pattern from the outliers of its block in the dense model, the plan's fraction on average."""
    owl = plan.options.owl
    assert owl is not None
    fraction = Pattern.parse(plan.options.pattern).sparsity  # type: ignore[arg-type]  # PruneOptions: no mapping
    held = [index for index, inside in enumerate(of_block) if inside]
    outliers = []
    for index in tqdm(range(held[-1] + 1), desc="counting outliers", unit="block", disable=None):
        with store.resident(index):
            if of_block[index]:
                inputs = gather_inputs(runner, index, of_block[index], METHODS["wanda"], plan.windows, keep=True)
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
    fractions = of_first(fractions)
    return {
        path: Pattern(fraction=round(block_fraction, 6))
        for index, block_fraction in zip(held, fractions, strict=True)
        for path in of_block[index]
    }
