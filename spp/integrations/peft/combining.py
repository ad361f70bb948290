"""Weighted sums of adapters, layer by layer.

    U = Σ_t w_t·(s_t·β_t) · A_t        W_eff = W · (1 + U)

A stack keeps the terms. One adapter of rank r has, in each of its r blocks of rows, a U of rank one: `approximate`
takes there the leading singular vectors of the sum, whose other singular values are the error. With K terms in a block,
U = B C with B (rows, K) and C (K, n), so that the decomposition is one of a K × K matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError
from spp.integrations.peft.config import SPPPeftConfig
from spp.integrations.peft.terms import Term, TermsLayer

COMBINATIONS = ("stack", "svd")


def require_combination(
    configs: Mapping[str, SPPPeftConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination: str,
    r: int | None,
) -> None:
    """Raise a ConfigError unless these adapters can be combined so."""
    unknown = sorted(set(adapters) - configs.keys())
    if not adapters or unknown:
        raise ConfigError(f"adapters: there is no {', '.join(unknown) or 'name given'}; known: {', '.join(configs)}")
    if len(set(adapters)) < len(adapters):
        raise ConfigError(f"adapters: a name comes twice in {list(adapters)}; add its weights up")
    if len(weights) != len(adapters) or not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"weights are {list(weights)}; they must be {len(adapters)} finite numbers, one an adapter")
    if name in configs or not name or "." in name:
        raise ConfigError(f"adapter_name is {name!r}; it must be a new name without dots")
    if combination not in COMBINATIONS:
        raise ConfigError(f"combination_type is {combination!r}; known: {', '.join(COMBINATIONS)}")
    if r is not None and combination != "svd":
        raise ConfigError("r is given for a stack, which keeps the rank of each adapter; it is for 'svd'")
    if r is not None:
        SPPConfig(r=r)
    saved = [adapter for adapter in adapters if configs[adapter].modules_to_save]
    if saved:
        raise ConfigError(f"{', '.join(saved)} also trained modules_to_save as a whole, for which there is no sum")


def combined_config(first: SPPPeftConfig, ranks: Mapping[str, int], targets: Sequence[str]) -> SPPPeftConfig:
    """Return the config of a sum: of the first adapter's kind, with the rank of each layer."""
    r = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
    config = dataclasses.replace(
        first,
        r=r,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r} or None,
        target_modules=set(targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        base_masks=None,
        base_values=None,
        base_forms=None,
        seed=None,
    )
    config.inference_mode = True
    return config


def stack(layer: TermsLayer, adapters: Sequence[str], weights: Sequence[float], name: str) -> float:
    """Give a layer the sum as it is; the error is 0."""
    here = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if adapter in layer.spp_terms]
    alpha = torch.cat([layer.spp_alpha[adapter].detach() for adapter, _ in here], dim=-2)  # (…, Σ r_t, n)
    beta = torch.cat([layer.spp_beta[adapter].detach() for adapter, _ in here], dim=-1)  # (…, m, terms)
    _add(layer, name, _terms(layer, here), [alpha, beta], here[0][0])
    return 0.0


def approximate(
    layer: TermsLayer, adapters: Sequence[str], weights: Sequence[float], name: str, scaling: float, r: int | None
) -> float:
    """Give a layer one adapter of rank r near the sum; return the relative error."""
    here = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if adapter in layer.spp_terms]
    terms = _terms(layer, here)
    r = min(r or max(term.rank for term in terms), layer.out_features)
    params = [param.detach().double() for adapter, _ in here for param in layer.adapter_params(adapter)]
    fused = params[0].dim() == 3
    made = [_near(terms, one, r, scaling) for one in (zip(*params, strict=True) if fused else [params])]
    alphas, betas, kept, total = zip(*made, strict=True)
    dtype = layer.spp_alpha[here[0][0]].dtype
    stacked = [torch.stack(parts) if fused else parts[0] for parts in (alphas, betas)]
    _add(layer, name, (Term(r, scaling),), [param.to(dtype) for param in stacked], here[0][0])
    return math.sqrt(max(0.0, 1.0 - sum(kept) / sum(total))) if sum(total) else 0.0


def _near(
    terms: Sequence[Term], params: Sequence[Tensor], r: int, scaling: float
) -> tuple[Tensor, Tensor, float, float]:
    """Return α (r, n) and β (m, 1) near the sum of one matrix's terms, ‖U'‖² and ‖U‖²."""
    alphas, betas = params[::2], params[1::2]
    m, n = betas[0].shape[0], alphas[0].shape[1]
    alpha, beta = alphas[0].new_empty(r, n), alphas[0].new_empty(m, 1)
    kept, total = 0.0, 0.0
    for k in range(r):
        rows = slice(k * m // r, (k + 1) * m // r)
        u, sigma, v = _leading(*_factors(terms, alphas, betas, rows, m))
        size = math.sqrt(float(sigma[0]) / scaling) or 1.0
        alpha[k], beta[rows, 0] = v * size, u * float(sigma[0]) / (scaling * size)
        kept, total = kept + float(sigma[0] ** 2), total + float(sigma.square().sum())
    return alpha, beta, kept, total


def _terms(layer: TermsLayer, here: Sequence[tuple[str, float]]) -> tuple[Term, ...]:
    return tuple(Term(t.rank, w * t.scaling) for adapter, w in here for t in layer.spp_terms[adapter])


def _factors(
    terms: Sequence[Term], alphas: Sequence[Tensor], betas: Sequence[Tensor], rows: slice, m: int
) -> tuple[Tensor, Tensor]:
    """Return B (rows, K) and C (K, n) with U[rows] = B C."""
    left, right = [], []
    for term, alpha, beta in zip(terms, alphas, betas, strict=True):
        for k in range(((rows.start + 1) * term.rank - 1) // m, (rows.stop * term.rank - 1) // m + 1):
            shared = slice(max(rows.start, k * m // term.rank), min(rows.stop, (k + 1) * m // term.rank))
            column = torch.zeros(rows.stop - rows.start, dtype=beta.dtype, device=beta.device)
            column[shared.start - rows.start : shared.stop - rows.start] = term.scaling * beta[shared, 0]
            left.append(column)
            right.append(alpha[k])
    return torch.stack(left, dim=1), torch.stack(right)


def _leading(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading left singular vector, all singular values and the leading right one of B C."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u[:, 0], sigma, q_right @ vh[0]


def _add(layer: TermsLayer, name: str, terms: Sequence[Term], params: Sequence[Tensor], like: str) -> None:
    layer.set_terms(name, terms, params, layer.spp_dropout[like])
    for container in layer.adapter_layer_names:
        getattr(layer, container)[name].requires_grad_(False)
