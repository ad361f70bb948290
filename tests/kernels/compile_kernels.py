"""Compile every kernel for GPUs that need not be there, and print what each one's assembly does, as JSON.

Run in a process of its own: in the test run Triton interprets kernels instead of compiling them.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spp.kernels.triton import build_kernel, decode_kernel, quantise_kernel, reduce_kernel
from spp.kernels.triton.tile import operand
from spp.packed import PackedWeight

DIVISIBLE = [["tt.divisibility", 16]]
FLOAT_ARITHMETIC = r"\b((?:fma|mad|mul|add|sub|cvt)\.\S*f32)\s"
STORED = {"*fp32": (32, torch.float32), "*bf16": (16, torch.bfloat16), "*fp16": (16, torch.float16)}
POINTERS = {"codes_ptr": "*u8", "starts_ptr": "*i32"} | dict.fromkeys(
    ("alpha_ptr", "scaled_beta_ptr", "part_alpha_ptr", "part_beta_ptr"), "*fp32"
)


def forms() -> dict[str, dict[str, int]]:
    """The constants of every form of W."""
    group = torch.eye(8).view(1, 64)
    matrices = {
        "dense": torch.ones(2, 64),
        "any pattern": PackedWeight.pack((torch.arange(128.0) % 3).view(2, 64)),
        "2:4": PackedWeight.pack(torch.tensor([[1.0, 2.0, 0.0, 0.0]]).repeat(2, 16)),
        "1:8": PackedWeight.pack(group),
    }
    found = {name: operand(matrix)[2] for name, matrix in matrices.items()}
    assert sorted(constants["FORM"] for constants in found.values()) == [0, 1, 2, 3]
    return found


def compiled(kernel: Any, capability: int, weight: str, **constants: Any) -> list[str]:
    """The float32 instructions of a kernel for a W with adjacent columns, and arguments that 16 divides."""
    if constants.get("FORM", 0) == 0:
        constants |= {"stride_col": 1}
    names = kernel.arg_names
    types = {name: weight for name in ("weight_ptr", "values_ptr", "gradient_ptr", "x_ptr", "out_ptr")} | POINTERS
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
    """Compile for one capability: every dtype of a dense W, and on Hopper every form of W in bfloat16."""
    found = {}
    for form, constants in forms().items():
        if form != "dense" and capability < 90:
            continue
        for stored, (bits, dtype) in STORED.items() if form == "dense" else [("*bf16", STORED["*bf16"])]:
            for delta in (False, True):
                found[f"{'delta' if delta else 'build'} {form} {stored}"] = compiled(
                    build_kernel._build_kernel,
                    capability,
                    stored,
                    **constants,
                    DELTA=delta,
                    SMALLEST=build_kernel.smallest_bits(dtype),
                    WEIGHT_BITS=bits,
                    BLOCK_ROWS=build_kernel.BLOCK_ROWS,
                    BLOCK_COLS=build_kernel.BLOCK_COLS,
                )
            for rows in (reduce_kernel.LEAST_ROWS, reduce_kernel.MOST_ROWS):
                found[f"reduce {form} {stored} {rows}"] = compiled(
                    reduce_kernel._reduce_kernel,
                    capability,
                    stored,
                    **constants,
                    WITH_ALPHA=True,
                    WITH_BETA=True,
                    SPLIT_ROWS=reduce_kernel.SPLIT_ROWS,
                    LOOP_ROWS=reduce_kernel.SPLIT_ROWS,
                    BLOCK_ROWS=rows,
                    BLOCK_COLS=reduce_kernel.BLOCK_COLS,
                )
        if form != "dense":
            found[f"decode {form} *bf16"] = compiled(
                decode_kernel._decode_kernel,
                capability,
                "*bf16",
                **constants,
                BLOCK_ROWS=decode_kernel.BLOCK_ROWS,
                BLOCK_COLS=decode_kernel.BLOCK_COLS,
            )
    POINTERS["inverse_ptr"], POINTERS["out_ptr"] = "*fp32", "*u8"
    kernel = quantise_kernel._quantise_kernel
    found["quantise *bf16"] = compiled(kernel, capability, "*bf16", BLOCK=quantise_kernel.BLOCK)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
