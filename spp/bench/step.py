"""One training step of a whole model: SPP against PEFT's LoRA and HiRA on the same seven projections.

A step is forward with labels, backward and AdamW; contenders take turns in one process, each on its own copy of the
same pruned model and the same tokens. Peak memory is measured in a fresh process for each contender.

    python -m spp.bench.step --model DIR --rounds 10        spp bench step --shape smollm2 --out step.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from spp.bench import harness
from spp.bench.models import add_model_options, load_dense, model_arguments
from spp.bench.plot import plot_ratios
from spp.errors import ConfigError, SPPError
from spp.inject import wrap
from spp.patterns import Pattern
from spp.pruning import magnitude_mask
from spp.report import Table, byte_text
from spp.targets import resolve_targets

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DROPOUT = 0.05  # of the contenders with dropout: the paper's
MEMORY_STEPS = 3  # the first creates the optimizer's state; the peak is reached from the second on


def contenders(rank: int, peft_rank: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return what adapts a pruned model, by the name of the contender."""

    def lora(model: nn.Module) -> nn.Module:
        peft = harness.require_peft()
        config = peft.LoraConfig(r=peft_rank, lora_alpha=2 * peft_rank, target_modules=list(PROJECTIONS))
        return peft.get_peft_model(model, config)

    def hira(model: nn.Module) -> nn.Module:
        peft = harness.require_peft()
        if not hasattr(peft, "HiraConfig"):
            raise ConfigError(f"peft {harness.installed('peft')} has no HiRA; leave hira out of --contenders")
        config = peft.HiraConfig(r=peft_rank, target_modules=list(PROJECTIONS))
        return peft.get_peft_model(model, config)

    names = list(PROJECTIONS)
    return {
        "spp": lambda model: wrap(model, rank, target_modules=names),
        "spp-input-dropout": lambda model: wrap(model, rank, target_modules=names, dropout=DROPOUT),
        "spp-alpha-dropout": lambda model: wrap(
            model, rank, target_modules=names, dropout=DROPOUT, dropout_mode="alpha"
        ),
        "spp-packed": lambda model: wrap(model, rank, target_modules=names, packed=True),
        "lora": lora,
        "hira": hira,
    }


def load_model(options: argparse.Namespace) -> nn.Module:
    """Return the pruned model of the run: a dense one is pruned by magnitude."""
    model = load_dense(options)
    pattern = Pattern.parse(options.pattern)
    with torch.no_grad():
        for _, module in resolve_targets(model, PROJECTIONS):
            weight: Any = module.weight
            if int((weight == 0).sum()) < weight.numel() // 4:  # a model that is pruned already stays as it is
                weight.mul_(magnitude_mask(weight, pattern))
    return model


def make_step(options: argparse.Namespace, name: str) -> tuple[Callable[[], None], int]:
    """Return one contender's training step and the number of its trainable parameters."""
    torch.manual_seed(0)
    model = contenders(options.rank, options.peft_rank)[name](load_model(options)).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    config: Any = model.config
    tokens = torch.randint(config.vocab_size, (options.batch, options.tokens), device=options.device)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step, sum(p.numel() for p in trainable)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a contender: times, ratios to the first contender, memory, environment."""
    memory = {name: _memory_of(options, name) for name in options.contenders} if options.memory else {}
    made = {name: make_step(options, name) for name in options.contenders}
    samples = harness.interleave(
        {name: step for name, (step, _) in made.items()},
        rounds=options.rounds,
        warmup=options.warmup,
        device=options.device,
    )
    environment = harness.environment(options.device, getattr(torch, options.dtype))
    rows = []
    for name, fields in harness.compare(samples).items():
        row: dict[str, Any] = {
            "bench": "step",
            "contender": name,
            "trainable": made[name][1],
            "model": str(options.model or options.shape),
            "pattern": options.pattern,
            "batch": options.batch,
            "tokens": options.tokens,
            "rank": options.rank if name.startswith("spp") else options.peft_rank,
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
    shape = f"{rows[0]['batch']} × {rows[0]['tokens']} tokens, {rows[0]['model']} at {rows[0]['pattern']}"
    return Table(f"one training step: {shape}; median (p20 … p80)", tuple(columns), tuple(lines))


def plot(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the chart of `--plot`."""
    shape = f"{rows[0]['batch']} × {rows[0]['tokens']} tokens, {rows[0]['model']} at {rows[0]['pattern']}"
    conditions = harness.environment_line(rows[0])
    plot_ratios({shape: rows}, "one training step", conditions, options.plot, overwrite=options.overwrite)


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Time one training step of SPP against PEFT's LoRA and HiRA, interleaved."
    )
    add_model_options(parser, "directory or hub id; a dense one is pruned by magnitude first")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["spp", "lora", "hira"],
        choices=sorted(contenders(1, 1)),
        metavar="NAME",
        help=f"of {', '.join(contenders(1, 1))}; ratios are of the first to the others (default: spp lora hira)",
    )
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (default: 4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--rank", type=int, default=16, help="r of SPP (default: 16)")
    parser.add_argument("--peft-rank", type=int, default=8, help="r of LoRA and HiRA (default: 8)")
    parser.add_argument("--pattern", default="2:4", help="pruned to this where the model is dense (default: 2:4)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    harness.add_common_options(parser)
    harness.add_timing_options(parser)
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    for name in ("batch", "tokens", "rank", "peft_rank"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    Pattern.parse(options.pattern)
    return options


def main(arguments: Sequence[str] | None = None, prog: str = "python -m spp.bench.step") -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON."""
    options = parse(arguments, prog)
    if options.child:
        step, _ = make_step(options, options.child)
        memory = harness.measure_memory(step, calls=MEMORY_STEPS, device=options.device)
        print(json.dumps({"rest": memory.rest, "peak": memory.peak}))
        return
    rows = measure(options)
    harness.finish(rows, table(rows), options, lambda: plot(rows, options))


def _memory_of(options: argparse.Namespace, name: str) -> harness.Memory:
    arguments = ["--child", name, *model_arguments(options), "--pattern", options.pattern]
    for option in ("batch", "tokens", "rank", "peft-rank", "device", "dtype", "threads"):
        value = getattr(options, option.replace("-", "_"))
        if value is not None:
            arguments += [f"--{option}", str(value)]
    return harness.Memory(**harness.in_child("spp.bench.step", arguments))


if __name__ == "__main__":
    try:
        main()
    except SPPError as error:
        sys.exit(f"error: {error}")
