"""The functions behind the layer, on plain tensors: the fast path, its oracle, and the weight that both mean.

Y = X Wᵀ + b + s · X (W ⊙ A ⊙ β)ᵀ,   A[i, :] = W_α[g(i), :]        (SPP, Lu et al. 2024, §3.2; see spp.rules.spp)
"""

from __future__ import annotations

from torch import Tensor

from spp.errors import ConfigError
from spp.kernels import Run
from spp.kernels.linear import linear
from spp.rules import Adapter, get_rule
from spp.rules import effective_weight as _effective_weight

_RULE = get_rule("spp")


def spp_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scaling: float,
    dropout: float = 0.0,
    saved_activations: str = "full",
) -> Tensor:
    """Compute the SPP layer in three matrix products, saving nothing of the weight's size for backward.

    Without dropout it multiplies x by exactly `effective_weight(weight, alpha, beta, scaling)`.

    Args:
        x: (…, n), any leading dimensions, also empty.
        weight: (m, n), frozen: it gets no gradient.
        bias: (m,) or None.
        alpha: W_α (r, n), r ≤ m.
        beta: W_β (m, 1).
        scaling: s.
        dropout: probability of dropping an entry of x in the residual branch (five products); 0 for none.
        saved_activations: what is kept of x for backward: "full", or "bfloat16", which rounds a float32 x to half its
            memory; only the gradients of alpha and beta see it.

    Returns:
        (…, m) in the dtype of x; under autocast in autocast's dtype.

    Raises:
        AdapterError, ConfigError: the shapes do not belong together, or the device cannot do what is asked.
        GradientError: in a second backward, for a second derivative (RuntimeError).

    Example:
        >>> x, w = torch.randn(3, 8), torch.randn(4, 8)
        >>> y = spp_linear(x, w, None, torch.randn(2, 8), torch.zeros(4, 1), 2.0)
        >>> bool(torch.equal(y, x @ w.T))
        True
    """
    _RULE.check_shapes((alpha, beta), weight.shape[0], weight.shape[1], "spp_linear")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout is {dropout!r}; it must be in [0, 1)")
    adapter = Adapter(_RULE, (alpha, beta), scaling, dropout)
    return linear(x, weight, bias, adapter, Run(saved_activations))


def spp_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the SPP layer as the paper writes it, with separate branches: the oracle that tests compare with.

    Differentiable in all arguments, any number of times.

    Args:
        x: (…, n); weight: (m, n); bias: (m,) or None; alpha: (r, n); beta: (m, 1); scaling: s; all of one dtype.
        mask: None, or what input dropout multiplies x by in the residual branch: (…, n) of 0 and 1 / (1 − p).

    Returns:
        Y (…, m).

    Example:
        >>> x, weight, alpha, beta = torch.ones(3), torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> spp_linear_reference(x, weight, None, alpha, beta, 0.5)
        tensor([4.5000, 4.5000])
    """
    return _RULE.oracle(x, weight, bias, (alpha, beta), scaling, mask)


def effective_weight(weight: Tensor, alpha: Tensor, beta: Tensor, scaling: float) -> Tensor:
    """Return W_eff (m, n) in the dtype of `weight`: what the forward multiplies by and a merge stores, bit for bit.

    t = s·β, u = t·A, M = 1 + u, W·M, each rounded to float32 (float64 for a float64 base), then rounded to the base's
    dtype; a kept weight that comes out as zero is stored as the smallest magnitude that stays one.

    Args:
        weight: (m, n); alpha: (r, n); beta: (m, 1); scaling: s.

    Example:
        >>> effective_weight(torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1), 0.5)
        tensor([[1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000]])
    """
    _RULE.check_shapes((alpha, beta), weight.shape[0], weight.shape[1], "effective_weight")
    return _effective_weight(weight, Adapter(_RULE, (alpha, beta), scaling))


__all__ = ["effective_weight", "spp_linear", "spp_linear_reference"]
