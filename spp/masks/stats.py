"""Statistics of a layer's calibration inputs X (T, n): count, mean, variance and norm of each feature, and XᵀX.

    mean_j = Σ_t X_tj / T        var_j = Σ_t (X_tj − mean_j)² / T        norm_j = (Σ_t X_tj²)^½        H = Xᵀ X

Batches are merged pairwise (Chan, Golub, LeVeque 1983): with d = mean_b − mean_a, the summed squared deviations of
both are S_a + S_b + d² T_a T_b / (T_a + T_b), so nothing is lost where the mean is large beside the deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spp.errors import ConfigError, DataError, NonFiniteError

_CHUNK = 1 << 19  # inputs squared together: the temporary stays in a core's cache
_ROWS = 256  # rows of XᵀX in one product, which leaves out the columns to the left of them


@dataclass(frozen=True)
class InputStats:
    """Statistics of a layer's inputs over T calibration tokens.

    Args:
        count: T.
        mean: (n,).
        var: (n,), the population's.
        norm: (n,), ‖X_j‖₂ over the tokens.

    Raises:
        ConfigError: the vectors are not of one length.
        DataError: there is no token.
    """

    count: int
    mean: Tensor
    var: Tensor
    norm: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("mean", "var", "norm")}
        if len(set(shapes.values())) != 1 or self.mean.dim() != 1:
            raise ConfigError(f"mean, var and norm must be vectors of one length (n,); found {shapes}")
        if self.count < 1:
            raise DataError(f"statistics of {self.count} tokens say nothing; at least one is needed")

    @classmethod
    def of(cls, x: Tensor) -> InputStats:
        """Return the statistics of inputs x (…, n).

        Example:
            >>> InputStats.of(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])).var
            tensor([9., 0.])
        """
        gathered = StatsCollector(x.shape[-1], moments=True)
        gathered.add(x)
        return gathered.stats()


class StatsCollector:
    """Gathers the statistics of one input, batch by batch.

    Sums over tokens are in the inputs' precision but at least float32; sums over batches in float64 (XᵀX: float32).

    Args:
        features: n.
        moments: gather mean and variance too (else the statistics hold NaN there).
        hessian: gather XᵀX (n, n) too.
        sample: keep about this many tokens, evenly spread over the first `expected` ones.
        expected: tokens that will come, as far as known.
    """

    def __init__(
        self, features: int, *, moments: bool = False, hessian: bool = False, sample: int = 0, expected: int = 0
    ) -> None:
        self.features = features
        self.count = 0
        self._upper: Tensor | None = None  # XᵀX (n, n) from its blocks on the diagonal to the right
        self._moments = moments
        self._hessian = hessian
        # Odd, so that it shares no factor with the usual window lengths: the sample meets every position alike. First
        # tokens can be larger than all others by orders of magnitude.
        self._stride = max(1, expected // sample) | 1 if sample else 0
        self._rows: list[Tensor] = []
        self._square = torch.zeros((), device="cpu")  # becomes (n,)
        self._mean = torch.zeros((), device="cpu")
        self._deviation = torch.zeros((), device="cpu")

    def add(self, x: Tensor, at: int | None = None) -> None:
        """Take in a batch of inputs x (…, n).

        Args:
            x: the inputs.
            at: how many tokens of the whole come before it, for the sample; None: as many as were taken in.
        """
        x = x.detach().reshape(-1, self.features)  # (T, n)
        tokens = x.shape[0]
        if tokens == 0:
            return
        if self.count == 0:
            self._begin(x.device)
        if self._stride:
            first = -(self.count if at is None else at) % self._stride
            self._rows.append(x[first :: self._stride].clone())
        if x.dtype != torch.float64:
            x = x.float()
        square = _sum_of_squares(x)
        mean = deviation = None
        if self._moments:
            mean = x.mean(dim=0)
            deviation = _sum_of_squares(x - mean)
        if self._hessian:
            if self._upper is None:
                self._upper = torch.zeros(self.features, self.features, dtype=x.dtype, device=x.device)
            for first in range(0, self.features, _ROWS):
                self._upper[first : first + _ROWS, first:].addmm_(x[:, first : first + _ROWS].T, x[:, first:])
        self._merge(tokens, square, mean, deviation)

    def _begin(self, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self._square = torch.zeros(self.features, dtype=exact, device=device)
        self._mean, self._deviation = self._square.clone(), self._square.clone()

    def _merge(self, tokens: int, square: Tensor, mean: Tensor | None, deviation: Tensor | None) -> None:
        """Take in the sums of a batch, (n,) each."""
        self._square += square.to(self._square.dtype)
        if mean is not None and deviation is not None:
            shift = mean.to(self._square.dtype) - self._mean
            total = self.count + tokens
            self._deviation += deviation.to(self._square.dtype) + shift.square() * (self.count * tokens / total)
            self._mean += shift * (tokens / total)
        self.count += tokens

    def seen(self) -> tuple[int, int, torch.dtype | None]:
        """Return the tokens that came, those in the sample, and their dtype where that is known."""
        dtype = self._rows[0].dtype if self._rows else None if self._upper is None else self._upper.dtype
        return self.count, sum(len(rows) for rows in self._rows), dtype

    def sum_over(
        self,
        seen: Sequence[tuple[int, int, torch.dtype | None]],
        place: int,
        device: torch.device,
        add_: Callable[[Tensor], Tensor],
    ) -> None:
        """Take in what collectors of the same input on other ranks have seen; all of them call it at once.

        Args:
            seen: of each of them, in their order.
            place: of this one among them.
            device: of the inputs.
            add_: sums a tensor over them in place.
        """
        counts = [count for count, _, _ in seen]
        if sum(counts) == 0:
            return
        if self.count == 0:
            self._begin(device)
        sums = torch.zeros(len(seen), 3, self.features, dtype=self._square.dtype, device=device)
        sums[place] = torch.stack([self._square, self._mean, self._deviation])
        add_(sums)
        self.count = 0
        self._begin(device)
        for count, (square, mean, deviation) in zip(counts, sums.unbind(), strict=True):
            if count:
                moments = (mean, deviation) if self._moments else (None, None)
                self._merge(count, square, *moments)
        dtype = next((dtype for _, _, dtype in seen if dtype is not None), torch.float32)
        if self._hessian:
            if self._upper is None:
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                self._upper = torch.zeros(self.features, self.features, dtype=wide, device=device)
            add_(self._upper)
        if self._stride:
            sizes = [size for _, size, _ in seen]
            rows = torch.zeros(sum(sizes), self.features, dtype=dtype, device=device)
            if self._rows:
                rows[sum(sizes[:place]) : sum(sizes[: place + 1])] = torch.cat(self._rows)
            self._rows = [add_(rows)]

    def hessian(self) -> Tensor | None:
        """Return XᵀX (n, n) of the inputs so far, not a copy; None where it is not gathered or no token came."""
        if self._upper is not None:
            for first in range(0, self.features, _ROWS):
                last = first + _ROWS
                self._upper[last:, first:last] = self._upper[first:last, last:].T
        return self._upper

    def stats(self) -> InputStats:
        """Return the statistics so far.

        Raises:
            DataError: no token came.
            NonFiniteError: NaN or infinity came.
        """
        if self.count == 0:
            raise DataError("no calibration token reached this layer")
        norm = self._square.sqrt().float()
        if not torch.isfinite(norm).all():
            bad = int((~torch.isfinite(norm)).sum())
            raise NonFiniteError(f"inputs hold NaN or infinity in {bad} of {self.features} features")
        if self._moments:
            mean, var = self._mean.float(), (self._deviation / self.count).float()
        else:
            mean = var = torch.full_like(norm, torch.nan)
        return InputStats(self.count, mean, var, norm)

    def sample(self) -> Tensor:
        """Return the sampled inputs (about `sample`, n), in the dtype that came."""
        return torch.cat(self._rows) if self._rows else torch.empty(0, self.features, device="cpu")


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return Σ_t x_tj² (n,); summing a temporary by columns is several times faster than a norm along them."""
    step = max(1, _CHUNK // max(1, x.shape[1]))
    return torch.stack([part.square().sum(dim=0) for part in x.split(step)]).sum(dim=0)
