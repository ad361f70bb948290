"""The arithmetic of an adapted layer, for any rule: three products, blocked, in a shared workspace.

The floor is full fine-tuning of the layer: X Wᵀ, dY W and dYᵀ X, three products of m · n · T multiplications each; no
exact algebra with fewer is known. Beside the products a CPU passes over m × n elements, counted here in blocks that are
read or written while they lie in the last cache (W itself comes from memory, once a block):

                          products              passes over m × n in plain torch
    no dropout, forward   1                     build: write u, add 1, multiply by W
    no dropout, backward  2 (dX, G)             build again; W ⊙ G in place, read for dα, read for dβ
    alpha dropout         as no dropout         as no dropout, and one over W_α (r × n)
    input dropout         4 (2 forward)         W ⊙ A once; 5 over T × n for each of the r blocks of rows in backward,
                                                and V (T, m) kept: where blocks have 128 rows or more, in float32
                          5 (2 forward)         W′ twice, W ⊙ G and its two sums: elsewhere
    evaluation, ≤ 32 rows 1                     none: W_eff is kept between calls (layer_adapted.py)
    checkpointing         as above, forward     the recomputation stops before the block's last product, unless it is
                          again                 reentrant, or that layer keeps V

A 16-bit base on a CPU that does not multiply 16 bits faster (cpu.py) is rounded to its dtype and widened again in the
same blocks: two passes more. Of activations a layer keeps X alone for backward (keep.py: or its bfloat16 copy), with
input dropout one bit an entry more. On a GPU see whole.py.

Measured distance from the floor, `spp bench layer --layers 4096x4096 11008x4096 --tokens 512 2048 --threads 2
--contenders spp full products`, float32, medians of 7 interleaved rounds on two cores of an Intel Xeon with AVX-512,
torch 2.13, wall time of spp relative to full fine-tuning of the layer: 4096 × 4096 1.08 and 1.02 (512 and 2048 rows),
11008 × 4096 1.09 and 1.04; relative to three bare products into memory that is there already 1.17, 1.09, 1.11, 1.09.
"""

from __future__ import annotations

from spp.kernels.choice import use_kernels
from spp.kernels.fp8 import check_grad_precision
from spp.kernels.frozen import base_linear
from spp.kernels.keep import check_saved_activations
from spp.kernels.packed import PackedSource
from spp.kernels.three_products import linear
from spp.kernels.workspace import release_workspace, workspace_bytes

__all__ = [
    "PackedSource",
    "base_linear",
    "check_grad_precision",
    "check_saved_activations",
    "linear",
    "release_workspace",
    "use_kernels",
    "workspace_bytes",
]
