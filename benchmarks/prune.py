"""Pruning a whole model: each method of `spp.prune` beside the forward passes that no method can avoid.

Contenders take turns in one process on one model, whose dense weights are put back, untimed, before each turn. "floor"
is the forward passes that no method can avoid: a block runs once to show what its layers read, and once more, pruned,
to give the next block its inputs; nothing needs the second run of the last block that is pruned. Peak memory above the
loaded model is measured in a fresh process for each contender.

    python -m benchmarks.prune --model DIR --calibration FILE
    python -m benchmarks.prune --shape smollm2 --out prune.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.models import add_model_options, load_dense, model_arguments
from spp.configs.pruning import METHODS
from spp.errors import ConfigError
from spp.evaluation import evaluating
from spp.masks.patterns import Pattern
from spp.models.targets import resolve_projections
from spp.pruning import prune
from spp.pruning.blocks import BATCH_TOKENS, Reached, call_model, find_blocks, hidden_name
from spp.pruning.windows import calibration_windows
from spp.report import Table, byte_text

FLOOR = "floor"
Call = Callable[[Tensor], Any]  # a block with its recorded arguments: hidden states in, the block's output out


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
    weights = [target.module.get_parameter("weight") for target in resolve_projections(model).values()]
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
    environment = harness.environment(options.device, getattr(torch, options.dtype)).to_dict()
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
    harness.plot_ratios({job(rows): rows}, "pruning", rows[0], options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = harness.parser("prune", "Time spp.prune beside two forward passes a block, interleaved.")
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
    harness.add_common_options(parser)
    harness.add_timing_options(parser, rounds=3, warmup=1)
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    harness.require_positive(options, "windows", "seqlen")
    if options.calibration and not options.model:
        raise ConfigError("--calibration is text, and the random weights of --shape have no tokenizer: give --model")
    Pattern.parse(options.pattern)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON, `--plot` a chart."""
    harness.run(parse(arguments), measure_child, measure, table, plot)


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
    shared = ("pattern", "windows", "seqlen", "calibration", "device", "dtype", "threads")
    arguments = ["--child", name, *model_arguments(options), *harness.child_arguments(options, *shared)]
    return harness.Memory(**harness.in_child("benchmarks.prune", arguments))


# ---- The floor: the forward passes, and nothing else. A block is called with the arguments that the model itself
# passes to it, recorded beforehand, batch by batch, and only the hidden states between two blocks are kept.


def forward_passes(model: nn.Module, windows: Tensor) -> Callable[[], None]:
    """Return a call that runs each block of a model twice, and the last one that is pruned once.

    Args:
        model: any that `spp.prune` takes.
        windows: token ids (k, L), run in the batches that `spp.prune` makes of them.
    """
    targets = list(resolve_projections(model))
    root, blocks = find_blocks(model, targets)
    start = len(root) + 1 if root else 0
    blocks = blocks[: 1 + max(int(path[start:].split(".")[0]) for path in targets)]
    batches = windows.to(next(model.parameters()).device).split(max(1, BATCH_TOKENS // windows.shape[1]))
    with evaluating(model):
        recorded = [_record(model, blocks, batch) for batch in batches]

    def run() -> None:
        hidden = [first for first, _ in recorded]
        with evaluating(model):
            for index in range(len(blocks)):
                calls = [calls[index] for _, calls in recorded]
                for call, x in zip(calls, hidden, strict=True):
                    call(x)
                if index < len(blocks) - 1:
                    for batch, call in enumerate(calls):
                        output = call(hidden[batch])
                        hidden[batch] = output[0] if isinstance(output, tuple) else output

    return run


def _record(model: nn.Module, blocks: list[nn.Module], ids: Tensor) -> tuple[Tensor, list[Call]]:
    """Return the first block's hidden states for a batch, and each block with its other arguments."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = None if args else hidden_name(kwargs)
        if not first:
            first.append(args[0] if name is None else kwargs[name])
        calls.append(_with_arguments(block, args[1:], kwargs, name))

    def finish(*_: Any) -> NoReturn:
        raise Reached

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(finish))
    try:
        with torch.no_grad():
            call_model(model, ids)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return first[0], calls


def _with_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> Call:
    """Return a block that takes its hidden states by position, or by `name`; those recorded are not kept."""
    rest = {key: value for key, value in kwargs.items() if key != name}

    def call(x: Tensor) -> Any:
        return block(x, *args, **rest) if name is None else block(**{name: x}, **rest)

    return call


if __name__ == "__main__":
    harness.exiting(main)
