"""The masked low-rank linear of PST and its straight-through gradients (arXiv 2205.11005, §3).

    W' = W + b·U V                                    (m, n)    the updated weight
    S  = |W'| + a₁·A B + a₂·(R ⊕ C)                   (m, n)    its importance, (R ⊕ C)ᵢⱼ = Rᵢ + Cⱼ
    M  = 0 at the lowest ⌊m·n·sparsity⌋ of S, else 1            of equals the lower index (row-major) is kept
    Y  = X (M ⊙ W')ᵀ + bias

The straight-through estimator takes ∂M/∂S for the identity. With G = dYᵀ X:

    dS = G ⊙ W'            dW' = G ⊙ M + dS ⊙ sign(W') = G ⊙ (M + |W'|)
    dU = b·dW' Vᵀ    dV = b·Uᵀ dW'    dA = a₁·dS Bᵀ    dB = a₁·Aᵀ dS    dR = a₂·dS 1    dC = a₂·dSᵀ 1

W' and S are in float32 (float64 for a float64 W), and so is what G takes part in. For backward a bit a weight is kept,
the mask, beside X and the parameters; W' is made again, G a block of rows at a time.

With a pattern N:M the ⌊m·n·sparsity⌋ are the lowest among the M − N lowest of every group of M along a row: no group
loses more than N:M takes from it, and at sparsity 1 − N / M, where a schedule ends, each has lost exactly that.

The sparsity rises by a cubic schedule, of T steps in all, with shares w_i and w_f of them at either end:

    s(t) = s_i                                                            t ≤ w_i·T
           s_f + (s_i − s_f)·(1 − (t − w_i·T) / (T − w_i·T − w_f·T))³     between
           s_f                                                            t > T − w_f·T

A training step of SmolLM2 at 2:4 (4 × 256 tokens, float32, one thread of a busy AMD EPYC, median processor time of 3
rounds): the plain formula under autograd takes 1.02 of it and 1.53 of the peak memory, LoRA (r = 8) 0.76 and SPP
(r = 16) 0.74 of its time: `python -m benchmarks.step --contenders pst pst-autograd lora spp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp.configs.pst import check_schedule
from spp.errors import ConfigError
from spp.kernels.autograd import Once, autocast_dtype, no_autocast
from spp.masks.patterns import Pattern, pack_mask, unpack_mask
from spp.masks.select import keep_groups, keep_of_all, pruned_count
from spp.rules.adapter import arithmetic_dtype

_BLOCK = 1 << 22  # entries of G that exist together
Factors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # U (m, k), V (k, n), A (m, k), B (k, n), R (m,), C (n,)


@dataclass(frozen=True)
class Scales:
    """b, a₁ and a₂ of the equations, and which mask.

    Args:
        weight: b. low_rank: a₁. structured: a₂.
        sparsity: the share that is pruned.
        pattern: N:M, or None for a mask over the whole matrix.
    """

    weight: float
    low_rank: float
    structured: float
    sparsity: float
    pattern: Pattern | None


def updated_weight(weight: Tensor, factors: Factors, scales: Scales, rows: slice = slice(None)) -> Tensor:
    """Return rows of W' in the arithmetic's dtype, as a new tensor."""
    u, v = factors[:2]
    return torch.addmm(weight[rows].to(arithmetic_dtype(weight.dtype)), u[rows], v, alpha=scales.weight)


def importance(updated: Tensor, factors: Factors, scales: Scales) -> Tensor:
    """Return S (m, n) of W'."""
    _, _, a, b, r, c = factors
    scores = updated.abs().addmm_(a, b, alpha=scales.low_rank)
    return scores.add_(r[:, None], alpha=scales.structured).add_(c, alpha=scales.structured)


def keep_mask(scores: Tensor, scales: Scales) -> Tensor:
    """Return M as bool (m, n), exactly ⌊m·n·sparsity⌋ of which are False; at most M − N of a group of a pattern."""
    pruned = pruned_by(scales, scores.numel())
    if scales.pattern is None:
        return keep_of_all(scores, pruned)
    kept, group = scales.pattern.kept, scales.pattern.group
    assert kept is not None and group is not None
    best = keep_groups(scores, kept, group)
    if pruned == _most(scales.pattern, scores.numel()):
        return best
    return keep_of_all(scores.masked_fill(best, torch.inf), pruned)


def pruned_by(scales: Scales, count: int) -> int:
    """Return how many of `count` weights, all of a matrix, M prunes."""
    if scales.pattern is None:
        return pruned_count(scales.sparsity, count)
    most = _most(scales.pattern, count)
    if (
        scales.sparsity < scales.pattern.sparsity
    ):  # else all that N:M takes, which rounding of 1 − N / M must not change
        return min(pruned_count(scales.sparsity, count), most)
    return most


def _most(pattern: Pattern, count: int) -> int:
    """Return how many of `count` weights, in whole groups, an N:M pattern prunes."""
    assert pattern.kept is not None and pattern.group is not None
    return count // pattern.group * (pattern.group - pattern.kept)


@torch.no_grad()
def masked_weight(weight: Tensor, factors: Factors, scales: Scales) -> tuple[Tensor, Tensor]:
    """Return (M ⊙ W' in the arithmetic's dtype, M), the same under autocast."""
    with no_autocast(weight.device.type):
        updated = updated_weight(weight, factors, scales)
        mask = keep_mask(importance(updated, factors, scales), scales)
    return updated.masked_fill_(~mask, 0.0), mask


def pst_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scales: Scales) -> Tensor:
    """Return Y (…, m) for X (…, n): W (m, n) is constant, X, the bias and the six factors get gradients.

    Raises:
        GradientError: a second derivative is asked for.
    """
    dtype = autocast_dtype(x.device.type, x.dtype, weight.dtype)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with no_autocast(x.device.type):
        y: Tensor = _PST.apply(x, weight.detach(), bias, scales, *factors)
    return y


class _PST(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Scales, *factors: Any) -> Tensor:
        effective, mask = masked_weight(weight, factors, scales)
        ctx.scales = scales
        ctx.save_for_backward(x, weight, bias, pack_mask(mask), *factors)
        return torch.nn.functional.linear(x, effective.to(weight.dtype).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, _, bits, *factors = ctx.saved_tensors
        dy = grads[0]
        with no_autocast(x.device.type):
            found = _gradients(ctx.scales, ctx.needs_input_grad, dy, x, weight, bits, tuple(factors))
        if torch.is_grad_enabled():  # create_graph=True
            sources = (dy, x, *factors)
            found = [g if g is None else Once.apply(g, *sources) for g in found]
        dx, dbias, *rest = found
        return (dx, None, dbias, None, *rest)


@torch.no_grad()
def _gradients(
    scales: Scales, needed: Any, dy: Tensor, x: Tensor, weight: Tensor, bits: Tensor, factors: Factors
) -> list[Tensor | None]:
    """Return dX, dbias, dU, dV, dA, dB, dR, dC, None where it is not needed."""
    u, v, a, b, r, c = factors
    m, n = weight.shape
    mask = unpack_mask(bits, (m, n))
    tokens, dy = x.reshape(-1, n), dy.reshape(-1, m)  # (T, n), (T, m)
    dx = dbias = None
    if needed[0]:
        effective = updated_weight(weight, factors, scales).masked_fill_(~mask, 0.0).to(weight.dtype)
        dx = (dy @ effective.to(dy.dtype)).view(x.shape)
        del effective
    if needed[2]:
        dbias = dy.sum(0)
    if not any(needed[4:]):
        return [dx, dbias, *(None for _ in factors)]
    du, da, dr = torch.empty_like(u), torch.empty_like(a), torch.empty_like(r)
    dv, db, dc = torch.zeros_like(v), torch.zeros_like(b), torch.zeros_like(c)
    step = max(1, _BLOCK // max(1, n))
    for start in range(0, m, step):
        rows = slice(start, start + step)
        gradient = (dy[:, rows].T @ tokens).to(u.dtype)  # (rows, n)
        updated = updated_weight(weight, factors, scales, rows)
        scored = gradient * updated  # dS
        gradient *= updated.abs_().add_(mask[rows])  # dW'
        du[rows] = gradient @ v.T
        dv += u[rows].T @ gradient
        da[rows] = scored @ b.T
        db += a[rows].T @ scored
        dr[rows] = scored.sum(1)
        dc += scored.sum(0)
    found = [
        *(scales.weight * g for g in (du, dv)),
        *(scales.low_rank * g for g in (da, db)),
        *(scales.structured * g for g in (dr, dc)),
    ]
    return [dx, dbias, *(g if need else None for g, need in zip(found, needed[4:], strict=True))]


def sparsity_schedule(
    step: int,
    total_steps: int,
    initial_warmup: float = 0.1,
    final_warmup: float = 0.3,
    initial_sparsity: float = 0.0,
    final_sparsity: float = 0.9,
) -> float:
    """Return the sparsity after `step` optimizer steps of `total_steps`; the defaults are the authors'.

    Args:
        step: t, at least 0; the forward passes of the first optimizer step are at 0.
        total_steps: T, at least 1.
        initial_warmup: w_i, the share of the steps that stays at `initial_sparsity`.
        final_warmup: w_f, the share that stays at `final_sparsity`; together at most 1.
        initial_sparsity: s_i in [0, 1), at most `final_sparsity`.
        final_sparsity: s_f in [0, 1).

    Returns:
        s(t), a share of the weights.

    Raises:
        ConfigError: a number is out of its range.

    Example:
        >>> sparsity_schedule(0, 100, final_sparsity=0.5), sparsity_schedule(100, 100, final_sparsity=0.5)
        (0.0, 0.5)
    """
    check_schedule(initial_warmup, final_warmup, initial_sparsity, final_sparsity)
    if total_steps < 1 or step < 0:
        raise ConfigError(f"step is {step} of {total_steps}; a step is at least 0, and of at least 1")
    start, end = initial_warmup * total_steps, total_steps - final_warmup * total_steps
    if step <= start:
        return initial_sparsity
    span = total_steps - (final_warmup + initial_warmup) * total_steps
    if step > end or span <= 0:  # rounding can leave a step between two warm-ups that take all steps
        return final_sparsity
    left = 1 - (step - start) / span
    sparsity = final_sparsity + (initial_sparsity - final_sparsity) * left**3
    return min(max(sparsity, initial_sparsity), final_sparsity)
