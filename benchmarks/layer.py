"""One training step of one linear layer: SPP against its peers, and against the products that no form can avoid.

A step is the forward of X (T, n) and the backward of a given dY (T, m), to the gradients of X and of what the
contender trains. The contenders are those of benchmarks.adapted; they take turns in one process on the same weights.

    python -m benchmarks.layer --layers 4096x4096 --tokens 512 2048        python -m benchmarks.layer --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.adapted import LayerSpec, LayerStep, Products, contenders
from benchmarks.plot import plot_ratios
from benchmarks.saved import saved_bytes
from spp.cli.options import spoken
from spp.comparing import measure as harness
from spp.errors import ConfigError, SPPError
from spp.masks.patterns import Pattern
from spp.report import Table, byte_text

MEMORY = ("peak", "saved", "saved_beyond_x")
MEMORY_STEPS = 3


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for every shape, number of tokens and contender."""
    environment = harness.environment(options.device, getattr(torch, options.dtype))
    found = []
    for spec in layer_specs(options):
        for tokens in options.tokens:
            memory = {name: _memory_of(options, spec, tokens, name) for name in options.contenders if options.memory}
            made = {name: LayerStep(name, spec, tokens) for name in options.contenders}
            samples = harness.interleave(
                {name: made[name].step for name in made},
                rounds=options.rounds,
                warmup=options.warmup,
                device=options.device,
            )
            for name, fields in harness.compare(samples).items():
                found.append(
                    {
                        "bench": "layer",
                        **layer_conditions(spec, tokens, name),
                        "trainable": made[name].parameters(),
                        "rounds": options.rounds,
                        **fields,
                        **memory.get(name, {}),
                        **environment,
                    }
                )
    return found


def layer_specs(options: argparse.Namespace) -> list[LayerSpec]:
    """Return the layers of `add_layer_options`."""
    dtype = getattr(torch, options.dtype)
    rest = (dtype, options.device, options.pattern, options.rank, options.peft_rank)
    return [LayerSpec(m, n, *rest) for m, n in options.layers]


def layer_conditions(spec: LayerSpec, tokens: int, name: str) -> dict[str, Any]:
    """Return the fields of a row that say what was run."""
    return {
        "contender": name,
        "out_features": spec.out_features,
        "in_features": spec.in_features,
        "tokens": tokens,
        "pattern": spec.pattern,
        "rank": spec.rank_of(name),
    }


def memory_here(step: LayerStep, device: str) -> dict[str, int]:
    """Return what a contender takes in this process: at the peak above what it holds at rest, and for backward."""
    memory = harness.measure_memory(step.step, calls=MEMORY_STEPS, device=device)
    found = {"peak_bytes": memory.peak - memory.rest, "saved_bytes": 0, "saved_beyond_x_bytes": 0}
    if not isinstance(step.layer, Products):
        found["saved_bytes"] = saved_bytes(step.forward, step.layer)
        found["saved_beyond_x_bytes"] = saved_bytes(step.forward, step.layer, [step.x])
    return found


def _memory_of(options: argparse.Namespace, spec: LayerSpec, tokens: int, name: str) -> dict[str, int]:
    layer = f"{spec.out_features}x{spec.in_features}"
    arguments = ["--child", name, "--layers", layer, "--tokens", str(tokens), "--pattern", options.pattern]
    for option in ("rank", "peft-rank", "device", "dtype", "threads"):
        value = getattr(options, option.replace("-", "_"))
        if value is not None:
            arguments += [f"--{option}", str(value)]
    return harness.in_child("benchmarks.layer", arguments)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table whose ratios are of the first contender to the one in the row."""
    first = rows[0]["reference"]
    lines = []
    for row in rows:
        lines.append(
            (
                f"{row['out_features']} × {row['in_features']}",
                str(row["tokens"]),
                row["contender"],
                f"{row['wall_s']['median'] * 1e3:.2f} ms",
                *(str(harness.Spread(**row[f"reference_to_this_{clock}"])) for clock in ("wall", "process")),
                *(byte_text(row[f"{what}_bytes"]) for what in MEMORY if f"{what}_bytes" in row),
            )
        )
    columns = ["layer", "tokens", "contender", "step", f"{first} / this", "processor time"]
    if "peak_bytes" in rows[0]:
        columns += ["peak of a step", "kept for backward", "of it beyond X"]
    title = f"one training step of a layer at {rows[0]['pattern']}; median (p20 … p80)"
    return Table(title, tuple(columns), tuple(lines))


def plot(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the chart of `--plot`: a panel for each shape and number of tokens."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(f"{row['out_features']} × {row['in_features']}, {row['tokens']} tokens", []).append(row)
    title = f"one training step of a layer at {rows[0]['pattern']}"
    plot_ratios(panels, title, harness.environment_line(rows[0]), options.plot, overwrite=options.overwrite)


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Time one training step of a linear layer: SPP against its peers, interleaved."
    )
    add_layer_options(parser)
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["spp", "full", "frozen", "branches", "lora", "hira"],
        choices=sorted(contenders()),
        metavar="NAME",
        help=f"of {', '.join(contenders())}; ratios are of the first to the others (default: spp full frozen branches "
        "lora hira)",
    )
    parser.add_argument(
        "--memory", action="store_true", help="also the memory of a step, each contender in a fresh process"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    harness.add_common_options(parser)
    harness.add_timing_options(parser)
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    check_layer_options(options)
    return options


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe layers."""
    parser.add_argument(
        "--layers", nargs="+", default=["4096x4096"], metavar="MxN", help="out × in features (default: 4096x4096)"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[512], help="rows of X (default: 512)")
    parser.add_argument("--rank", type=int, default=16, help="r of SPP (default: 16)")
    parser.add_argument("--peft-rank", type=int, default=8, help="r of LoRA and HiRA (default: 8)")
    parser.add_argument("--pattern", default="2:4", help="zeros of the weights (default: 2:4)")


def check_layer_options(options: argparse.Namespace) -> None:
    """Refuse layers that cannot be; `options.layers` becomes pairs (m, n)."""
    shapes = []
    for layer in options.layers:
        found = re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", layer)
        if not found:
            raise ConfigError(f"--layers has {layer!r}; a layer is out x in features, such as 11008x4096")
        shapes.append((int(found[1]), int(found[2])))
    options.layers = shapes
    for name, values in (("tokens", options.tokens), ("rank", [options.rank]), ("peft-rank", [options.peft_rank])):
        if min(values) < 1:
            raise ConfigError(f"--{name} is {min(values)}; it must be at least 1")
    Pattern.parse(options.pattern)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.layer") -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON, `--plot` a chart."""
    options = parse(arguments, prog)
    if options.child:
        (spec,), (tokens,) = layer_specs(options), options.tokens
        print(json.dumps(memory_here(LayerStep(options.child, spec, tokens), options.device)))
        return
    rows = measure(options)
    harness.finish(rows, table(rows), options, lambda: plot(rows, options))


if __name__ == "__main__":
    try:
        main()
    except SPPError as error:
        sys.exit(f"error: {spoken(error, None)}")
