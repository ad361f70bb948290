"""Compile every kernel for GPUs that need not be there, and print what each one's assembly does, as JSON.

Run in a process of its own: in the test run Triton interprets kernels instead of compiling them.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spp.kernels.triton import build_kernel, reduce_kernel

DIVISIBLE = [["tt.divisibility", 16]]
FLOAT_ARITHMETIC = r"\b((?:fma|mad|mul|add|sub|cvt)\.\S*f32)\s"
STORED = {"*fp32": (32, 0x00800000), "*bf16": (16, 0x0080), "*fp16": (16, 0x0001)}


def compiled(kernel: Any, capability: int, types: dict[str, str], **constants: Any) -> list[str]:
    """The float32 instructions of a kernel; scalars are int32, the weight's column stride is 1, others divide by 16."""
    constants |= {"stride_col": 1}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        attrs={(i,): DIVISIBLE for i, name in enumerate(names) if name not in constants and name != "r"},
    )
    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": False})
    assert len(result.asm["cubin"]) > 1000
    return sorted(set(re.findall(FLOAT_ARITHMETIC, result.asm["ptx"])))


def main(capability: int) -> None:
    """Compile for one capability."""
    found = {}
    for stored, (bits, smallest) in STORED.items():
        for delta in (False, True):
            found[f"build {stored} {'delta' if delta else 'effective'}"] = compiled(
                build_kernel._build_kernel,
                capability,
                {"weight_ptr": stored, "alpha_ptr": "*fp32", "scaled_beta_ptr": "*fp32", "out_ptr": stored},
                DELTA=delta,
                SMALLEST=smallest,
                BITS=bits,
                BLOCK_ROWS=build_kernel.BLOCK_ROWS,
                BLOCK_COLS=build_kernel.BLOCK_COLS,
            )
        pointers = ("alpha_ptr", "scaled_beta_ptr", "part_alpha_ptr", "part_beta_ptr")
        for rows in (reduce_kernel.LEAST_ROWS, reduce_kernel.MOST_ROWS):
            found[f"reduce {stored} {rows}"] = compiled(
                reduce_kernel._reduce_kernel,
                capability,
                {"weight_ptr": stored, "gradient_ptr": stored, **dict.fromkeys(pointers, "*fp32")},
                WITH_ALPHA=True,
                WITH_BETA=True,
                SPLIT_ROWS=reduce_kernel.SPLIT_ROWS,
                LOOP_ROWS=reduce_kernel.SPLIT_ROWS,
                BLOCK_ROWS=rows,
                BLOCK_COLS=reduce_kernel.BLOCK_COLS,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
