"""Triton kernels for the element-wise work around the products; importing this folder imports triton.

    build    W_eff or W′ in one pass over W                  twin: spp.rules.canonical.effective_block, SPPRule.delta
    reduce   a block of W ⊙ G into dα and dβ in one pass     twin: SPPRule.reduce
    decode   W from a packed matrix                          twin: PackedWeight.decode

The first two read W from a tensor or from a packed matrix.

Whether they run is decided in spp.kernels.choice.
"""

from spp.kernels.triton.build_kernel import build, delta
from spp.kernels.triton.decode_kernel import decode
from spp.kernels.triton.launch import is_interpreted
from spp.kernels.triton.reduce_kernel import reduce

__all__ = ["build", "decode", "delta", "is_interpreted", "reduce"]
