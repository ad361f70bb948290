"""Pruning a whole model: each method of `spp.prune` beside the forward passes that no method can avoid.

Contenders take turns in one process on one model, whose dense weights are put back, untimed, before each turn. "floor"
is each block run twice, and nothing else (`benchmarks.floor`). Peak memory above the loaded model is measured in a
fresh process for each contender.

    python -m benchmarks.prune --model DIR --calibration FILE
    python -m benchmarks.prune --shape smollm2 --out prune.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floor import forward_passes
from benchmarks.models import add_model_options, load_dense, model_arguments
from benchmarks.plot import plot_ratios
from spp.cli.options import spoken
from spp.comparing import measure as harness
from spp.configs.pruning import METHODS
from spp.errors import ConfigError, SPPError
from spp.masks.patterns import Pattern
from spp.models.targets import resolve_targets
from spp.pruning import prune
from spp.pruning.windows import calibration_windows
from spp.report import Table, byte_text

FLOOR = "floor"


def load_windows(options: argparse.Namespace, model: nn.Module) -> Tensor:
    """Return the calibration windows (k, L): of the text of --calibration, or random token ids."""
    if options.calibration:
        from spp.training.loading import load_tokenizer

        tokenizer = load_tokenizer(options.model)
        return calibration_windows(
            options.calibration, tokenizer, nsamples=options.windows, seqlen=options.seqlen, seed=0
        )
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (options.windows, options.seqlen), generator=generator)


def make_call(options: argparse.Namespace, name: str, model: nn.Module, windows: Tensor) -> Callable[[], object]:
    """Return one contender's work: the floor's passes, or pruning the model in place."""
    if name == FLOOR:
        return forward_passes(model, windows)
    calibration = windows if METHODS[name].calibrated else None
    return lambda: prune(model, name, options.pattern, calibration, nsamples=len(windows))


def restorer(model: nn.Module) -> Callable[[], None]:
    """Return a call that gives the target layers the weights back that they have now."""
    weights = [module.get_parameter("weight") for _, module in resolve_targets(model)]
    dense = [weight.detach().clone() for weight in weights]

    def restore() -> None:
        with torch.no_grad():
            for weight, value in zip(weights, dense, strict=True):
                weight.copy_(value)

    return restore


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a contender: times, ratios to the floor, memory, environment."""
    contenders = [FLOOR, *options.methods]
    memory = {name: _memory_of(options, name) for name in contenders} if options.memory else {}
    model = load_dense(options)
    windows = load_windows(options, model)
    samples = harness.interleave(
        {name: make_call(options, name, model, windows) for name in contenders},
        rounds=options.rounds,
        warmup=options.warmup,
        device=options.device,
        before=restorer(model),
    )
    environment = harness.environment(options.device, getattr(torch, options.dtype))
    rows = []
    for name, fields in harness.compare(samples).items():
        row: dict[str, Any] = {
            "bench": "prune",
            "contender": name,
            "model": str(options.model or options.shape),
            "pattern": options.pattern,
            "windows": windows.shape[0],
            "seqlen": windows.shape[1],
            "calibration": str(options.calibration) if options.calibration else "random ids",
            "rounds": options.rounds,
            **fields,
            **environment,
        }
        if memory:
            row["rest_bytes"], row["peak_bytes"] = memory[name].rest, memory[name].peak
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table whose ratios are of the contender in the row to the floor."""
    columns = ["contender", "wall", f"this / {FLOOR}", "processor", f"this / {FLOOR}"]
    if "peak_bytes" in rows[0]:
        columns.append("peak above the model")
    lines = []
    for row in rows:
        line = [row["contender"]]
        for clock in ("wall", "process"):
            ratio = harness.Spread(**row[f"this_to_reference_{clock}"])
            line += [f"{row[f'{clock}_s']['median']:.2f} s", str(ratio)]
        if "peak_bytes" in row:
            line.append(byte_text(row["peak_bytes"] - row["rest_bytes"]))
        lines.append(tuple(line))
    title = f"pruning: {job(rows)}; {rows[0]['rounds']} rounds, median (p20 … p80)"
    return Table(title, tuple(columns), tuple(lines))


def job(rows: Sequence[dict[str, Any]]) -> str:
    """Return what was done, in words."""
    return "{windows} × {seqlen} tokens ({calibration}), {model} to {pattern}".format(**rows[0])


def plot(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the chart of `--plot`."""
    conditions = harness.environment_line(rows[0])
    plot_ratios({job(rows): rows}, "pruning", conditions, options.plot, overwrite=options.overwrite)


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Time spp.prune beside two forward passes a block, interleaved."
    )
    add_model_options(parser, "directory or hub id of a dense model")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["wanda", "sparsegpt"],
        choices=sorted(METHODS),
        metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: wanda sparsegpt)",
    )
    parser.add_argument("--pattern", default="2:4", help="N:M or the fraction pruned (default: 2:4)")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows (default: 32)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--calibration", type=Path, help="text file; needs --model (default: random token ids)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    harness.add_common_options(parser)
    harness.add_timing_options(parser, rounds=3, warmup=1)
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    for name in ("windows", "seqlen"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.calibration and not options.model:
        raise ConfigError("--calibration is text, and the random weights of --shape have no tokenizer: give --model")
    Pattern.parse(options.pattern)
    return options


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks.prune") -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON, `--plot` a chart."""
    options = parse(arguments, prog)
    if options.child:
        memory = measure_child(options)
        print(json.dumps({"rest": memory.rest, "peak": memory.peak}))
        return
    rows = measure(options)
    harness.finish(rows, table(rows), options, lambda: plot(rows, options))


def measure_child(options: argparse.Namespace) -> harness.Memory:
    """Return the memory of one contender's only call; every weight has been read before, so that none is paged in."""
    model = load_dense(options)
    windows = load_windows(options, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    call = make_call(options, options.child, model, windows)
    return harness.measure_memory(call, calls=1, device=options.device)


def _memory_of(options: argparse.Namespace, name: str) -> harness.Memory:
    arguments = ["--child", name, *model_arguments(options), "--pattern", options.pattern]
    for option in ("windows", "seqlen", "calibration", "device", "dtype", "threads"):
        value = getattr(options, option)
        if value is not None:
            arguments += [f"--{option}", str(value)]
    return harness.Memory(**harness.in_child("benchmarks.prune", arguments))


if __name__ == "__main__":
    try:
        main()
    except SPPError as error:
        sys.exit(f"error: {spoken(error, None)}")
