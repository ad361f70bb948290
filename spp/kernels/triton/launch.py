"""How a kernel is started: on the device of its tensors, without contraction, and not at all for nothing."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

WARPS = 4
MAX_GRID_COLS = 65535  # the limit of CUDA for a grid's second dimension


def launch(kernel: Any, grid: tuple[int, int], first: Tensor, *others: Any, **constants: Any) -> None:
    """Run `kernel(first, *others, **constants)` over `grid`, on the device of `first`, each operation rounded."""
    if 0 in grid:
        return
    assert grid[1] <= MAX_GRID_COLS, f"a grid of {grid[1]} columns"
    run: Callable[..., Any] = kernel[grid]
    device = first.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        run(first, *others, **constants, num_warps=WARPS, enable_fp_fusion=False)


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this folder was imported: kernels then run on CPU tensors, slowly."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(_nothing, InterpretedFunction)


@triton.jit
def _nothing():
    pass
