"""Products on a CPU that skip the zeros of W: fewer multiplications than the three dense products of full fine-tuning.

    forward    Y  = X W_effᵀ        one multiplication for each kept weight and token
    backward   dX = dY W_eff        likewise
               H  = W ⊙ (dYᵀ X)     computed at the kept weights alone, and reduced into dα, dβ on the spot

With a share d of the weights kept that is 3 · d · m · n · T multiplications. The low-rank rules do as well: masked
LoRA's H is dYᵀ X at the kept weights, and their r takes 2 r operations an entry where W_eff is built and 4 r where H is
reduced, against the 2 d T of a product. Compiled by the user's own C compiler when the first pruned layer asks for it,
into the user's cache, and used where the result passes a check against torch (compiler.py); without a compiler, or on
another processor than x86-64 with AVX2 and FMA, torch does the work (kernels/cpu.py, which is the twin that the tests
compare with).

What is skipped is not looked at: an infinite input at a pruned weight gives no NaN here, as 0 · inf does in a dense
product.

elementwise.py has the other compiled file: merges, masks and checksums in one pass.
"""

from __future__ import annotations

from spp.kernels.native.products import FEWEST_TOKENS, Native, why_not

__all__ = ["FEWEST_TOKENS", "Native", "why_not"]
