"""All that is known about SPP on a GPU, in one run: are the kernels right, and how fast is a step.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --interpret             the checks alone, on a CPU, by Triton's interpreter

First every kernel and every path is compared with float64 or with the CPU's bits (benchmarks.gpu_checks), then the
kernels are timed by themselves, beside a copy of the same device, then a training step of whole layers in every mode
against the contenders of benchmarks.adapted, with the peak memory of some in a fresh process. Exits with 1 if a check
fails. Contenders of a GPU alone:

    spp-torch          the same arithmetic by plain torch instead of Triton's kernels
    spp-packed         packed weights, in the pattern of the run
    spp-packed-any     packed weights that are half zeros without a pattern
    lora-16bit, hira-16bit
                       PEFT's adapters in the dtype of the weights; left to itself PEFT keeps them in float32

All layers share one X and one dY, and those of one pattern one W: a GPU has little memory for fifteen copies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu_checks, harness
from benchmarks.adapted import BETA, SCALING, LayerSpec, Products, make_layer
from benchmarks.layer import add_layer_options, check_layer_options, layer_conditions
from spp.errors import ConfigError, DependencyError, SPPError
from spp.kernels import use_kernels
from spp.kernels.gpu import gradient_step, work_for
from spp.layers.linear import SPPLinear
from spp.masks.patterns import Pattern
from spp.packing.semi_structured import sparse_weight
from spp.pruning import magnitude_mask
from spp.report import Table, byte_text
from spp.rules import get_rule
from spp.weights import PackedWeight
from spp.weights.base import DenseWeight

LAYERS = ["4096x4096", "11008x4096"]
MEMORY_STEPS = 2
IN_MEMORY = ("spp", "spp-packed", "spp-input-dropout", "lora", "hira", "full", "frozen")
ANY_PATTERN = "0.5"
REFERENCES = ("lora", "lora-16bit", "hira", "full")  # what ratios are taken to, where they run
CONTENDERS = (
    *("spp", "spp-torch", "spp-packed", "spp-packed-any", "spp-input-dropout", "spp-alpha-dropout"),
    *("lora", "lora-16bit", "hira", "hira-16bit", "branches", "full", "frozen", "products"),
)
CALLS = 20  # of a kernel between two looks at the clock: what starting one costs is hidden, as in a training step
Step = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks and the benchmark, print the tables; `--out` writes all rows as JSON."""
    options = parse(arguments)
    if options.child:
        ((m, n),), (tokens,) = options.layers, options.tokens
        step, _ = make_step(options.child, _spec(options, m, n), tokens)
        print(json.dumps(vars(harness.measure_memory(step, calls=MEMORY_STEPS, device=options.device))))
        return
    rows = check(options)
    failed = [row for row in rows if not row["passed"]]
    if not options.interpret and not options.checks_only:
        rows += measure(options)
    environment = harness.environment(options.device, getattr(torch, options.dtype))
    print(environment.line)
    if options.out:
        harness.write_rows([{**environment.to_dict(), **row} for row in rows], options.out, overwrite=options.overwrite)
    if failed:
        raise SPPError(f"{len(failed)} of the checks failed; the first: {failed[0]['what']}, {failed[0]['case']}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = harness.parser("gpu", "Check every kernel on a GPU against float64, and time SPP against its peers.")
    parser.add_argument("--interpret", action="store_true", help="only the checks, on the CPU, by Triton's interpreter")
    parser.add_argument("--checks-only", action="store_true", help="only the checks, on the GPU")
    add_layer_options(parser, layers=LAYERS, tokens=16384)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn (default: %(default)s)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(CONTENDERS),
        choices=CONTENDERS,
        metavar="NAME",
        help=f"of {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    harness.add_timing_options(parser)
    harness.add_common_options(parser, device="cuda", dtype="bfloat16", plot=False)
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
    check_layer_options(options)
    harness.require_positive(options, "steps")
    return options


def _interpret() -> None:
    """Have Triton interpret kernels, which it decides when they are defined."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from spp.kernels.triton import is_interpreted
    except ImportError as error:
        raise DependencyError("--interpret needs triton: pip install 'spp[gpu]'") from error
    if not is_interpreted():
        raise ConfigError("--interpret comes too late: the kernels were compiled by something that ran before")


def check(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the checks, print what fails and how many passed; return a row for each."""
    device = torch.device(options.device)
    dtypes = [torch.float32, torch.float16]
    if device.type == "cuda":
        dtypes.insert(1, torch.bfloat16)  # the interpreter does not round to it
    rows = []
    for found in gpu_checks.run(device, dtypes, large=device.type == "cuda"):
        if not found.passed:
            print(f"FAILED  {found.what}: {found.found:.3g} above {found.bound:.3g}  ({found.case}, {found.dtype})")
        rows.append({"bench": "gpu check", **vars(found), "passed": found.passed})
    passed = sum(row["passed"] for row in rows)
    how = "interpreted" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"checks: {passed} passed, {len(rows) - passed} failed ({how}, {len(dtypes)} dtypes)")
    return rows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time kernels, layers and products, print their tables, return their rows."""
    kernels: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    for m, n in options.layers:
        spec = _spec(options, m, n)
        kernels += measure_kernels(spec, options)
        for tokens in options.tokens:
            layers += measure_layers(spec, tokens, options)
            products += measure_products(spec, tokens, options)
    for table in (kernel_table(kernels), layer_table(layers), product_table(products)):
        print(f"\n{table.text()}")
    return [*kernels, *layers, *products]


def _spec(options: argparse.Namespace, m: int, n: int) -> SharedSpec:
    dtype = getattr(torch, options.dtype)
    return SharedSpec(m, n, dtype, options.device, options.pattern, options.rank, options.peft_rank)


def _time(calls: Mapping[str, Step], times: int, options: argparse.Namespace) -> dict[str, list[harness.Sample]]:
    """Time calls in turns, each `times` times without waiting in between, as training does; samples are of one."""
    repeated = {name: _repeat(call, times) for name, call in calls.items()}
    samples = harness.interleave(repeated, rounds=options.rounds, warmup=options.warmup, device=options.device)
    return {
        name: [harness.Sample(sample.wall / times, sample.process / times) for sample in found]
        for name, found in samples.items()
    }


def _repeat(call: Step, times: int) -> Step:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _wall(samples: Sequence[harness.Sample]) -> dict[str, float]:
    return asdict(harness.spread([sample.wall for sample in samples]))


# ---- The kernels by themselves: time, and bytes that must move once: W or its packed form, W_eff, G.


def measure_kernels(spec: SharedSpec, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each kernel."""
    weight, rule, whole = _weight(spec), get_rule("spp"), slice(None)
    packed = PackedWeight.pack(weight)
    (m, n), device = weight.shape, weight.device
    alpha, beta = torch.randn(spec.rank, n, device=device), torch.randn(m, 1, device=device)
    factors = rule.prepare((alpha, beta), SCALING, m, torch.float32)
    step = gradient_step(m, n, weight.element_size(), device)
    gradient = torch.randn(m, step, device=device, dtype=weight.dtype)
    grads = rule.empty_grads(factors, (True, True))
    copy = torch.empty_like(weight)
    dense, small = (work_for(rule, source, factors) for source in (DenseWeight(weight), packed))
    part = slice(0, step)
    kernels: dict[str, tuple[Step, int]] = {
        "copy of W": (lambda: copy.copy_(weight), 2 * weight.nbytes),
        "W_eff": (lambda: dense.effective(weight.dtype), 2 * weight.nbytes),
        "W_eff, packed": (lambda: small.effective(weight.dtype), packed.nbytes + weight.nbytes),
        "W, packed": (lambda: small.weight.block(whole, whole), packed.nbytes + weight.nbytes),
        f"dα, dβ of {step} columns": (
            lambda: dense.reduce(part, gradient, grads, accumulate=True),
            2 * gradient.nbytes,
        ),
        f"dα, dβ of {step} columns, packed": (
            lambda: small.reduce(part, gradient, grads, accumulate=True),
            packed.nbytes * step // n + gradient.nbytes,
        ),
    }
    samples = _time({name: call for name, (call, _) in kernels.items()}, CALLS, options)
    rows = []
    for name, (_, moved) in kernels.items():
        seconds = _wall(samples[name])["median"]
        row = {"bench": "gpu kernel", "kernel": name, "out_features": m, "in_features": n, "seconds": seconds}
        rows.append({**row, "bytes": moved, "bytes_per_second": moved / seconds})
    return rows


def kernel_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_kernels` as a table."""
    lines = [
        (_layer(row), row["kernel"], f"{row['seconds'] * 1e6:.1f} µs", f"{row['bytes_per_second'] / 1e9:.0f} GB/s")
        for row in rows
    ]
    return Table("the kernels by themselves, medians", ("layer", "kernel", "time", "moved"), tuple(lines))


def _layer(row: Mapping[str, Any]) -> str:
    return f"{row['out_features']} × {row['in_features']}"


# ---- One training step of one layer, against its peers and against the products alone.


@dataclass(frozen=True)
class SharedSpec(LayerSpec):
    """A layer whose weight is made once, on the device."""

    def linear(self) -> nn.Linear:
        """Return the pruned layer; its Parameter is a new one, its memory is not."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(_weight(self))
        return linear


@lru_cache(maxsize=2)
def _weight(spec: SharedSpec) -> Tensor:
    m, n = spec.out_features, spec.in_features
    generator = torch.Generator(spec.device).manual_seed(0)
    weight = torch.empty(m, n, device=spec.device).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    return weight.mul_(magnitude_mask(weight, Pattern.parse(spec.pattern))).to(spec.dtype)


@lru_cache(maxsize=1)
def _inputs(tokens: int, m: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(2)
    x, dy = (torch.randn(tokens, k, generator=generator, device=device, dtype=dtype) for k in (n, m))
    return x.requires_grad_(), dy


def make_step(name: str, spec: SharedSpec, tokens: int) -> tuple[Step, int]:
    """Return one contender's step on X (tokens, n), and the number of its trainable parameters."""
    layer = make_shared(name, spec)
    x, dy = _inputs(tokens, spec.out_features, spec.in_features, spec.dtype, spec.device)
    if isinstance(layer, Products):
        return lambda: layer.step(x, dy), layer.weight.numel()
    trained = [p for p in layer.parameters() if p.requires_grad]

    def step() -> None:
        for tensor in (x, *trained):
            tensor.grad = None
        with use_kernels("torch") if name == "spp-torch" else contextlib.nullcontext():
            layer(x).backward(dy)

    return step, sum(p.numel() for p in trained)


def make_shared(name: str, spec: SharedSpec) -> nn.Module:
    """Return a contender, also one of a GPU alone."""
    if name.startswith("spp-packed"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            spec = replace(spec, pattern=ANY_PATTERN) if name == "spp-packed-any" else spec
            layer = SPPLinear(spec.linear(), spec.rank, SCALING, packed=True)
            nn.init.normal_(layer.spp_beta, 0, BETA)
        return layer.train()
    made = make_layer(name.removesuffix("-16bit").removesuffix("-torch"), spec)
    return made.to(spec.dtype) if name.endswith("-16bit") else made


def measure_layers(spec: SharedSpec, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a contender."""
    made = {name: make_step(name, spec, tokens) for name in options.contenders}
    samples = _time({name: step for name, (step, _) in made.items()}, options.steps, options)
    rows = []
    for name, (_, trainable) in made.items():
        row = {"bench": "gpu layer", **layer_conditions(spec, tokens, name), "trainable": trainable}
        row |= {"rounds": options.rounds, "wall_s": _wall(samples[name])}
        if name == "spp-packed-any":
            row["pattern"] = ANY_PATTERN
        for reference in (name for name in REFERENCES if name in samples):
            row[f"this_to_{reference}"] = asdict(harness.ratio(samples[name], samples[reference]))
        if options.memory:
            row["peak_bytes"] = _peak(options, row) if name in IN_MEMORY else None
        rows.append(row)
    return rows


def _peak(options: argparse.Namespace, row: Mapping[str, Any]) -> int:
    arguments = ["--child", row["contender"], "--layers", f"{row['out_features']}x{row['in_features']}"]
    arguments += ["--tokens", str(row["tokens"])]
    shared = harness.child_arguments(options, "rank", "peft-rank", "pattern", "device", "dtype")
    return int(harness.in_child("benchmarks.gpu", [*arguments, *shared])["peak"])


def layer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_layers` as a table."""
    references = [name for name in REFERENCES if f"this_to_{name}" in rows[0]]
    memory = ("peak memory",) if "peak_bytes" in rows[0] else ()
    lines = []
    for row in rows:
        line = [_layer(row), str(row["tokens"]), row["contender"], f"{row['wall_s']['median'] * 1e3:.3f} ms"]
        line += [f"{row[f'this_to_{name}']['median']:.3f}" for name in references]
        if memory:
            line.append("–" if row["peak_bytes"] is None else byte_text(row["peak_bytes"]))
        lines.append(tuple(line))
    columns = ("layer", "tokens", "contender", "step", *(f"this / {name}" for name in references), *memory)
    return Table(f"one training step of a layer, {rows[0]['pattern']}; medians", columns, tuple(lines))


# ---- X Wᵀ alone: dense, and with torch's semi-structured 2:4 weight where there is one.


def measure_products(spec: SharedSpec, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of X Wᵀ alone."""
    weight = _weight(spec)
    x = _inputs(tokens, spec.out_features, spec.in_features, spec.dtype, spec.device)[0].detach()
    calls: dict[str, Step] = {"dense": lambda: F.linear(x, weight)}
    reason = None
    try:
        sparse = sparse_weight(weight, x)
        calls["semi-structured"] = lambda: F.linear(x, sparse)
    except ConfigError as error:
        reason = str(error)
    samples = _time(calls, options.steps, options)
    shape = {"out_features": spec.out_features, "in_features": spec.in_features, "tokens": tokens}
    rows: list[dict[str, Any]] = []
    for name in calls:
        ratio = asdict(harness.ratio(samples[name], samples["dense"]))
        row = {"bench": "gpu product", "weight": name, **shape, "wall_s": _wall(samples[name]), "this_to_dense": ratio}
        rows.append(row)
    if reason:
        rows.append({**rows[0], "weight": f"semi-structured: {reason}", "wall_s": None, "this_to_dense": None})
    return rows


def product_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_products` as a table."""
    lines = []
    for row in rows:
        found = ("–", "–")
        if row["wall_s"]:
            found = (f"{row['wall_s']['median'] * 1e3:.3f} ms", f"{row['this_to_dense']['median']:.3f}")
        lines.append((_layer(row), str(row["tokens"]), row["weight"], *found))
    return Table("X Wᵀ alone", ("layer", "tokens", "weight", "time", "this / dense"), tuple(lines))


if __name__ == "__main__":
    harness.exiting(main)
