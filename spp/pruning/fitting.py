"""Reconstruction of one block: its kept weights are trained until its regions give again what the dense ones give.

    L = mean over tokens of ‖y − t‖² / (‖t‖² + ε)

y is the output of a region with the pruned weights on the inputs that it has now, t that of the dense region on the
dense model's. A token counts by its relative error: a plain mean square is ruled by the few tokens, such as the first,
whose activations are a thousand times as large. ε is 1 % of the median of ‖t‖² in a batch.

Regions (spp.pruning.regions) are trained in the order in which the block calls them, each on what the repaired ones
before it give. Trained are the weights of the projections that are not zero, norms and biases: by Adam, in
float32 where they are stored in 16 bits. Pruned positions keep their bits. Values are stored only where they lower the
error on the held-out windows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spp.configs.reconstruction import Reconstruction
from spp.errors import MaskError, some_of
from spp.masks.patterns import nonzero_mask, pack_bits
from spp.masks.select import work_dtype
from spp.models.expert_products import plain_experts
from spp.models.projection import Projection
from spp.pruning.regions import Region, Streams, find_regions
from spp.pruning.report import BlockReport, RegionReport
from spp.rules import rescue_

_FLOOR = 0.01  # ε as a share of the median
_WARM_UP = 0.1  # of the steps
_CHECKS = 10  # of the error on the held-out windows at most, each after an epoch
_PATIENCE = 2  # checks without a lower error


@dataclass
class _Value:
    """A parameter of a region.

    Args:
        module, name: that hold it.
        stored: in its own dtype; the object that the module has before and afterwards.
        value: that is trained, in float32 at least: `stored` itself where that is no narrower.
        masked: whether its zeros stay zeros; None where it is not trained.
        best: the values of the lowest error so far, in the dtype of `stored`; None where it is not trained.
        flag: requires_grad of `stored`.
    """

    module: nn.Module
    name: str
    stored: nn.Parameter
    value: nn.Parameter
    masked: bool | None
    best: Tensor | None
    flag: bool

    @property
    def nonzero(self) -> Tensor:
        """True where the weight was not zero at first."""
        return nonzero_mask(self._first)

    @property
    def _first(self) -> Tensor:
        """A tensor that has the zeros of the first values, bit for bit."""
        return self.best if self.value is self.stored and self.best is not None else self.stored.detach()

    def keep(self) -> None:
        """Take the trained values, rounded to what is stored, as the best."""
        assert self.best is not None
        rounded = self.value.detach().to(self.stored.dtype, copy=True)
        if self.masked:
            rescue_(rounded, self._first)
            rounded = torch.where(self.nonzero, rounded, self._first)
        self.best.copy_(rounded)


class Weights:
    """The parameters of a region while it is trained, in float32 beside those that are stored (float64 of that)."""

    def __init__(self, region: Region) -> None:
        self.dtype = work_dtype(region.projections[0].weight)
        trained = {(id(module), name): masked for module, name, masked in region.trained()}
        masters: dict[int, nn.Parameter] = {}  # a parameter that two modules share has one

        def master(stored: nn.Parameter) -> nn.Parameter:
            if stored.dtype == self.dtype:
                return stored
            return masters.setdefault(id(stored), nn.Parameter(stored.detach().to(self.dtype)))

        self._values = [
            _Value(
                module,
                name,
                stored,
                master(stored),
                masked := trained.get((id(module), name)),
                None if masked is None else stored.detach().clone(),
                stored.requires_grad,
            )
            for module in region.modules()
            for name, stored in module._parameters.items()
            if stored is not None and stored.is_floating_point()
        ]
        self.trained = [value for value in self._values if value.masked is not None]
        self.kept = False

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Put trainable values in place of the stored ones; these get the best if `kept` is set: a context manager."""
        for value in self._values:
            value.module._parameters[value.name] = value.value
            value.value.requires_grad_(False)
        for value in self.trained:
            value.value.requires_grad_(True)
        try:
            yield
        finally:
            for value in self._values:
                value.module._parameters[value.name] = value.stored
                value.stored.requires_grad_(value.flag)
                if value.best is not None and (self.kept or value.value is value.stored):
                    value.stored.detach().copy_(value.best)

    def count(self) -> int:
        """Return how many values are trained."""
        return sum(int(v.nonzero.sum()) if v.masked else v.value.numel() for v in self.trained)

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero."""
        for value in self.trained:
            if value.masked and value.value.grad is not None:
                value.value.grad.masked_fill_(~value.nonzero, 0)

    def keep(self) -> None:
        """Take the values that there are as the best."""
        for value in self.trained:
            value.keep()

    def load_best(self) -> None:
        """Give the region the best values."""
        for value in self.trained:
            assert value.best is not None
            value.value.detach().copy_(value.best)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens of ‖y − t‖² / (‖t‖² + ε).

    Args:
        output: y (…, d).
        target: t (…, d).
    """
    target = target.to(output)
    norm = target.square().sum(-1)
    floor = (_FLOOR * norm.median()).clamp_min(torch.finfo(norm.dtype).tiny)
    return ((output - target).square().sum(-1) / (norm + floor)).mean()


def fit_block(streams: Streams, index: int, layers: Mapping[str, Projection], options: Reconstruction) -> BlockReport:
    """Reconstruct a pruned block in place.

    Args:
        streams: at the state in which block `index` is next.
        index: of the block.
        layers: {path: projection} of its targets.
        options: how.

    Raises:
        MaskError: zeros would have changed.
    """
    masks = {path: pack_bits(layer.weight) for path, layer in layers.items()}
    regions = find_regions(streams.repaired, index, layers.values(), options.region)
    report = BlockReport(tuple(_fit(streams, index, region, options) for region in regions))
    changed = [path for path, layer in layers.items() if (pack_bits(layer.weight) != masks[path]).any()]
    if changed:
        raise MaskError(f"reconstruction would change the zeros of {some_of(changed)}; this is a fault of spp")
    return report


def _fit(streams: Streams, index: int, region: Region, options: Reconstruction) -> RegionReport:
    started = time.perf_counter()
    weights = Weights(region)
    everything = list(range(len(streams.sizes)))
    train = everything[: len(everything) - streams.held]
    measured = everything[len(train) :] or train
    fused = {id(layer.module): layer.module for layer in region.projections if layer.fused}

    def loss(batch: int) -> Tensor:
        call, target = streams.example(index, batch, region, options.inputs)
        with torch.enable_grad():
            return relative_error(region.output(call, weights.dtype), target)

    def error() -> float:
        with _frozen(weights):
            squares = [float(loss(batch)) * streams.sizes[batch] for batch in measured]
        return math.sqrt(sum(squares) / sum(streams.sizes[batch] for batch in measured))

    with plain_experts(list(fused.values())), weights.training():
        before = after = error()
        steps, note = 0, "rolled back: it has no value to train"
        if weights.count():
            steps, note = _train(weights, loss, error, before, train, options)
        if not note.startswith("rolled back"):
            weights.load_best()
            after = error()  # of the values as they are stored
        weights.kept = after < before
        if not weights.kept:
            after, note = before, note or "rolled back: rounded to what is stored, it is no better"
    return RegionReport(region.path, before, after, weights.count(), steps, time.perf_counter() - started, note)


def _train(
    weights: Weights,
    loss: Callable[[int], Tensor],
    error: Callable[[], float],
    before: float,
    batches: list[int],
    options: Reconstruction,
) -> tuple[int, str]:
    """Train a region, keeping its best values; return the steps that were taken and a note."""
    optimizer = torch.optim.Adam([value.value for value in weights.trained], lr=options.lr, foreach=False)
    generator = torch.Generator().manual_seed(options.seed)
    epochs = options.epochs_of(len(batches))
    total, steps, worse, best, why = epochs * len(batches), 0, 0, before, "the error did not fall"
    every = math.ceil(epochs / _CHECKS)
    for epoch in range(epochs):
        for place in torch.randperm(len(batches), generator=generator).tolist():
            found = loss(batches[place])
            if not math.isfinite(float(found)):
                worse, why = _PATIENCE, f"it diverged in step {steps + 1}"
                break
            found.backward()
            weights.mask_gradients()
            optimizer.param_groups[0]["lr"] = options.lr * _schedule(steps, total)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        if worse < _PATIENCE and (epoch + 1) % every and epoch + 1 < epochs:
            continue
        now = error() if worse < _PATIENCE else math.inf
        worse = 0 if now < best else worse + 1
        if now < best:
            best = now
            weights.keep()
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


@contextlib.contextmanager
def _frozen(weights: Weights) -> Iterator[None]:
    """Compute without a graph: a context manager."""
    for value in weights.trained:
        value.value.requires_grad_(False)
    try:
        yield
    finally:
        for value in weights.trained:
            value.value.requires_grad_(True)
