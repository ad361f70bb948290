"""SparseGPT: one-shot pruning with weight update (Frantar & Alistarh, ICML 2023, arXiv 2301.00774, §3 and algorithm 1).

    H = Xᵀ X + λ I        H⁻¹ = Uᵀ U, U upper triangular        score_ij = (W_ij / U_jj)²

Columns are pruned from left to right. Of column j the chosen rows are set to zero, and their error is made good by the
columns to the right, along the row of U:

    E_:j = W_:j ⊙ pruned_:j / U_jj        W_:k ← W_:k − E_:j U_jk    for k > j

W (m, n) is the weight, X (T, n) its calibration inputs, λ = damping · mean(diag XᵀX). What is pruned is chosen from
the weights as updated so far: for N:M at the first column of each group, all but the N highest of each row;
unstructured at the first of every `block_size` columns, the ⌊p·k⌋ lowest of the block's k entries. A dead feature
(H_jj = 0) gets H_jj = 1 and W_:j = 0, unless nothing is to be pruned.

The updates fill zeros that W has. Where these are to be kept they are chosen first, as if their scores were below all
others, and more of them than the pattern asks for are chosen too: what a zero has become by the time its column comes
is its error, which is made good like any other.

U needs no inverse of H: with J the exchange matrix and J H J = L Lᵀ (Cholesky), U = (J L J)⁻¹. Updates are delayed,
first to the end of a few columns, then to the end of the block, so that nearly all work is in matrix products.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError
from spp.masks.patterns import Pattern, all_finite
from spp.masks.select import (
    checked_pattern,
    keep_of_all,
    keep_slots,
    pruned_count,
    rank_last,
    work_dtype,
    zeros_to_keep,
)

logger = logging.getLogger(__name__)

_RAISE = 10.0  # damping grows by this factor until the Hessian is positive definite
_SMALLEST_RAISED = 1e-6
_LARGEST_DAMPING = 1e4  # no matrix of the form XᵀX needs as much
_COLUMNS = 16  # columns whose updates stay among themselves before they reach the rest of the block


@dataclass(frozen=True)
class InverseFactor:
    """U of H⁻¹ = UᵀU, shared by all layers that read the same input.

    Args:
        upper: (n, n), float32 or float64.
        dead: (n,) bool, features that never were other than zero.
        damping: the damping that was needed, relative to the mean of H's diagonal.
        raised: whether that is more than was asked for.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    raised: bool


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: str | float | Pattern,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    keep_zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Prune a weight and update what stays so that the layer's outputs change least.

    Args:
        weight: (m, n); not changed.
        hessian: (n, n), XᵀX of the layer's inputs, undamped. The authors scale it by 2 / windows, and with dead
            features, whose diagonal counts as 1, the scale matters.
        pattern: "N:M" (kept of every M inputs), or the fraction pruned of each block of columns.
        damping: λ as a share of the mean of H's diagonal; raised tenfold, with a warning in the log, until H is
            positive definite.
        block_size: columns of a block, rounded to whole groups of an N:M pattern.
        keep_zeros: zeros of the weight stay zeros and count as pruned: a group keeps at most N, and a block that has
            more of them than it is to lose loses nothing else. By default the published algorithm, which fills them.

    Returns:
        The updated weight (m, n) in its dtype, zero where it is pruned, and the mask, bool (m, n), True = kept.

    Raises:
        PatternError: the pattern makes no sense or does not divide n.
        ConfigError: an option or a shape makes no sense, or the Hessian is no XᵀX.
        NonFiniteError: the weight, the Hessian or the result holds NaN or infinity.

    Example:
        >>> x = torch.randn(64, 8)
        >>> w, mask = sparsegpt(torch.randn(4, 8), x.T @ x, "2:4")
        >>> int(mask.sum())
        16
    """
    parsed = checked_pattern(weight, pattern)
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ConfigError(f"the Hessian is {tuple(hessian.shape)}; the weight needs {(weight.shape[1],) * 2}")
    factor = inverse_factor(hessian.to(weight.device, work_dtype(weight)), damping)
    zeros = zeros_to_keep(weight, keep_zeros)
    return sparsegpt_factored(weight, factor, parsed, block_size=block_size, zeros=zeros)


def inverse_factor(hessian: Tensor, damping: float = 0.01, where: str = "the Hessian") -> InverseFactor:
    """Return U of (H + λI)⁻¹ = UᵀU: in H's precision if that works, else in float64, with more damping if need be.

    Args:
        hessian: (n, n) float32 or float64, XᵀX undamped.
        damping: λ as a share of the mean of H's diagonal.
        where: what the log and the errors call it.

    Raises:
        ConfigError: the damping makes no sense, or no damping helps.
        NonFiniteError: the Hessian holds NaN or infinity.
    """
    check_damping(damping)
    if not all_finite(hessian):
        raise NonFiniteError(f"{where} holds NaN or infinity")
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    diagonal[dead] = 1
    scale = diagonal.mean()
    needed, dtype = damping, hessian.dtype
    while True:
        upper = _upper_of_inverse(hessian.to(dtype), diagonal.to(dtype) + needed * scale.to(dtype))
        if upper is not None:
            break
        if dtype != torch.float64 and hessian.device.type != "mps":
            dtype = torch.float64
            continue
        needed = max(needed * _RAISE, _SMALLEST_RAISED)
        if needed > _LARGEST_DAMPING:
            raise ConfigError(f"{where} is not positive definite whatever the damping; it must be a sum of xᵀx")
    if needed != damping:
        logger.warning("%s is not positive definite: damping raised from %g to %g", where, damping, needed)
    return InverseFactor(upper.to(hessian.dtype), dead, needed, raised=needed != damping)


def check_damping(damping: float) -> None:
    """Raise a ConfigError where a damping makes no sense."""
    if not math.isfinite(damping) or damping < 0:
        raise ConfigError(f"damping is {damping!r}; it must be a finite number of at least 0 (0.01 is usual)")


def _upper_of_inverse(hessian: Tensor, diagonal: Tensor) -> Tensor | None:
    """Return U (n, n), or None where the matrix is not positive definite in this precision."""
    turned = hessian.flip(0, 1)  # J H J, a copy
    turned.diagonal().copy_(diagonal.flip(0))
    lower, failed = torch.linalg.cholesky_ex(turned)
    if int(failed):
        return None
    one = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
    return upper if all_finite(upper) else None


@torch.no_grad()
def sparsegpt_factored(
    weight: Tensor, factor: InverseFactor, pattern: Pattern, *, block_size: int = 128, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sparsegpt` with the factor of its Hessian at hand, and the zeros that are to be kept, bool (m, n)."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ConfigError(f"block_size is {block_size!r}; it must be an int of at least 1")
    m, n = weight.shape
    if pattern.sparsity == 0:
        return weight.detach().clone(), torch.ones(m, n, dtype=torch.bool, device=weight.device)
    group = pattern.group or 1
    block = max(group, block_size // group * group)
    step = max(group, _COLUMNS // group * group)
    zeros = None if zeros is None else zeros.T.contiguous()  # (n, m)
    if zeros is not None and _has_pattern(zeros, pattern, block):
        return weight.detach().clone(), (~zeros).T.contiguous()
    upper, scale = factor.upper, factor.upper.diagonal()[:, None].contiguous()  # (n, n), (n, 1)
    w = weight.detach().to(upper.dtype).T.contiguous()  # (n, m): a column of W is a contiguous row
    w[factor.dead] = 0
    kept = torch.empty(n, m, dtype=torch.bool, device=w.device)
    pruned = torch.empty(min(block, n), m, dtype=w.dtype, device=w.device)  # 1 / U_jj where pruned, else 0
    error = torch.empty_like(pruned)
    for first in range(0, n, block):
        last = min(first + block, n)
        if not pattern.is_nm:
            _choose(w, scale, pattern, zeros, slice(first, last), kept)
            torch.div(~kept[first:last], scale[first:last], out=pruned[: last - first])
        for start in range(first, last, step):
            stop = min(start + step, last)
            for j in range(start, stop):
                if pattern.kept is not None and j % group == 0:
                    these = slice(j, j + group)
                    _choose(w, scale, pattern, zeros, these, kept)
                    torch.div(~kept[these], scale[these], out=pruned[j - first : j - first + group])
                e = torch.mul(w[j], pruned[j - first], out=error[j - first])
                w[j + 1 : stop].addr_(upper[j, j + 1 : stop], e, alpha=-1)
            done = error[start - first : stop - first]  # (≤ step, m)
            w[stop:last].addmm_(upper[start:stop, stop:last].T, done, alpha=-1)
        w[first:last].masked_fill_(~kept[first:last], 0)
        w[last:].addmm_(upper[first:last, last:].T, error[: last - first], alpha=-1)
    result = w.T.to(weight.dtype, memory_format=torch.contiguous_format)
    if not all_finite(result):
        remedy = "give more damping, or prune in float32"
        raise NonFiniteError(f"the updated weight does not fit {weight.dtype}; {remedy}")
    return result, kept.T.contiguous()


def _choose(w: Tensor, scale: Tensor, pattern: Pattern, zeros: Tensor | None, columns: slice, kept: Tensor) -> None:
    """Write into rows `columns` of `kept` (n, m) which weights of a group, or of a block, are kept.

    Args:
        w: (n, m), as updated so far.
        scale: (n, 1), U_jj.
        zeros: bool (n, m), what goes before all others and is never kept.
    """
    scores = (w[columns] / scale[columns]).square_()
    if zeros is not None:
        rank_last(scores, zeros[columns])
    if pattern.kept is not None:
        keep_slots(scores, pattern.kept, out=kept[columns])
    else:  # of equals the lower row, then column
        kept[columns] = keep_of_all(scores.T, pruned_count(pattern.sparsity, scores.numel())).T
    if zeros is not None:
        kept[columns].logical_and_(~zeros[columns])


def _has_pattern(zeros: Tensor, pattern: Pattern, block: int) -> bool:
    """Whether zeros, bool (n, m), are all that a pattern prunes, and perhaps more."""
    if not zeros.numel():
        return True
    if pattern.kept is not None and pattern.group is not None:
        least = pattern.group - pattern.kept
        if int(torch.count_nonzero(zeros)) * pattern.group < zeros.numel() * least:
            return False
        return int(zeros.view(-1, pattern.group, zeros.shape[1]).sum(1, dtype=torch.int32).min()) >= least
    parts = zeros.split(block)
    return all(int(torch.count_nonzero(part)) >= pruned_count(pattern.sparsity, part.numel()) for part in parts)
