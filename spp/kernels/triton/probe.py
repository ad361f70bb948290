"""A small run of every kernel against its twin: whether Triton works on this machine at all."""

import torch

from spp.kernels.triton.build_kernel import build
from spp.kernels.triton.reduce_kernel import reduce
from spp.rules import get_rule
from spp.rules.canonical import effective_block

WHOLE = slice(None)
TOLERANCE = 1e-5  # of sums of 16 products in float32


def probe(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise, whatever it is, unless the kernels run on `device` and give the numbers of plain torch there."""
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
