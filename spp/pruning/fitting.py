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
from spp.distributed.sums import add_, gathered, members, of_first, place, send_, together, total
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


def relative_error(output: Tensor, target: Tensor, floor: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ‖y − t‖² / (‖t‖² + ε).

    Args:
        output: y (…, d).
        target: t (…, d).
        floor: ε, of a batch that these tokens are a part of; None computes it of them.
    """
    output = output.to(work_dtype(output))
    target = target.to(output)
    norm = target.square().sum(-1)
    floor = _floor(norm) if floor is None else floor
    return ((output - target).square().sum(-1) / (norm + floor)).mean()


def _floor(norm: Tensor) -> Tensor:
    return (_FLOOR * norm.median()).clamp_min(torch.finfo(norm.dtype).tiny)


class _Batch:
    """A batch of which every rank has a part: its ε, and the share of its tokens that this rank has.

    Args:
        target: t (…, d) of this rank's part; None where it has none.
        dtype: that errors are computed in.
        device: of the targets.
    """

    def __init__(self, target: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        norm = torch.empty(0, dtype=dtype, device=device)
        if target is not None:
            norm = target.to(norm).square().sum(-1).flatten()
        counts = gathered(len(norm))
        norms = torch.zeros(sum(counts), dtype=dtype, device=device)
        before = sum(counts[: place()])
        norms[before : before + len(norm)] = norm
        self.floor = _floor(add_(norms))
        self.share = len(norm) / len(norms)


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
    with together():
        found = find_regions(streams.repaired, index, layers.values(), options.region) if place() == 0 else []
    regions = [region.told(streams.repaired.block(index), layers) for region in of_first([r.named() for r in found])]
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
    batches: dict[int, _Batch] = {}
    fused = {id(layer.module): layer.module for layer in region.projections if layer.fused}
    examples = Examples(streams, index, region, options.inputs, max(_KEPT, 4 * region.numel()))

    def loss(batch: int) -> Tensor:
        """Return this rank's part of the loss, which is the sum over the ranks."""
        target, output = None, None
        with together():
            if streams.repaired.holds(batch):
                call, target = examples[batch]
                with torch.enable_grad():
                    output = region.output(call, values.dtype)
        if members() > 1 and batch not in batches:
            parameter = values.parameters()[0]
            batches[batch] = _Batch(target, work_dtype(parameter), parameter.device)
        if output is None or target is None:
            return torch.zeros((), device="cpu")
        with torch.enable_grad():
            if members() == 1:
                return relative_error(output, target)
            return relative_error(output, target, batches[batch].floor) * batches[batch].share

    def error() -> float:
        with values.frozen():
            squares = [float(loss(batch)) * streams.sizes[batch] for batch in measured]
        return math.sqrt(total(sum(squares)) / sum(streams.sizes[batch] for batch in measured))

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
    for stored in values.stored():  # all ranks took the same steps; one of them says with which bits
        send_(stored, 0)
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
    planned, steps, worse, best, why = epochs * len(batches), 0, 0, before, "the error did not fall"
    every = math.ceil(epochs / _CHECKS)
    with values.stepping(options.rate) as rate:
        for epoch in range(epochs):
            for place in torch.randperm(len(batches), generator=generator).tolist():
                found = loss(batches[place])
                if not math.isfinite(total(float(found))):
                    worse, why = _PATIENCE, f"it diverged in step {steps + 1}"
                    break
                rate.lr = options.rate * _schedule(steps, planned)
                rate.step(found)
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
    return steps, f"stopped early: {why if 'diverged' in why else 'the error rose'}" if steps < planned else ""


def _schedule(step: int, total: int) -> float:
    """Return the share of the learning rate in a step: it rises for a tenth of the steps and falls as a cosine."""
    rising = max(1, round(_WARM_UP * total))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2
