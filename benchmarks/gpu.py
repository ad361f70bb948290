"""All that is known about SPP on a GPU, in one run: are the kernels right, and how fast is a step.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --interpret             the checks alone, on a CPU, by Triton's interpreter

First every kernel and every path is compared with float64 or with the CPU's bits (benchmarks.gpu_checks), then the
kernels are timed by themselves (gpu_kernels), then a training step of whole layers against PEFT's LoRA and HiRA, full
fine-tuning, a frozen layer and the bare products (gpu_layers), with the peak memory of each in a fresh process. Exits
with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_kernels, gpu_layers
from benchmarks.layer import check_layer_options
from spp.cli.options import spoken
from spp.comparing import measure as harness
from spp.errors import ConfigError, DependencyError, SPPError
from spp.weights import PackedWeight

LAYERS = ("4096x4096", "11008x4096")
MEMORY_STEPS = 2
IN_MEMORY = ("spp", "spp-packed", "spp-input-dropout", "lora", "hira", "full", "frozen")


def check(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the checks, print what fails and how many passed; return a row for each."""
    device = torch.device(options.device)
    dtypes = [torch.float32, torch.float16]
    if device.type == "cuda":
        dtypes.insert(1, torch.bfloat16)  # the interpreter does not round to it
    rows, failed = [], 0
    for found in gpu_checks.run(device, dtypes, large=device.type == "cuda"):
        if not found.passed:
            failed += 1
            print(f"FAILED  {found.what}: {found.found:.3g} above {found.bound:.3g}  ({found.case}, {found.dtype})")
        rows.append({"bench": "gpu check", **vars(found), "passed": found.passed})
    how = "interpreted" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"checks: {len(rows) - failed} passed, {failed} failed ({how}, {len(dtypes)} dtypes)")
    return rows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time kernels and layers, print the tables, return their rows."""
    kernels: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    for m, n in options.layers:
        spec = _spec(options, m, n)
        weight = spec.linear().weight.detach()
        kernels += gpu_kernels.measure(weight, PackedWeight.pack(weight), spec.rank, options.rounds)
        found = gpu_layers.measure(options.contenders, spec, options.tokens, options.rounds, options.steps)
        for row in found:
            if options.memory:
                row["peak_bytes"] = _peak(options, row) if row["contender"] in IN_MEMORY else None
        layers += found
        products += gpu_layers.measure_semi_structured(spec, options.tokens, options.rounds, options.steps)
    for table in (gpu_kernels.table(kernels), gpu_layers.table(layers), gpu_layers.product_table(products)):
        print(f"\n{table.text()}")
    return [*kernels, *layers, *products]


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Check every kernel on a GPU against float64, and time SPP against its peers."
    )
    parser.add_argument("--interpret", action="store_true", help="only the checks, on the CPU, by Triton's interpreter")
    parser.add_argument("--checks-only", action="store_true", help="only the checks, on the GPU")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=list(LAYERS),
        metavar="MxN",
        help=f"out × in features (default: {' '.join(LAYERS)})",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="rows of X (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="r of SPP (default: %(default)s)")
    parser.add_argument("--peft-rank", type=int, default=8, help="r of LoRA and HiRA (default: %(default)s)")
    parser.add_argument("--pattern", default="2:4", help="zeros of the weights (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn (default: %(default)s)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(gpu_layers.CONTENDERS),
        choices=gpu_layers.CONTENDERS,
        metavar="NAME",
        help=f"of {', '.join(gpu_layers.CONTENDERS)} (default: all that the GPU can run)",
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds that count (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: %(default)s)")
    told = "of weights and activations (default: %(default)s)"
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help=told)
    parser.add_argument("--out", type=Path, help="write all rows as JSON to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out")
    parser.set_defaults(plot=None, threads=None)
    options = parser.parse_args(arguments)
    if options.interpret:
        _interpret()
        options.device, options.dtype = "cpu", "float32"
    elif not torch.cuda.is_available():
        raise ConfigError(
            f"this torch ({torch.__version__}) finds no CUDA device; --interpret runs the checks on the CPU"
        )
    elif not options.device.startswith("cuda"):
        raise ConfigError(f"--device is {options.device!r}; it must be cuda or cuda:N, or pass --interpret")
    harness.check_common_options(options)
    tokens = options.tokens
    options.tokens = [tokens]
    check_layer_options(options)
    options.tokens = tokens
    if options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}; it must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.gpu") -> None:
    """Run the checks and the benchmark, print the tables; `--out` writes all rows as JSON."""
    options = parse(arguments, prog)
    if options.child:
        ((m, n),) = options.layers
        step, _ = gpu_layers.make_step(options.child, _spec(options, m, n), options.tokens)
        memory = harness.measure_memory(step, calls=MEMORY_STEPS, device=options.device)
        print(json.dumps({"rest": memory.rest, "peak": memory.peak}))
        return
    rows = check(options)
    failed = [row for row in rows if not row["passed"]]
    if not options.interpret and not options.checks_only:
        rows += measure(options)
    environment = harness.environment(options.device, getattr(torch, options.dtype))
    print(harness.environment_line(environment))
    if options.out:
        harness.write_rows([{**environment, **row} for row in rows], options.out, overwrite=options.overwrite)
        print(f"wrote {options.out}")
    if failed:
        raise SPPError(f"{len(failed)} of the checks failed; the first: {failed[0]['what']}, {failed[0]['case']}")


def _spec(options: argparse.Namespace, m: int, n: int) -> gpu_layers.SharedSpec:
    dtype = getattr(torch, options.dtype)
    return gpu_layers.SharedSpec(m, n, dtype, options.device, options.pattern, options.rank, options.peft_rank)


def _peak(options: argparse.Namespace, row: dict[str, Any]) -> int:
    arguments = ["--child", row["contender"], "--layers", f"{row['out_features']}x{row['in_features']}"]
    for name in ("tokens", "rank", "peft_rank", "pattern", "device", "dtype"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return int(harness.in_child("benchmarks.gpu", arguments)["peak"])


def _interpret() -> None:
    """Have Triton interpret kernels, which it decides when they are defined."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from spp.kernels.triton import is_interpreted
    except ImportError as error:
        raise DependencyError("--interpret needs triton: pip install 'spp[gpu]'") from error
    if not is_interpreted():
        raise ConfigError("--interpret comes too late: the kernels were compiled by something that ran before")


if __name__ == "__main__":
    try:
        main()
    except SPPError as error:
        sys.exit(f"error: {spoken(error, None)}")
