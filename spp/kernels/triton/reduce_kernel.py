"""The kernel that adds a block of G = dYᵀ X to dα and dβ of one SPP layer, in one pass over G and W, dense or packed.

    H = W ⊙ G        dα[k, j] = Σ_{i in block k} (s·β[i]) · H[i, j]        dβ[i] = s · Σ_j α[g(i), j] · H[i, j]

Two stages with a fixed order, no atomics, so that a run repeats bit for bit: a program owns up to SPLIT_ROWS rows of
one row block k and BLOCK_COLS columns, sums in float32 and writes one partial row of dα (dα's own where no other
program has rows of k) and one partial column of dβ; torch adds the parts up. They are a 64th and a 128th of G's size.
The twin is SPPRule.reduce.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spp.kernels.triton.tile import launch, load_tile, operand
from spp.rules.spp import Factors
from spp.weights import PackedWeight
from spp.weights.base import workspace

MOST_ROWS, LEAST_ROWS = 16, 4  # of a tile; row blocks of fewer rows get smaller tiles
BLOCK_COLS = 128
SPLIT_ROWS = 64  # rows of a program: few enough for r = 1 to fill a GPU, enough that partial sums of dα are small


@triton.jit(do_not_specialize=["m", "r", "splits", "row_bytes", "stretches"])
def _reduce_kernel(
    weight_ptr, codes_ptr, starts_ptr, gradient_ptr, alpha_ptr, scaled_beta_ptr, part_alpha_ptr, part_beta_ptr, m, n,
    first, end, r, splits, stride_row, stride_col, row_bytes, stretches, stride_part, FORM: tl.constexpr,
    PER_BYTE: tl.constexpr, WITH_ALPHA: tl.constexpr, WITH_BETA: tl.constexpr, SPLIT_ROWS: tl.constexpr,
    LOOP_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    k = part // splits
    start = (k * m) // r + (part - k * splits) * SPLIT_ROWS
    stop = ((k + 1) * m) // r
    first_col = first + tl.program_id(1) * BLOCK_COLS
    cols = first_col + tl.arange(0, BLOCK_COLS)
    cols_inside = cols < end
    alpha = tl.load(alpha_ptr + k * n + cols, mask=cols_inside, other=0.0)
    total = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for offset in range(0, LOOP_ROWS, BLOCK_ROWS):
        rows = start + offset + tl.arange(0, BLOCK_ROWS)
        rows_inside = rows < stop
        inside = rows_inside[:, None] & cols_inside[None, :]
        weight = load_tile(
            weight_ptr, codes_ptr, starts_ptr, rows, rows_inside, first_col, end, stride_row, stride_col, row_bytes,
            stretches, FORM, PER_BYTE, BLOCK_COLS,
        )  # fmt: skip
        places = rows[:, None] * (end - first) + (cols - first)[None, :]
        gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0)
        h = weight.to(tl.float32) * gradient.to(tl.float32)
        if WITH_ALPHA:
            scaled = tl.load(scaled_beta_ptr + rows, mask=rows_inside, other=0.0)
            total += tl.sum(h * scaled[:, None], axis=0)
        if WITH_BETA:
            sums = tl.sum(h * alpha[None, :], axis=1)
            tl.store(part_beta_ptr + tl.program_id(1).to(tl.int64) * m + rows, sums, mask=rows_inside)
    if WITH_ALPHA:
        tl.store(part_alpha_ptr + part * stride_part + (cols - first), total, mask=cols_inside)


def reduce(
    weight: Tensor | PackedWeight,
    factors: Factors,
    cols: slice,
    gradient: Tensor,
    grads: Sequence[Tensor | None],
    *,
    accumulate: bool,
) -> None:
    """Write what G[:, cols] adds to dα and dβ into `grads`.

    Args:
        weight: the whole W (m, n), float32, bfloat16 or float16; a tensor of any strides, or packed.
        factors: from the SPP rule's `prepare`, in float32.
        cols: which columns of the layer; it begins at a multiple of BLOCK_COLS.
        gradient: G[:, cols] contiguous, in the dtype of the product; it stays as it is.
        grads: [dα (r, n), dβ (m, 1)] in float32, contiguous; None for one that is not wanted.
        accumulate: add to what is in dβ; False writes over it. dα[:, cols] is written in either case.
    """
    d_alpha, d_beta = grads
    (m, n), r = weight.shape, factors.alpha.shape[0]
    first, end, _ = cols.indices(n)
    assert first % BLOCK_COLS == 0, f"a chunk begins at column {first}"
    most = triton.cdiv(m, r)  # rows of the largest row block
    splits, tiles = triton.cdiv(most, SPLIT_ROWS), triton.cdiv(end - first, BLOCK_COLS)
    tile_rows = min(MOST_ROWS, max(LEAST_ROWS, triton.next_power_of_2(most)))
    if d_alpha is not None and splits == 1:
        part_alpha = d_alpha[:, cols]
    else:
        part_alpha = workspace("partial alpha", (r * splits, end - first), torch.float32, weight.device)
    part_beta = workspace("partial beta", (tiles, m), torch.float32, weight.device)
    pointers, numbers, constants = operand(weight)
    launch(
        _reduce_kernel, (r * splits, tiles), *pointers, gradient, factors.alpha.contiguous(),
        factors.scaled_beta.contiguous(), part_alpha, part_beta, m, n, first, end, r, splits, *numbers,
        part_alpha.stride(0), **constants, WITH_ALPHA=d_alpha is not None, WITH_BETA=d_beta is not None,
        SPLIT_ROWS=SPLIT_ROWS, LOOP_ROWS=min(SPLIT_ROWS, triton.cdiv(most, tile_rows) * tile_rows),
        BLOCK_ROWS=tile_rows, BLOCK_COLS=BLOCK_COLS,
    )  # fmt: skip
    if d_alpha is not None and splits > 1:
        torch.sum(part_alpha.view(r, splits, end - first), 1, out=d_alpha[:, cols])
    if d_beta is not None:
        total = part_beta.sum(0).mul_(factors.scaling).unsqueeze(1)
        if accumulate:
            d_beta.add_(total)
        else:
            d_beta.copy_(total)
