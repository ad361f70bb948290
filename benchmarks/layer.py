"""One training step of one linear layer: SPP against its peers, and against the products that no form can avoid.

A step is the forward of X (T, n) and the backward of a given dY (T, m), to the gradients of X and of what the
contender trains. The contenders are those of benchmarks.adapted; they take turns in one process on the same weights.

    python -m benchmarks.layer --layers 4096x4096 --tokens 512 2048        python -m benchmarks.layer --dtype bfloat16
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.adapted import LayerSpec, LayerStep, Products, contenders
from spp.errors import ConfigError
from spp.masks.patterns import Pattern
from spp.report import Table, byte_text

MEMORY = ("peak", "saved", "saved_beyond_x")
MEMORY_STEPS = 3


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for every shape, number of tokens and contender."""
    environment = harness.environment(options.device, getattr(torch, options.dtype)).to_dict()
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
        found["saved_bytes"] = harness.saved_bytes(step.forward, step.layer)
        found["saved_beyond_x_bytes"] = harness.saved_bytes(step.forward, step.layer, [step.x])
    return found


def _memory_of(options: argparse.Namespace, spec: LayerSpec, tokens: int, name: str) -> dict[str, int]:
    layer = f"{spec.out_features}x{spec.in_features}"
    shared = harness.child_arguments(options, "pattern", "rank", "peft-rank", "device", "dtype", "threads")
    return harness.in_child("benchmarks.layer", ["--child", name, "--layers", layer, "--tokens", str(tokens), *shared])


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
    harness.plot_ratios(panels, title, rows[0], options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = harness.parser("layer", "Time one training step of a linear layer: SPP against its peers, interleaved.")
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
    harness.add_common_options(parser)
    harness.add_timing_options(parser)
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    check_layer_options(options)
    return options


def add_layer_options(
    parser: argparse.ArgumentParser, layers: Sequence[str] = ("4096x4096",), tokens: int = 512
) -> None:
    """Add the options that describe layers."""
    told = f"out × in features (default: {' '.join(layers)})"
    parser.add_argument("--layers", nargs="+", default=list(layers), metavar="MxN", help=told)
    parser.add_argument("--tokens", nargs="+", type=int, default=[tokens], help=f"rows of X (default: {tokens})")
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
    harness.require_positive(options, "tokens", "rank", "peft-rank")
    Pattern.parse(options.pattern)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON, `--plot` a chart."""
    harness.run(parse(arguments), measure_child, measure, table, plot)


def measure_child(options: argparse.Namespace) -> dict[str, int]:
    """Return what one contender takes in this process."""
    (spec,), (tokens,) = layer_specs(options), options.tokens
    return memory_here(LayerStep(options.child, spec, tokens), options.device)


if __name__ == "__main__":
    harness.exiting(main)
