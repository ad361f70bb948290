"""The values that are trained in a region, while they are trained: its kept weights, or adapters beside frozen ones.

Both give their parameters to one optimizer each, whose step is taken within backward as soon as the gradient is there,
so that the gradients of a region are never in memory together; of several ranks, after it, with the sum of theirs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spp.distributed.sums import add_, device_of_group, members, together
from spp.layers.adapted import HoldsAdapter
from spp.masks.patterns import nonzero_mask
from spp.masks.select import work_dtype
from spp.pruning.regions import Region
from spp.rules import rescue_


class Trained(ABC):
    """Values of a region, and the best of them so far.

    Attributes:
        dtype: that the region computes in.
        kept: whether the best values are to stay when training ends; else those of before come back.
    """

    dtype: torch.dtype
    kept: bool = False

    @abstractmethod
    def parameters(self) -> Sequence[nn.Parameter]:
        """Return what the optimizer trains."""

    @abstractmethod
    def stored(self) -> Sequence[nn.Parameter]:
        """Return what holds the values once training has ended."""

    @abstractmethod
    def training(self) -> contextlib.AbstractContextManager[None]:
        """Have nothing but the parameters trainable, and afterwards the values that `kept` says: a context manager."""

    @abstractmethod
    def count(self) -> int:
        """Return how many values are trained."""

    @abstractmethod
    def keep(self) -> None:
        """Take the values that there are as the best."""

    @abstractmethod
    def load_best(self) -> None:
        """Give the region the best values."""

    @abstractmethod
    def mask_gradient(self, parameter: nn.Parameter) -> None:
        """Set the gradient of values that are not trained to zero."""

    @contextlib.contextmanager
    def stepping(self, lr: float) -> Iterator[Rate]:
        """Yield what takes steps of Adam at a rate that is set: a context manager."""
        optimizers = {one: torch.optim.Adam([one], lr=lr, fused=True) for one in self.parameters()}

        def step(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            self.mask_gradient(parameter)
            optimizer = optimizers[parameter]
            optimizer.param_groups[0]["lr"] = rate.lr
            optimizer.step()
            parameter.grad = None

        def step_of_ranks(loss: Tensor) -> None:
            with together():
                if loss.requires_grad:
                    loss.backward()
            reached = torch.tensor([float(one.grad is not None) for one in optimizers], device=device_of_group())
            for parameter, reaches in zip(optimizers, add_(reached).tolist(), strict=True):
                if reaches:  # a rank's experts may have no token
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    add_(parameter.grad)
                    step(parameter)

        alone = members() == 1
        rate = Rate(lr, torch.Tensor.backward if alone else step_of_ranks)
        hooks = [parameter.register_post_accumulate_grad_hook(step) for parameter in optimizers] if alone else []
        try:
            yield rate
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Compute without a graph: a context manager."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.parameters():
                parameter.requires_grad_(True)


@dataclass
class Rate:
    """The learning rate of the next step, and the function that takes it along the gradient of a loss."""

    lr: float
    step: Callable[[Tensor], None]


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


class Weights(Trained):
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
        self._nonzero = {value.value: value.nonzero for value in self.trained if value.masked}

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return the values that are trained, of 16 bits their masters."""
        return [value.value for value in self.trained]

    def stored(self) -> Sequence[nn.Parameter]:
        """Return the parameters of the region."""
        return [value.stored for value in self.trained]

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
        """Return how many values are trained: of weights, the kept ones."""
        return sum(int(v.nonzero.sum()) if v.masked else v.value.numel() for v in self.trained)

    def mask_gradient(self, parameter: nn.Parameter) -> None:
        """Set the gradient of pruned weights to zero."""
        if parameter in self._nonzero and parameter.grad is not None:
            parameter.grad.mul_(self._nonzero[parameter])  # a fifth of the time of masked_fill_

    def keep(self) -> None:
        """Take the values that there are, rounded to what is stored, as the best."""
        for value in self.trained:
            value.keep()

    def load_best(self) -> None:
        """Give the region the best values."""
        for value in self.trained:
            assert value.best is not None
            value.value.detach().copy_(value.best)


class Adapters(Trained):
    """The adapters of a region's layers, which are in the block; everything else is frozen.

    The region computes in the dtype of its weights, as it will once the adapter is used or merged.
    """

    def __init__(self, region: Region) -> None:
        layers = [module for module in region.modules() if isinstance(module, HoldsAdapter)]
        self.dtype = layers[0].stored_weight.dtype
        self._parameters = [parameter for layer in layers for parameter in layer.adapter_parameters()]
        others = [p for module in region.modules() for p in module.parameters(recurse=False)]
        self._flags = [(parameter, parameter.requires_grad) for parameter in others]
        self._first = [parameter.detach().clone() for parameter in self._parameters]
        self._best = [value.clone() for value in self._first]

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters of the adapters."""
        return self._parameters

    def stored(self) -> Sequence[nn.Parameter]:
        """Return the parameters of the adapters."""
        return self._parameters

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Freeze everything but the adapters, which get the best values, or those of before, at the end."""
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            self._give(self._best if self.kept else self._first)
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)

    def count(self) -> int:
        """Return how many values the adapters have."""
        return sum(parameter.numel() for parameter in self._parameters)

    def mask_gradient(self, parameter: nn.Parameter) -> None:
        """Leave the gradient as it is."""

    def keep(self) -> None:
        """Take the values that there are as the best."""
        for best, parameter in zip(self._best, self._parameters, strict=True):
            best.copy_(parameter.detach())

    def load_best(self) -> None:
        """Give the adapters the best values."""
        self._give(self._best)

    def _give(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.detach().copy_(value)
