"""Statistics of the inputs of a block's layers, gathered by hooks while the block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.pruning import Method
from spp.distributed.sums import add_, gathered, members, place, together
from spp.errors import NonFiniteError, TargetError, arg
from spp.masks.stats import StatsCollector
from spp.models.expert_products import ExpertProducts, plain_experts
from spp.models.projection import Projection
from spp.pruning.blocks import BlockRunner, Reached
from spp.pruning.layer import LayerInputs

_SAMPLED = 512  # inputs kept to measure an output error on (SmolLM2, two blocks: 2 % off on average, 21 % at worst)


class _NotSharedError(Exception):
    """Two layers read one tensor in some calls and different ones in others."""


def gather_inputs(
    runner: BlockRunner,
    index: int,
    layers: Mapping[str, Projection],
    method: Method,
    windows: Tensor,
    *,
    keep: bool = False,
) -> dict[str, list[LayerInputs]]:
    """Run block `index` over all batches and return what each matrix of its layers reads.

    Layers that read one tensor share an entry; a fused weight has one entry an expert, of the tokens routed to it.
    Each rank runs its share of the windows, and all return the statistics of all windows.

    Args:
        runner: at the state in which block `index` is next.
        index: of the block.
        layers: {path: projection} in the block.
        method: what says which statistics are needed.
        windows: token ids (k, L).
        keep: take the block's outputs as the inputs of the next one, in the same run.

    Raises:
        NonFiniteError: a layer's inputs hold NaN or infinity.
    """

    def gather(*, share: bool) -> dict[str, Sequence[StatsCollector]]:
        hooks = _Hooks(layers, method, windows, runner.places, share=share, whole=keep)
        with together(), hooks.installed():
            for _ in runner.run(index, keep=keep):
                hooks.end_batch()
        return _summed(hooks.collectors, layers)

    try:  # a run that keeps its outputs cannot be repeated, so it does not count on inputs being shared
        collectors = gather(share=not keep)
    except _NotSharedError:
        collectors = gather(share=False)
    shared = {id(c): LayerInputs(c, len(windows)) for several in collectors.values() for c in several}
    for path, several in collectors.items():
        for number, collector in enumerate(several):
            _require_finite(collector, path if len(several) == 1 else f"{path}[{number}]")
    return {path: [shared[id(collector)] for collector in several] for path, several in collectors.items()}


def _summed(
    collectors: dict[str, Sequence[StatsCollector]], layers: Mapping[str, Projection]
) -> dict[str, Sequence[StatsCollector]]:
    """Return the collectors with what those of all ranks have seen."""
    if members() == 1:
        return collectors
    first = {id(several[0]): path for path, several in reversed(collectors.items())}
    ran = any(collector.count for several in collectors.values() for collector in several)
    shared = [
        found for found in gathered({p: first[id(c[0])] for p, c in collectors.items()} if ran else None) if found
    ]
    if any(found != shared[0] for found in shared):
        raise _NotSharedError
    leaders = shared[0] if shared else {path: path for path in collectors}
    collectors = {path: collectors[leaders[path]] for path in layers}  # a rank without windows saw nothing shared
    own = {id(c): (c, layers[path].weight.device) for path, several in collectors.items() for c in several}
    seen = gathered([collector.seen() for collector, _ in own.values()])
    for (collector, device), of_ranks in zip(own.values(), zip(*seen, strict=True), strict=True):
        collector.sum_over(of_ranks, place(), device, add_)
    return collectors


def _require_finite(collector: StatsCollector, where: str) -> None:
    try:
        if collector.count:
            collector.stats()
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{where}: its {error.marked}",
            remedy=f"load the model in a wider dtype, such as {arg('dtype', torch.float32)}, and check the calibration "
            f"data",
        ) from None


class _Hooks:
    """Forward pre-hooks on the layers of a block; `whole` runs it to its end, else only as far as there is to read."""

    def __init__(
        self,
        layers: Mapping[str, Projection],
        method: Method,
        windows: Tensor,
        places: Sequence[int],
        *,
        share: bool,
        whole: bool,
    ) -> None:
        self.collectors: dict[str, Sequence[StatsCollector]] = {}
        self._layers = {path: layer for path, layer in layers.items() if not layer.fused}
        self._fused = {path: layer for path, layer in layers.items() if layer.fused}
        self._method = method
        self._windows = windows
        self._places = iter(places if members() > 1 else ())
        self._at = next(self._places, None)  # tokens before this batch, where other ranks run some of them
        self._share = share
        self._whole = whole or bool(self._fused)
        self._first_batch = True
        self._calls: list[str] = []  # paths in the order of the first batch's calls
        self._last: str | None = None  # the layer after which a block has nothing left to tell
        self._leader: dict[str, str] = {}  # {path: the path of the layer that reads the same tensor first}
        self._seen: dict[str, tuple[Tensor, int]] = {}  # {leader: what it read in this batch, as of which change}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Install the hooks: a context manager."""
        for path, layer in self._fused.items():
            self.collectors[path] = [self._collector(layer) for _ in range(layer.weight.shape[0])]
        handles = [
            layer.module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path, layer in self._layers.items()
        ]
        try:
            with routed_inputs(self._fused, self._read_routed):
                yield
        finally:
            for handle in handles:
                handle.remove()
        for path, layer in self._layers.items():
            if path not in self.collectors:  # never called
                self.collectors[path] = [self._collector(layer)]

    def end_batch(self) -> None:
        """Note that a batch has run; after the first, which layer is called last."""
        if self._first_batch and not self._whole and sorted(self._calls) == sorted(self._layers):
            self._last = self._calls[-1]
        self._first_batch = False
        self._at = next(self._places, None)
        self._seen.clear()

    def _hook(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._read(path, args[0] if args else next(iter(kwargs.values())))
            if path == self._last:
                raise Reached

        return hook

    def _read_routed(self, path: str, expert: int, x: Tensor) -> None:
        self.collectors[path][expert].add(x)

    def _read(self, path: str, x: Tensor) -> None:
        if self._first_batch:
            self._calls.append(path)
        if path not in self._leader:
            self._leader[path] = next(filter(lambda leader: self._reads_same(leader, x), self._seen), path)
            if self._leader[path] != path:
                self.collectors[path] = self.collectors[self._leader[path]]
            else:
                self.collectors[path] = [self._collector(self._layers[path])]
        leader = self._leader[path]
        if leader != path:
            if not self._reads_same(leader, x):
                raise _NotSharedError
            return
        self._seen[path] = x, _changes(x)
        self.collectors[path][0].add(x, self._at)

    def _reads_same(self, leader: str, x: Tensor) -> bool:
        """Whether x is the tensor that a leader read in this batch, and was not changed in place since."""
        seen, changes = self._seen.get(leader, (None, 0))
        return self._share and seen is x and changes == _changes(x)

    def _collector(self, layer: Projection) -> StatsCollector:
        hessian = self._method.hessian
        return StatsCollector(
            layer.in_features,
            moments=self._method.refined,
            hessian=hessian,
            sample=0 if hessian else _SAMPLED,
            expected=self._windows.numel(),
        )


def _changes(x: Tensor) -> int:
    """Return how many times a tensor was changed in place, as far as it is counted."""
    return 0 if x.is_inference() else x._version


# ---- The inputs of fused expert weights: what each expert's matrix is multiplied with, seen at the product itself.


@contextlib.contextmanager
def routed_inputs(projections: Mapping[str, Projection], read: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Call `read(path, expert, x)` for every product of inputs x (…, n) with an expert's matrix.

    Args:
        projections: the fused weights by path.
        read: called as read(path, expert, x).

    Raises:
        TargetError: experts ran, and no product with their weights was seen.
    """
    paths = list(projections)
    called: set[str] = set()
    seen: set[str] = set()

    def multiply(index: int, expert: int, x: Tensor, padded: bool) -> None:
        seen.add(paths[index])
        read(paths[index], expert, x[x.any(dim=1)] if padded else x)

    def noting(path: str) -> Callable[..., None]:
        return lambda *_: called.add(path)

    if not projections:
        yield
        return
    hooks: list[Any] = [p.module.register_forward_pre_hook(noting(path)) for path, p in projections.items()]
    try:
        with (
            plain_experts([p.module for p in projections.values()]),
            ExpertProducts(list(projections.values()), multiply),
        ):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    unseen = sorted(called - seen)
    if unseen:
        raise TargetError(
            f"{unseen[0]}: its experts ran, but not through a product with their matrices that can be followed; "
            f"leave it out with {arg('exclude_modules')}, or use {arg('method', 'magnitude')} for it"
        )
