"""Triton kernels for the element-wise work around the products; importing this folder imports triton.

    build    W_eff or W′ in one pass over W                  twin: spp.rules.adapter.effective_block, SPPRule.delta
    reduce   a block of W ⊙ G into dα and dβ in one pass     twin: SPPRule.reduce
    decode   W from a packed matrix                          twin: PackedWeight.decode

The first two read W from a tensor or from a packed matrix.

Whether they run is decided in spp.kernels.choice, after a small run of each against its twin (`probe`).
"""

import torch

from spp.kernels.triton.build_kernel import build, delta
from spp.kernels.triton.reduce_kernel import reduce
from spp.kernels.triton.tile import decode, is_interpreted
from spp.rules import get_rule
from spp.rules.adapter import WHOLE, effective_block

__all__ = ["build", "decode", "delta", "is_interpreted", "probe", "reduce"]

TOLERANCE = 1e-5  # of sums of 16 products in float32


def probe(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise, whatever it is, unless the kernels run on `device` and give what plain torch does there."""
    rule = get_rule("spp")
    weight = (torch.arange(-24, 24, device=device) % 7).to(dtype).view(3, 16)
    alpha = torch.arange(32.0, device=device).view(2, 16).sin()
    beta = torch.arange(3.0, device=device).view(3, 1).cos()
    factors = rule.prepare((alpha, beta), 2.0, 3, torch.float32)
    found, scratch = torch.empty_like(weight), torch.empty(3, 16, device=device)
    build(weight, factors, found)
    expected = effective_block(rule, weight, factors, WHOLE, WHOLE, scratch)
    if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
        raise ArithmeticError("W_eff differs from plain torch's")
    gradient = weight.float().cos()
    exact = rule.prepare((alpha, beta), 2.0, 3, torch.float64)  # whatever float32 products are allowed to round to
    grads, twins = rule.empty_grads(factors, (True, True)), rule.empty_grads(exact, (True, True))
    reduce(weight, factors, WHOLE, gradient, grads, accumulate=False)
    rule.reduce(weight, exact, WHOLE, WHOLE, gradient.double(), twins, accumulate=False)
    for one, two in zip(grads, twins, strict=True):
        assert one is not None and two is not None
        if not float((one - two).abs().max()) <= TOLERANCE * float(two.abs().max()):
            raise ArithmeticError("the gradients differ from plain torch's")
