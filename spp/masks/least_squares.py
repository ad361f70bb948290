"""The kept values of a pruned weight that change a layer's outputs least, for any mask, by least squares.

    minimise over W'    tr((W' − W) (H + λ I) (W' − W)ᵀ)    with W' = 0 where the mask prunes,    H = Xᵀ X

W (m, n) is the dense weight, X (T, n) its calibration inputs, λ = damping · mean(diag H). Each row is its own system,

    (H + λ I)_SS w'_S = ((H + λ I) w)_S        S: what the row keeps,

and to solve them row by row costs Σ |S|³. Here all rows run together by conjugate gradients with the diagonal as
preconditioner (Saad, *Iterative Methods for Sparse Linear Systems*, §9.2): one product (m, n) × (n, n) an iteration,
and an error that falls with each one, so that it can stop anywhere. ADMM solves the same problem for a fixed mask in
Boža, *Fast and Effective Weight Update for Pruned Large Language Models* (arXiv 2401.02938), §3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError
from spp.masks.patterns import all_finite
from spp.masks.select import work_dtype
from spp.masks.sparsegpt import check_damping

_BLOCK = 1 << 20  # weights whose rows are solved together
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the first residual: where `least_squares` stops
_MOST = 1000  # iterations, whatever the residual


@torch.no_grad()
def least_squares(weight: Tensor, hessian: Tensor, mask: Tensor, *, damping: float = 0.01) -> Tensor:
    """Return the weight with zeros where the mask prunes, and elsewhere the values that change the outputs least.

    Args:
        weight: the dense weight (m, n); not changed.
        hessian: (n, n), XᵀX of the layer's inputs, undamped.
        mask: bool (m, n), True = kept; any mask.
        damping: λ as a share of the mean of H's diagonal. It draws the kept values to those of `weight`.

    Returns:
        (m, n) in the weight's dtype. No row's error tr(… H …) is above that of `weight` with zeros.

    Raises:
        ConfigError: a shape or an option makes no sense.
        NonFiniteError: the weight, the Hessian or the result holds NaN or infinity.

    Example:
        >>> x, w = torch.randn(64, 8), torch.randn(4, 8)
        >>> mask = w.abs() > 0.5
        >>> fitted = least_squares(w, x.T @ x, mask)
        >>> bool(((x @ (fitted - w).T).norm() <= (x @ (w * mask - w).T).norm()) and (fitted[~mask] == 0).all())
        True
    """
    check_operands(weight, hessian, mask)
    check_damping(damping)
    start = weight.masked_fill(~mask, 0)
    return fit_kept(weight, hessian, mask, start, damping=damping, tolerance=EXACT[work_dtype(weight)])


def check_operands(weight: Tensor, hessian: Tensor, mask: Tensor) -> None:
    """Raise where a weight, the Hessian of its inputs and a mask do not belong together, or are not finite."""
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ConfigError(
            f"the weight is {tuple(weight.shape)} {weight.dtype}; expected a floating-point (m, n) matrix"
        )
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ConfigError(f"the Hessian is {tuple(hessian.shape)}; the weight needs {(weight.shape[1],) * 2}")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ConfigError(f"the mask is {tuple(mask.shape)} {mask.dtype}; expected a bool {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("Hessian", hessian)):
        if not all_finite(tensor):
            raise NonFiniteError(f"the {name} holds NaN or infinity")


def fit_kept(
    weight: Tensor, hessian: Tensor, mask: Tensor, start: Tensor, *, damping: float, tolerance: float
) -> Tensor:
    """Return the kept values from a start (m, n) on; `least_squares` starts at the weight itself.

    Args:
        weight, hessian, mask, damping: as for `least_squares`, checked.
        start: values to begin with, zero where the mask prunes; a row that is not better in the end keeps them.
        tolerance: share of the first residual at which a block of rows stops.
    """
    dtype = work_dtype(weight)
    gram = hessian.to(weight.device, dtype)
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    fitted = torch.empty_like(weight)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        target, kept, begun = weight[part].to(dtype), mask[part], start[part]
        values = _solve(target, damped, kept, begun.to(dtype), tolerance).to(weight.dtype)
        better = row_errors(values.to(dtype) - target, gram) < row_errors(begun.to(dtype) - target, gram)  # not for NaN
        fitted[part] = torch.where(better[:, None], values, begun)
    if not all_finite(fitted):
        raise NonFiniteError(f"the fitted values do not fit {weight.dtype}; give more damping, or prune in float32")
    return fitted


def row_errors(change: Tensor, gram: Tensor) -> Tensor:
    """Return d H dᵀ of each row d of a change (m, n) of a weight: (m,)."""
    return ((change @ gram) * change).sum(1)


def _solve(target: Tensor, damped: Tensor, kept: Tensor, x: Tensor, tolerance: float) -> Tensor:
    """Return x (rows, n) after conjugate gradients on the kept entries of each row."""
    diagonal = damped.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)  # (n,); an input that is always 0, undamped, says nothing
    residual = ((target - x) @ damped).mul_(kept)  # (rows, n)
    direction = residual * inverse
    strength = (residual * direction).sum(1, keepdim=True)  # (rows, 1)
    enough = strength * tolerance**2
    for _ in range(_MOST):
        if bool((strength <= enough).all()):
            break
        bent = (direction @ damped).mul_(kept)
        curvature = (direction * bent).sum(1, keepdim=True)
        length = torch.where(curvature > 0, strength / curvature, 0)
        x = x.addcmul(direction, length)
        residual.addcmul_(bent, length, value=-1)
        scaled = residual * inverse
        before, strength = strength, (residual * scaled).sum(1, keepdim=True)
        direction = torch.addcmul(scaled, direction, torch.where(before > 0, strength / before, 0))
    return x
