"""The arithmetic of an adapted layer, for any rule: three products, blocked, in a shared workspace.

The floor of dense arithmetic is full fine-tuning of the layer: X Wᵀ, dY W and dYᵀ X, three products of m · n · T
multiplications each; no exact algebra with fewer is known. Beside the products a CPU passes over m × n elements,
counted here in blocks that are read or written while they are in the last cache (W itself comes from memory, once a
block):

                          products              passes over m × n in plain torch
    no dropout, forward   1                     build: write u, add 1, multiply by W
    no dropout, backward  2 (dX, G)             build again; W ⊙ G in place, read for dα, read for dβ
    alpha dropout         as no dropout         as no dropout, and one over W_α (r × n)
    input dropout         5 (2 forward)         W′ twice, W ⊙ G and its two sums
    evaluation, ≤ 32 rows 1                     none: W_eff is kept between calls (layers/adapted.py)
    checkpointing         as above, forward     the recomputation stops before the block's last product, unless it is
                          again                 reentrant

Below that floor: a pruned layer needs the share d of its weights that is kept, and no more. With a C compiler the
products of native/ skip the zeros: 3 · d · m · n · T multiplications (input dropout 5 · d), each of W's blocks read
three times a step (input dropout five) and nothing of its size written: W_eff is computed, and a packed W decoded,
while its non-zeros are compressed. A multiply-add there reads its operand from the first cache, where a dense product
has it in a register, which costs a third of the speed: at d = 1/2 a product takes 0.7 of the dense one's time, at 1/4
0.45. X and dY are repacked once a product: one pass over T × n and T × m.

A 16-bit base on a CPU that does not multiply 16 bits faster (choice.py) is rounded to its dtype and widened again in
the same blocks: two passes more in plain torch, none in native/. Of activations a layer keeps X alone for backward
(autograd.py: or its bfloat16 copy), with input dropout one bit an entry more. On a GPU see gpu.py.

Measured: `python -m benchmarks.layer --layers 4096x4096 11008x4096 --tokens 512 2048 --threads 2 --contenders spp
spp-packed full hira branches lora spp-alpha-dropout`, 2:4, float32, medians of interleaved rounds on two cores, torch
2.13, wall time of spp relative to full fine-tuning of the layer, by shape and rows in that order: AMD EPYC with AVX-512
0.65, 0.70, 0.67, 0.77 (on packed weights 1.03, 1.07, 1.11, 1.00 times as long as dense); AMD EPYC with AVX2 0.76, 0.74
(4096 × 4096 alone); Intel Xeon with AVX-512 in plain torch (SPP_KERNELS=torch) 1.08, 1.02, 1.09, 1.04. The low-rank
rules (`--contenders spp masked-lora hira-rule`, 4096 × 4096, 512 rows, AMD EPYC with AVX2): SPP takes 0.90 of masked
LoRA's time and 0.91 of that of HiRA's form; in plain torch 0.58 and 0.80.
"""

from __future__ import annotations

from spp.kernels.autograd import check_saved_activations
from spp.kernels.choice import use_kernels
from spp.kernels.frozen import base_linear
from spp.kernels.linear import Run
from spp.weights.base import Weight, release_workspace, workspace_bytes

__all__ = [
    "Run",
    "Weight",
    "base_linear",
    "check_saved_activations",
    "release_workspace",
    "use_kernels",
    "workspace_bytes",
]
