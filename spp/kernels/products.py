"""The two products with the effective weight, by the faster of the vendor libraries that torch carries.

torch hands float32 products on x86 to MKL. On AMD's CPUs oneDNN, which torch ships too, needed 0.77 to 0.98 of MKL's
time for X Wᵀ and dY W at the shapes of a 135M model (EPYC with AVX-512, 2 threads, 512 and 1024 rows); for dYᵀ X
neither was better throughout, so that one stays with torch. On an EPYC without AVX-512 MKL was the faster one, by up to
a third. The choice depends on the machine and the operands, never
on a timing, so that a run repeats bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spp.kernels import cpu


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return X Wᵀ + b (T, m) for x (T, n), weight (m, n), bias (m,) or None, all of one dtype."""
    if _by_onednn(x, weight):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def input_product(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dY W (T, n) for dy (T, m) and weight (m, n), both of one dtype."""
    if _by_onednn(dy, weight):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "")
        return result
    return torch.mm(dy, weight)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.numel() > 0
        and x.is_contiguous()
        and weight.is_contiguous()
        and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, and torch's oneDNN product works as expected."""
    if cpu.vendor() != cpu.AMD or not torch.cpu._is_avx512_supported() or not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(2, 3), torch.arange(12.0).view(4, 3)
    try:
        with torch.inference_mode():
            found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.equal(found, F.linear(x, weight))
