"""The memory of a training step of a whole model: at its peak, and between forward and backward.

Each contender runs in a fresh process. `at rest` is what that holds before the first step (model, optimizer,
libraries), `peak` the highest point of three steps, `step` the difference, `saved` what autograd keeps from the forward
to the backward beyond the parameters. For one layer: `python -m benchmarks.layer --memory`.

    python -m benchmarks.memory --model DIR        python -m benchmarks.memory --shape smollm2 --batch 4 --tokens 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import harness, trained
from spp.report import Table, byte_text

CONTENDERS = ("spp", "spp-bf16-saved", "spp-chunked-loss", "spp-low-memory", "lora", "hira")


def measure_here(options: argparse.Namespace) -> dict[str, int]:
    """Return what one contender takes in this process."""
    training = trained.Training(options, options.child)
    training.step()  # away from the start, where an adapter has less to keep
    saved = harness.saved_bytes(training.loss, training.model)
    memory = harness.measure_memory(training.step, calls=trained.MEMORY_STEPS, device=options.device)
    return {"rest_bytes": memory.rest, "peak_bytes": memory.peak, "saved_bytes": saved}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a contender."""
    environment = harness.environment(options.device, getattr(torch, options.dtype)).to_dict()
    rows: list[dict[str, Any]] = []
    for name in options.contenders:
        found = trained.measure_in_child("benchmarks.memory", options, name)
        row = {
            "bench": "memory",
            **trained.conditions(options, name),
            **found,
            "step_bytes": found["peak_bytes"] - found["rest_bytes"],
            "reference": options.contenders[0],
        }
        for what in ("peak", "step", "saved"):
            first = rows[0] if rows else row
            this, reference = row[f"{what}_bytes"], first[f"{what}_bytes"]
            row[f"reference_to_this_{what}"] = reference / max(this, 1)  # a small step may fit in what is free
            row[f"this_to_reference_{what}"] = this / max(reference, 1)
        rows.append({**row, **environment})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table whose ratios are of the first contender to the one in the row."""
    ratio = f"{rows[0]['contender']} / this"
    columns = ("contender", "at rest", "peak", ratio, "step", ratio, "saved", ratio)
    lines = []
    for row in rows:
        line = [row["contender"], byte_text(row["rest_bytes"])]
        for what in ("peak", "step", "saved"):
            line += [byte_text(row[f"{what}_bytes"]), f"{row[f'reference_to_this_{what}']:.3f}"]
        lines.append(tuple(line))
    return Table(f"memory of a training step: {trained.describe(rows[0])}", columns, tuple(lines))


def plot(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the chart of `--plot`."""
    fields = {"field": "this_to_reference_peak", "axis": "peak memory"}
    harness.plot_ratios({trained.describe(rows[0]): rows}, "one training step", rows[0], options, **fields)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = harness.parser("memory", "Measure the memory of a training step, each contender in a fresh process.")
    trained.add_training_options(parser)
    trained.add_contenders_option(parser, CONTENDERS)
    harness.add_common_options(parser)
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    trained.check_training_options(options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON, `--plot` a chart."""
    harness.run(parse(arguments), measure_here, measure, table, plot)


if __name__ == "__main__":
    harness.exiting(main)
