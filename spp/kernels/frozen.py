"""Products with W itself, without an adapter: X Wᵀ + b, a block of W's rows at a time where W is no tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.kernels.blocks import row_step, slices
from spp.kernels.build import WHOLE, plain
from spp.kernels.sources import WeightSource


def frozen_linear(x: Tensor, weight: WeightSource, bias: Tensor | None) -> Tensor:
    """Return X Wᵀ + b (…, m) in the dtype of x, as torch's linear computes it."""
    m, n = weight.shape
    step = m if weight.is_tensor else row_step(m, n, 1)
    if step >= m:
        return F.linear(x, weight.block(WHOLE, WHOLE).to(x.dtype), bias)
    y = torch.empty(*x.shape[:-1], m, dtype=x.dtype, device=x.device)
    for rows in slices(m, step):
        y[..., rows] = F.linear(x, weight.block(rows, WHOLE).to(x.dtype), bias if bias is None else bias[rows])
    return y


def frozen_product(x: Tensor, weight: WeightSource, bias: Tensor | None, dtype: torch.dtype, step: int) -> Tensor:
    """Return X Wᵀ + b (T, m) for x (T, n) in `dtype`, converting W a block at a time where it has another."""
    bias = bias if bias is None else bias.to(dtype)
    x = x.to(dtype)
    m = weight.shape[0]
    if weight.is_tensor and weight.dtype == dtype:
        return F.linear(x, weight.block(WHOLE, WHOLE), bias)
    y = torch.empty(x.shape[0], m, dtype=dtype, device=x.device)
    for rows in slices(m, step):
        torch.mm(x, plain(weight.block(rows, WHOLE), dtype).t(), out=y[:, rows])
    return y if bias is None else y.add_(bias)
