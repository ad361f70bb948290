"""Random inputs of one adapted layer, and the same layer by the plain formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spp.functional import spp_linear_reference

SHAPES = [  # (m, n, r, leading dimensions): primes, ragged blocks, one row, r = 1, r = m, more dimensions, none, empty
    (12, 8, 4, (5,)),
    (13, 7, 5, (3,)),
    (5, 3, 2, (2, 4)),
    (1, 3, 1, (2,)),
    (7, 7, 7, (4,)),
    (6, 5, 1, (2, 1, 3)),
    (48, 32, 16, (9,)),
    (31, 64, 16, ()),
    (8, 4, 2, (0,)),
    (8, 4, 2, (2, 0)),
]


@dataclass
class Case:
    """One layer's tensors; x, bias, alpha and beta require gradients."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    alpha: Tensor
    beta: Tensor
    dy: Tensor
    scaling: float = 2.0

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.x, self.bias, self.alpha, self.beta) if t is not None]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers with everything in `dtype`, detached."""

        def convert(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        bias = None if self.bias is None else convert(self.bias)
        return Case(
            convert(self.x),
            convert(self.weight),
            bias,
            convert(self.alpha),
            convert(self.beta),
            convert(self.dy),
            self.scaling,
        )

    def reference(self, mask: Tensor | None = None) -> Tensor:
        return spp_linear_reference(self.x, self.weight, self.bias, self.alpha, self.beta, self.scaling, mask)


def make_case(
    m: int,
    n: int,
    r: int,
    leading: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """Weights half zero; α and β in float32 (float64 for float64), large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    small = torch.float64 if dtype == torch.float64 else torch.float32
    weight = draw(m, n) * (torch.rand(m, n, generator=generator) > 0.5)
    return Case(
        x=draw(*leading, n).to(dtype).requires_grad_(),
        weight=weight.to(dtype),
        bias=draw(m).to(dtype).requires_grad_() if bias else None,
        alpha=(0.5 * draw(r, n)).to(small).requires_grad_(),
        beta=(0.5 * draw(m, 1)).to(small).requires_grad_(),
        dy=draw(*leading, m).to(dtype),
    )
