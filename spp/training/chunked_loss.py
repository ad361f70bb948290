"""The loss of a causal language model, a chunk of tokens at a time: the logits of a batch never exist together.

    z_t = c · tanh(a · (W h_t + b) / c)    (a = 1 and no c for most models)        ℓ = Σ_t logsumexp(z_t) − z_t[label]
    dh_t = (softmax(z_t) − onehot(label)) ⊙ ∂z W

h (T, hidden) are the states that the output head gets, W (V, hidden) is the head. Logits, their logarithm and their
gradient are each T × V values in float32, which for a small model is most of a step's memory; here they are chunk × V.
The gradient of each chunk is taken while its logits are there, so that no product is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.errors import ConfigError

IGNORED = -100  # a label that is no target, as in torch and transformers


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 256,
    num_items: Tensor | float | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the cross-entropy of labels under the logits of `hidden`, without these logits existing at once.

    The same value and gradients as `F.cross_entropy(logits.float(), labels)` up to the order of summation; under
    autocast the product runs in its dtype. Differentiable once.

    Args:
        hidden: h (…, hidden), what the output head is applied to.
        weight: W (V, hidden); bias: b (V,) or None.
        labels: int64, of the leading shape of `hidden`, each the target of its own position (already shifted); -100
            is no target.
        chunk: tokens at a time.
        num_items: divide the sum by this; None divides by the number of targets.
        scale: a. softcap: c.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ConfigError: a chunk below 1, or labels that do not fit.

    Example:
        >>> h, w = torch.randn(6, 4), torch.randn(10, 4)
        >>> labels = torch.tensor([1, 2, -100, 9, 0, 3])
        >>> loss = chunked_cross_entropy(h, w, labels, chunk=2)
        >>> torch.allclose(loss, F.cross_entropy(h @ w.T, labels))
        True
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"chunk is {chunk!r}; it must be an int of at least 1: tokens at a time")
    if labels.shape != hidden.shape[:-1]:
        raise ConfigError(
            f"labels are {tuple(labels.shape)}; for hidden states {tuple(hidden.shape)} they must be "
            f"{tuple(hidden.shape[:-1])}"
        )
    device_type = hidden.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if hidden.dtype != torch.float64:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
    labels = labels.reshape(-1).to(hidden.device)
    with torch.autocast(device_type, enabled=False):
        total: Tensor = _Chunked.apply(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels, chunk, scale, softcap
        )
    count = (labels != IGNORED).sum() if num_items is None else num_items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


class _Chunked(torch.autograd.Function):
    """The sum of the losses; each chunk's gradients are taken in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needs_bias else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            slope: Tensor | float = scale  # ∂z / ∂(W h + b)
            logits = F.linear(hidden[rows], weight, bias).to(wide)  # (chunk, V)
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                slope = (1 - bent.square()) * scale
                logits = bent.mul_(softcap)
            counted = labels[rows] != IGNORED
            target = labels[rows].masked_fill(~counted, 0).unsqueeze(1)  # (chunk, 1)
            logsumexp = logits.logsumexp(1, keepdim=True)
            losses = (logsumexp - logits.gather(1, target)).squeeze(1)
            total += losses.masked_fill(~counted, 0).sum()
            if not any(ctx.needs_input_grad[:3]):
                continue
            gradient = logits.sub_(logsumexp).exp_()  # the softmax
            gradient.scatter_add_(1, target, torch.full_like(losses, -1).unsqueeze(1))
            gradient.masked_fill_(~counted.unsqueeze(1), 0)
            if isinstance(slope, Tensor) or slope != 1.0:
                gradient *= slope
            low = gradient.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(low, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += low.t() @ hidden[rows]
            if d_bias is not None:
                d_bias += gradient.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        dtypes = (None if d_hidden is None else d_hidden.dtype, *ctx.dtypes)
        pairs = zip((d_hidden, d_weight, d_bias), dtypes, strict=True)
        scaled = [None if found is None else (found * grad).to(dtype) for found, dtype in pairs]
        return *scaled, None, None, None, None
