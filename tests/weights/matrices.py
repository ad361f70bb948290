"""Pruned matrices of every kind, and their bits."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["1:2", "2:4", "1:4", "4:8", "2:8", "1:8", "8:16", "4:16", "2:16", "1:16", "4:32", "2:32", "1:32"]


def nm_matrix(m: int, n: int, pattern: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Exactly N of every M kept, at random places."""
    kept, group = (int(x) for x in pattern.split(":"))
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(m, n // group, group, generator=generator).argsort(-1)
    return _values(m, n, dtype, generator) * (order < kept).view(m, n).to(dtype)


def free_matrix(m: int, n: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Kept at random, each with probability `density`."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(m, n, generator=generator) < density
    return _values(m, n, dtype, generator) * keep.to(dtype)


def without_signs_of_zeros(weight: Tensor) -> Tensor:
    """The same with every −0.0 as 0.0: what packing is exact about."""
    return weight + 0.0


def _values(m: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)
    return torch.where(values == 0, torch.ones_like(values), values)
