"""Compile every kernel, as its own launcher would start it, for a GPU that need not be there; print what it became.

Run in a process of its own: in the test run Triton interprets kernels instead of compiling them. Its argument is a
JSON object: the forms of W for each capability. Prints another: for each capability, kernel and case, its float32
instructions and the widths of its loads and stores.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from spp.kernels.triton import (
    build,
    build_kernel,
    decode,
    delta,
    reduce,
    reduce_kernel,
    tile,
)
from spp.rules import get_rule
from spp.weights import PackedWeight

FLOAT_ARITHMETIC = r"\b((?:fma|mad|mul|add|sub|cvt)\.\S*f32)\s"
ACCESS = r"\b((?:ld|st)\.global\S*)\s"
M, N, R = 128, 512, 16
WHOLE = slice(None)


class NoDevice:
    """What Triton asks its driver for before it starts a kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by the device's number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiler:
    """Stands in for `launch`: compiles, and remembers what came out under the name of the case."""

    def __init__(self, capability: int) -> None:
        self.target = f".target sm_{capability}"
        self.case = ""
        self.found: dict[str, dict[str, list[str]]] = {}

    def __call__(self, kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, num_warps=4, enable_fp_fusion=False, **constants)
        assert len(compiled.asm["cubin"]) > 1000
        assembly = compiled.asm["ptx"]
        assert self.target in assembly and self.case not in self.found
        self.found[self.case] = {
            "arithmetic": sorted(set(re.findall(FLOAT_ARITHMETIC, assembly))),
            "access": sorted(set(re.findall(ACCESS, assembly))),
        }


def matrices() -> dict[str, torch.Tensor | PackedWeight]:
    """W in every form."""
    pattern = {"2:4": [1, 1, 0, 0], "any pattern": [1, 1, 1, 0, 0, 1, 0, 0]}
    found: dict[str, torch.Tensor | PackedWeight] = {"dense": torch.ones(M, N)}
    for name, kept in pattern.items():
        found[name] = PackedWeight.pack(torch.tensor(kept).repeat(M, N // len(kept)).float())
    return found


def in_dtype(matrix: torch.Tensor | PackedWeight, dtype: torch.dtype) -> torch.Tensor | PackedWeight:
    """The same matrix, its values converted."""
    if isinstance(matrix, torch.Tensor):
        return matrix.to(dtype)
    return PackedWeight(matrix.layout, matrix.values.to(dtype), matrix.codes, matrix.starts)


def compile_for(capability: int, forms: list[str]) -> dict[str, dict[str, list[str]]]:
    """Compile for one capability: every dtype of a dense W, the packed forms in bfloat16."""
    driver.set_active(NoDevice(capability))
    compiler = Compiler(capability)
    for module in (build_kernel, reduce_kernel, tile):
        module.launch = compiler  # type: ignore[assignment]
    rule = get_rule("spp")
    factors = rule.prepare((torch.ones(R, N), torch.ones(M, 1)), 2.0, M, torch.float32)

    def compile_case(case: str, call: Callable[..., object], *arguments: Any, **options: Any) -> None:
        compiler.case = case
        call(*arguments, **options)

    for form in forms:
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if form == "dense" else (torch.bfloat16,):
            weight = in_dtype(matrices()[form], dtype)
            name = f"{form} {str(dtype).removeprefix('torch.')}"
            for product in (dtype, torch.bfloat16) if dtype == torch.float32 else (dtype,):
                out = torch.empty(M, N, dtype=product)
                compile_case(f"build {name} for {product}", build, weight, factors, out)
                compile_case(f"delta {name} for {product}", delta, weight, factors, out)
            for columns in (slice(256, N), slice(0, N)):
                gradient = torch.empty(M, len(range(N)[columns]), dtype=dtype)
                grads = rule.empty_grads(factors, (True, True))
                name_of_part = f"reduce {name} from {columns.start}"
                compile_case(name_of_part, reduce, weight, factors, columns, gradient, grads, accumulate=True)
            if isinstance(weight, PackedWeight):
                compile_case(f"decode {name}", decode, weight, WHOLE, WHOLE, out)
    return compiler.found


if __name__ == "__main__":
    print(json.dumps({name: compile_for(int(name), forms) for name, forms in json.loads(sys.argv[1]).items()}))
