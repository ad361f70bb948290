"""Rule, the base class of all rules.

A rule turns W (m, n), frozen, and its parameters θ into W_eff (m, n), zero wherever W is zero. The three-product
function needs two things of it: `build`, a block of W_eff, and `reduce`, what the same block of G = dYᵀ X adds to the
gradients of θ. A block is a range of rows and a range of columns; it is what keeps anything of size m × n from being
held.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.errors import AdapterError, ConfigError, arg

KAIMING_A = math.sqrt(5)  # U(−1/√n, 1/√n), as nn.Linear and the paper initialise
Params = Sequence[Tensor]  # θ, in the rule's order
Grads = Sequence[Tensor | None]  # dθ; None for a parameter whose gradient is not wanted


class Rule(ABC):
    """The arithmetic of one mask-preserving adapter; stateless."""

    name: ClassVar[str]
    parameter_names: ClassVar[tuple[str, ...]]  # short; a layer's attribute is "<rule>_<name>"
    multiplies: ClassVar[bool] = True  # W_eff is W · (1 + u), with a u that does not hang on W

    def attribute_names(self) -> tuple[str, ...]:
        """Return the names of the parameters on a layer and in files, such as ("spp_alpha", "spp_beta")."""
        return tuple(f"{self.name}_{name}" for name in self.parameter_names)

    @abstractmethod
    def shapes(self, out_features: int, in_features: int, r: int) -> tuple[tuple[int, int], ...]:
        """Return the shape of each parameter, in the order of `parameter_names`."""

    def rank(self, params: Params) -> int:
        """Return r, read off the parameters' shapes: the rows of the first."""
        return params[0].shape[0]

    @abstractmethod
    def largest_rank(self, out_features: int, in_features: int) -> int:
        """Return the largest r that fits a layer; 1 is the smallest."""

    def check_rank(
        self, out_features: int, in_features: int, r: int, where: str, remedy: str = f"lower {arg('r')}"
    ) -> None:
        """Raise a ConfigError that names `where`, and says what to do, unless r fits the layer."""
        most = self.largest_rank(out_features, in_features)
        if not 1 <= r <= most:
            whose = f"its {most} rows" if self.largest_rank(out_features, 0) else f"{most}"  # rows alone count
            raise ConfigError(
                f"{where}: r = {r} does not fit a weight of shape ({out_features}, {in_features}): r must be between "
                f"1 and {whose}",
                option="r",
                remedy=remedy,
            )

    def init_(self, params: Params, generator: torch.Generator | None) -> None:
        """Fill the parameters in place: the first is drawn, the other zeros; `generator` None is torch's global one."""
        first, second = params
        torch.nn.init.kaiming_uniform_(first, a=KAIMING_A, generator=generator)
        torch.nn.init.zeros_(second)

    @abstractmethod
    def prepare(self, params: Params, scaling: float, out_features: int, dtype: torch.dtype) -> Any:
        """Return what `build`, `delta`, `reduce` share for one call: small tensors in `dtype`, none of size m × n."""

    @abstractmethod
    def build(self, weight: Tensor, factors: Any, rows: slice, cols: slice, out: Tensor) -> None:
        """Write W_eff[rows, cols], not yet rounded to the base's dtype, into `out`.

        Args:
            weight: W[rows, cols] in any dtype.
            factors: from `prepare`.
            rows, cols: the block's place in the layer.
            out: (rows, cols) of the arithmetic's dtype, contiguous.
        """

    @abstractmethod
    def delta(self, weight: Tensor, factors: Any, rows: slice, cols: slice, out: Tensor) -> None:
        """Write (W_eff − W)[rows, cols], not rounded, into `out`; arguments as in `build`."""

    @abstractmethod
    def empty_grads(self, factors: Any, needed: Sequence[bool]) -> list[Tensor | None]:
        """Return one uninitialised tensor per parameter in the arithmetic's dtype; None where it is not needed."""

    @abstractmethod
    def reduce(
        self,
        weight: Tensor,
        factors: Any,
        rows: slice,
        cols: slice,
        gradient: Tensor,
        grads: Grads,
        *,
        accumulate: bool,
    ) -> None:
        """Write the block's part of the parameters' gradients into `grads`; `gradient` (G[rows, cols]) is overwritten.

        Args:
            weight, factors, rows, cols: as in `build`.
            gradient: G[rows, cols] in the arithmetic's dtype, contiguous.
            grads: as from `empty_grads`; None for a parameter whose gradient is not wanted.
            accumulate: add to what is there; False writes over it.
        """

    @abstractmethod
    def largest_factor(self, factors: Any) -> float:
        """Return an upper bound of |W_eff / W − 1| over the layer: it tells cheaply that nothing can round to zero."""

    def bound(self, factors: Any) -> float:
        """Return an upper bound of |W_eff − W| that does not hang on W, for a rule that adds; inf if there is none."""
        return math.inf

    def rows_at_once(self, block: Tensor) -> int:
        """Return how many rows of a block are built, rounded and looked at before the next ones: by default all."""
        return max(1, len(block))

    def keeps_all(self, weight: Tensor, result: Tensor) -> bool:
        """Return whether it is plain at little cost that no kept weight of W has come out as zero; False if unknown."""
        return False

    @abstractmethod
    def is_idle(self, params: Params, scaling: float) -> bool:
        """Return whether the parameters alone, of a matrix or of experts, say that W_eff is W."""

    def dropped_params(self, count: int) -> Sequence[int]:
        """Return which of `count` parameters the dropout mode "alpha" drops entries of: the first."""
        return (0,)

    def row_alignment(self, factors: Any) -> int:
        """Return the number of rows that a block's ends should be a multiple of, for `build` to be fastest."""
        return 1

    @abstractmethod
    def change(self, weight: Tensor, params: Params) -> Tensor:
        """Return (W_eff − W) / s (m, n) as the paper writes it, differentiably, in the arguments' dtype."""

    def oracle(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, mask: Tensor | None
    ) -> Tensor:
        """Compute the layer as the paper writes it, with separate branches, differentiably, in the arguments' dtype.

        Args:
            x: (…, n); mask: None, or what input dropout multiplies x by, in the shape of x.
        """
        branch = x if mask is None else x * mask
        return F.linear(x, weight, bias) + scaling * F.linear(branch, self.change(weight, params))

    def check_shapes(self, params: Params, out_features: int, in_features: int, where: str) -> None:
        """Raise an AdapterError unless the parameters fit a layer of out_features × in_features."""
        r = self.rank(params)
        expected = self.shapes(out_features, in_features, r)
        found = tuple(tuple(p.shape) for p in params)
        if found != expected:
            listing = ", ".join(
                f"{name} is {tuple(f)}, expected {e}"
                for name, f, e in zip(self.parameter_names, found, expected, strict=True)
            )
            raise AdapterError(f"{where}: weight is ({out_features}, {in_features}), but {listing} at r = {r}")
        self.check_rank(out_features, in_features, r, where)
