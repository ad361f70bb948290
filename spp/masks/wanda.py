"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, arXiv 2306.11695, §3).

    S_ij = |W_ij| · ‖X_j‖₂

W (m, n) is the weight, X (T, n) its calibration inputs, ‖X_j‖₂ the norm of feature j over all tokens. Scores are
compared within one output row: the ⌊p·n⌋ lowest of each row go, or all but the N highest of each M consecutive inputs.
Weights that stay are not changed. A dead feature (norm 0) scores 0 everywhere and goes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.errors import ConfigError, NonFiniteError
from spp.masks.patterns import Pattern
from spp.masks.select import checked_pattern, keep_groups, keep_in_rows, pruned_count, work_dtype


@torch.no_grad()
def wanda_mask(weight: Tensor, input_norm: Tensor, pattern: str | float | Pattern) -> Tensor:
    """Return the mask that Wanda gives a weight.

    Args:
        weight: (m, n).
        input_norm: (n,), ‖X_j‖₂ of the layer's inputs, on any common scale.
        pattern: "N:M" (kept of every M inputs), or the fraction pruned of each row.

    Returns:
        Bool (m, n), True where the weight is kept; of equal scores the lower index stays.

    Raises:
        PatternError: the pattern makes no sense or does not divide n.
        ConfigError: shapes do not fit, or a norm is negative.
        NonFiniteError: the weight or the norm holds NaN or infinity.

    Example:
        >>> wanda_mask(torch.tensor([[3.0, 2.0, 1.0, 4.0]]), torch.tensor([1.0, 2.0, 9.0, 0.0]), "2:4")
        tensor([[False,  True,  True, False]])
    """
    parsed = checked_pattern(weight, pattern)
    scores = wanda_score(weight, input_norm)
    if parsed.kept is not None and parsed.group is not None:
        return keep_groups(scores, parsed.kept, parsed.group)
    return keep_in_rows(scores, pruned_count(parsed.sparsity, weight.shape[1]))


def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Return |W| · ‖X_j‖₂ (m, n) in float32 (float64 for a float64 weight).

    Raises:
        ConfigError: shapes do not fit, or a norm is negative.
        NonFiniteError: the norm holds NaN or infinity.
    """
    if input_norm.shape != weight.shape[1:]:
        raise ConfigError(f"input_norm is {tuple(input_norm.shape)}; the weight needs ({weight.shape[1]},)")
    if not torch.isfinite(input_norm).all():
        raise NonFiniteError("input_norm holds NaN or infinity")
    if (input_norm < 0).any():
        raise ConfigError("input_norm holds negative numbers; it must be a norm")
    dtype = work_dtype(weight)
    return weight.detach().to(dtype).abs() * input_norm.to(weight.device, dtype)
