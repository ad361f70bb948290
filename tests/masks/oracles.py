"""The pruners' algorithms written out one weight at a time: slow, literal, and sharing no code with spp."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def wanda_oracle(
    weight: Tensor,
    norm: Tensor,
    *,
    nm: tuple[int, int] | None = None,
    fraction: float = 0.0,
    keep_zeros: bool = False,
) -> Tensor:
    """Score |W_ij| ‖X_j‖; drop the lowest of each row or group; of equals the higher index goes first.

    With keep_zeros the zeros of W go before all others, and all of them go.
    """
    m, n = weight.shape
    mask = torch.ones(m, n, dtype=torch.bool)
    for i in range(m):
        spans = [range(n)] if nm is None else [range(g, g + nm[1]) for g in range(0, n, nm[1])]
        for span in spans:
            drop = int(Fraction(str(fraction)) * n) if nm is None else nm[1] - nm[0]
            zeros = {j for j in span if keep_zeros and float(weight[i, j]) == 0}
            order = sorted(span, key=lambda j: (j not in zeros, abs(float(weight[i, j])) * float(norm[j]), -j))
            for j in order[: max(drop, len(zeros))]:
                mask[i, j] = False
    return mask


def sparsegpt_oracle(
    weight: Tensor,
    hessian: Tensor,
    *,
    nm: tuple[int, int] | None = None,
    fraction: float = 0.0,
    damping: float = 0.01,
    block_size: int = 128,
    dtype: torch.dtype = torch.float64,
    keep_zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper: inverse Hessian by Cholesky, blocks, one column after another, errors pushed right.

    With keep_zeros the zeros of W go before all others, and all of them go, whatever the updates have made of them.
    """
    w = weight.detach().to(dtype).clone()
    h = hessian.to(dtype).clone()
    m, n = w.shape
    zeros = {(i, j) for i in range(m) for j in range(n) if keep_zeros and float(w[i, j]) == 0}
    for j in range(n):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    added = damping * torch.mean(torch.diag(h))
    for j in range(n):
        h[j, j] += added
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.ones(m, n, dtype=torch.bool)
    for first in range(0, n, block_size):
        last = min(n, first + block_size)
        errors = torch.zeros(m, last - first, dtype=dtype)
        if nm is None:
            entries = [
                ((i, j) not in zeros, float((w[i, j] / upper[j, j]) ** 2), -i, -j)
                for i in range(m)
                for j in range(first, last)
            ]
            drop = max(int(Fraction(str(fraction)) * len(entries)), sum(not entry[0] for entry in entries))
            for _, _, i, j in sorted(entries)[:drop]:
                mask[-i, -j] = False
        for j in range(first, last):
            if nm is not None and j % nm[1] == 0:
                for i in range(m):
                    scored = sorted(
                        ((i, k) not in zeros, float((w[i, k] / upper[k, k]) ** 2), -k) for k in range(j, j + nm[1])
                    )
                    for _, _, k in scored[: max(nm[1] - nm[0], sum(not entry[0] for entry in scored))]:
                        mask[i, -k] = False
            new = torch.where(mask[:, j], w[:, j], torch.zeros((), dtype=dtype))
            errors[:, j - first] = (w[:, j] - new) / upper[j, j]
            for k in range(j + 1, last):
                w[:, k] -= errors[:, j - first] * upper[j, k]
            w[:, j] = new
        w[:, last:] -= errors @ upper[first:last, last:]
    return w, mask


def dsnot_oracle(
    weight: Tensor,
    mask: Tensor,
    inputs: Tensor,
    *,
    group: int | None = None,
    max_cycles: int = 50,
    threshold: float = 0.1,
) -> Tensor:
    """Algorithm 1 of the paper, row by row, cycle by cycle; for N:M an exchange stays inside one group."""
    x = inputs.double()
    mean, var, norm = x.mean(0), x.var(0, unbiased=False), x.norm(dim=0)
    out = mask.clone()
    for i in range(weight.shape[0]):
        w = weight[i].double()
        kept = {j for j in range(len(w)) if mask[i, j]}
        error = sum(float(w[j] * mean[j]) for j in range(len(w)) if j not in kept)
        sign = math.copysign(1, error) if error else 0
        passed: set[int] = set()
        cycle = 0
        while cycle < max_cycles and abs(error) > threshold:
            growing = [j for j in range(len(w)) if j not in kept | passed and sign * float(w[j] * mean[j]) > 0]
            if not growing:
                break
            grow = max(growing, key=lambda j: sign * float(w[j] * mean[j] / var[j]))
            pruning = [
                j
                for j in sorted(kept)
                if sign * float(w[j] * mean[j]) < 0 and (group is None or j // group == grow // group)
            ]
            if not pruning:
                if group is None:
                    break
                passed.add(grow)
                continue
            prune = min(pruning, key=lambda j: abs(float(w[j])) * float(norm[j]))
            after = error - float(w[grow] * mean[grow]) + float(w[prune] * mean[prune])
            if after * sign <= 0:
                break
            kept = kept - {prune} | {grow}
            error = after
            cycle += 1
        out[i] = torch.tensor([j in kept for j in range(len(w))])
    return out
