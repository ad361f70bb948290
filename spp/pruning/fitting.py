"""Reconstruction of one block: its kept weights are trained until its regions give again what the dense ones give.

    L = mean over tokens of ‖y − t‖² / (‖t‖² + ε)

y is the output of a region with the pruned weights on the inputs that it has now, t that of the dense region on the
dense model's. A token counts by its relative error: a plain mean square is ruled by the few tokens, such as the first,
whose activations are a thousand times as large. ε is 1 % of the median of ‖t‖² in a batch.

Regions (spp.pruning.regions) are trained in the order in which the block calls them, each on what the repaired ones
before it give. Trained are the weights of the projections that are not zero, norms and biases: by Adam, in
float32 where they are stored in 16 bits; or adapters beside frozen ones. Pruned positions keep their bits.
Values are stored only where they lower the error on the held-out windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spp.configs.reconstruction import Reconstruction
from spp.errors import MaskError, some_of
from spp.masks.patterns import pack_bits
from spp.masks.select import work_dtype
from spp.models.expert_products import plain_experts
from spp.models.projection import Projection
from spp.pruning.regions import Examples, Region, Streams, find_regions
from spp.pruning.report import BlockReport, RegionReport
from spp.pruning.values import Adapters, Trained, Weights

_KEPT = 32 << 20  # bytes of a region's examples that are kept at least: less than a tenth of what torch alone takes
_FLOOR = 0.01  # ε as a share of the median
_WARM_UP = 0.1  # of the steps
_CHECKS = 10  # of the error on the held-out windows at most, each after an epoch
_PATIENCE = 2  # checks without a lower error


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens of ‖y − t‖² / (‖t‖² + ε).

    Args:
        output: y (…, d).
        target: t (…, d).
    """
    output = output.to(work_dtype(output))
    target = target.to(output)
    norm = target.square().sum(-1)
    floor = (_FLOOR * norm.median()).clamp_min(torch.finfo(norm.dtype).tiny)
    return ((output - target).square().sum(-1) / (norm + floor)).mean()


def fit_block(streams: Streams, index: int, layers: Mapping[str, Projection], options: Reconstruction) -> BlockReport:
    """Reconstruct a pruned block in place; the dense stream is behind the block afterwards.

    Args:
        streams: at the state in which block `index` is next.
        index: of the block.
        layers: {path: projection} of its targets; adapters that are to be trained are in their places already.
        options: how.

    Raises:
        MaskError: zeros would have changed.
    """
    adapted = options.adapter is not None  # whose base is frozen
    masks = {path: pack_bits(layer.weight) for path, layer in layers.items() if not adapted}
    regions = find_regions(streams.repaired, index, layers.values(), options.region)
    report = BlockReport(tuple(_fit(streams, index, region, options) for region in regions))
    streams.advance(index)
    changed = [path for path, mask in masks.items() if (pack_bits(layers[path].weight) != mask).any()]
    if changed:
        raise MaskError(f"reconstruction would change the zeros of {some_of(changed)}; this is a fault of spp")
    return report


def _fit(streams: Streams, index: int, region: Region, options: Reconstruction) -> RegionReport:
    started = time.perf_counter()
    values = Adapters(region) if options.adapter is not None else Weights(region)
    everything = list(range(len(streams.sizes)))
    train = everything[: len(everything) - streams.held]
    measured = everything[len(train) :] or train
    fused = {id(layer.module): layer.module for layer in region.projections if layer.fused}
    examples = Examples(streams, index, region, options.inputs, max(_KEPT, 4 * region.numel()))

    def loss(batch: int) -> Tensor:
        call, target = examples[batch]
        with torch.enable_grad():
            return relative_error(region.output(call, values.dtype), target)

    def error() -> float:
        with values.frozen():
            squares = [float(loss(batch)) * streams.sizes[batch] for batch in measured]
        return math.sqrt(sum(squares) / sum(streams.sizes[batch] for batch in measured))

    with plain_experts(list(fused.values())), values.training():
        before = after = error()
        steps, note = 0, "rolled back: it has no value to train"
        if values.count():
            steps, note = _train(values, loss, error, before, train, options)
        if not note.startswith("rolled back"):
            values.load_best()
            after = error()  # of the values as they are stored
        values.kept = after < before
        if not values.kept:
            after, note = before, note or "rolled back: rounded to what is stored, it is no better"
    return RegionReport(region.path, before, after, values.count(), steps, time.perf_counter() - started, note)


def _train(
    values: Trained,
    loss: Callable[[int], Tensor],
    error: Callable[[], float],
    before: float,
    batches: list[int],
    options: Reconstruction,
) -> tuple[int, str]:
    """Train a region, keeping its best values; return the steps that were taken and a note."""
    generator = torch.Generator().manual_seed(options.seed)
    epochs = options.epochs_of(len(batches))
    total, steps, worse, best, why = epochs * len(batches), 0, 0, before, "the error did not fall"
    every = math.ceil(epochs / _CHECKS)
    with values.stepping(options.rate) as rate:
        for epoch in range(epochs):
            for place in torch.randperm(len(batches), generator=generator).tolist():
                found = loss(batches[place])
                if not math.isfinite(float(found)):
                    worse, why = _PATIENCE, f"it diverged in step {steps + 1}"
                    break
                rate.lr = options.rate * _schedule(steps, total)
                found.backward()
                steps += 1
            if worse < _PATIENCE and (epoch + 1) % every and epoch + 1 < epochs:
                continue
            now = error() if worse < _PATIENCE else math.inf
            worse = 0 if now < best else worse + 1
            if now < best:
                best = now
                values.keep()
            if worse >= _PATIENCE:
                break
    if best == before:
        return steps, f"rolled back: {why}"
    return steps, f"stopped early: {why if 'diverged' in why else 'the error rose'}" if steps < total else ""


def _schedule(step: int, total: int) -> float:
    """Return the share of the learning rate in a step: it rises for a tenth of the steps and falls as a cosine."""
    rising = max(1, round(_WARM_UP * total))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2
