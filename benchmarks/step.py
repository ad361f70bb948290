"""One training step of a whole model: SPP against PEFT's LoRA and HiRA on the same seven projections.

A step is forward with labels, backward and AdamW; contenders take turns in one process, each on its own copy of the
same pruned model and the same tokens. Peak memory is measured in a fresh process for each contender.

    python -m benchmarks.step --model DIR --rounds 10        python -m benchmarks.step --shape smollm2 --out step.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.trained import (
    MEMORY_STEPS,
    Training,
    add_contenders_option,
    add_training_options,
    check_training_options,
    conditions,
    describe,
    measure_in_child,
)
from spp.report import Table, byte_text


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a contender: times, ratios to the first contender, memory, environment."""
    memory = {name: _memory_of(options, name) for name in options.contenders} if options.memory else {}
    made = {name: Training(options, name) for name in options.contenders}
    samples = harness.interleave(
        {name: training.step for name, training in made.items()},
        rounds=options.rounds,
        warmup=options.warmup,
        device=options.device,
    )
    environment = harness.environment(options.device, getattr(torch, options.dtype)).to_dict()
    rows = []
    for name, fields in harness.compare(samples).items():
        row: dict[str, Any] = {
            "bench": "step",
            **conditions(options, name),
            "trainable": made[name].parameters(),
            "rounds": options.rounds,
            **fields,
            **environment,
        }
        if memory:
            row["rest_bytes"], row["peak_bytes"] = memory[name].rest, memory[name].peak
            row["reference_to_this_peak"] = memory[options.contenders[0]].peak / memory[name].peak
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table whose ratios are of the first contender to the one in the row."""
    first = rows[0]["contender"]
    columns = ["contender", "trainable", "step", f"{first} / this", "processor time"]
    if "peak_bytes" in rows[0]:
        columns += ["peak memory", f"{first} / this"]
    lines = []
    for row in rows:
        wall, process = (harness.Spread(**row[f"reference_to_this_{clock}"]) for clock in ("wall", "process"))
        line = [
            row["contender"],
            str(row["trainable"]),
            f"{row['wall_s']['median']:.3f} s",
            str(wall),
            str(process),
        ]
        if "peak_bytes" in row:
            line += [byte_text(row["peak_bytes"]), f"{row['reference_to_this_peak']:.3f}"]
        lines.append(tuple(line))
    return Table(f"one training step: {describe(rows[0])}; median (p20 … p80)", tuple(columns), tuple(lines))


def plot(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the chart of `--plot`."""
    harness.plot_ratios({describe(rows[0]): rows}, "one training step", rows[0], options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = harness.parser("step", "Time one training step of SPP against PEFT's LoRA and HiRA, interleaved.")
    add_training_options(parser)
    add_contenders_option(parser, ("spp", "lora", "hira"))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    harness.add_common_options(parser)
    harness.add_timing_options(parser)
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    check_training_options(options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON, `--plot` a chart."""
    harness.run(parse(arguments), memory_here, measure, table, plot)


def memory_here(options: argparse.Namespace) -> harness.Memory:
    """Return what the steps of one contender take in this process."""
    step = Training(options, options.child).step
    return harness.measure_memory(step, calls=MEMORY_STEPS, device=options.device)


def _memory_of(options: argparse.Namespace, name: str) -> harness.Memory:
    return harness.Memory(**measure_in_child("benchmarks.step", options, name))


if __name__ == "__main__":
    harness.exiting(main)
