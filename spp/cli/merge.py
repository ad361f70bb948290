"""spp merge: a checkpoint and what was trained on it in, one plain checkpoint out; a pruned one keeps its zeros."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console
from spp.errors import ConfigError

NAME = "merge"


def run(
    base: Annotated[str, typer.Argument(help="Directory or hub id of the pruned model; for PST, of the dense one.")],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]",
            help="Directory or hub id of the adapter, or of what PST trained; or of several adapters, whose sum is "
            "merged, each times its weight (default: 1).",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Directory to write the merged checkpoint to.")],
    dtype: Annotated[
        str | None, typer.Option(help="Store the merged weights as float32, bfloat16 or float16 (default: the base's).")
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest or stochastic.")] = "nearest",
    seed: Annotated[int | None, typer.Option(help="Of stochastic rounding.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List every layer in the table.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the table, but write nothing.")
    ] = False,
    strict_values: Annotated[
        bool, typer.Option("--strict", help="Refuse a base with other values than an adapter was trained on.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Merge adapters into their pruned model, shard by shard; every zero stays a zero.

    What PST trained prunes its dense model instead, by the masks that it learned.

    Example: spp merge pruned run/adapter merged

    Of several adapters the weighted sum is merged: spp merge pruned maths:0.7 code:0.3 merged
    """
    import torch

    from spp.adapter_files import PST_TYPE, method_of
    from spp.checkpoint import convert_checkpoint, merge_checkpoint
    from spp.report import merge_table, sparsity_table

    stored = None if dtype is None else getattr(torch, console.pick_dtype(dtype, auto=False))
    console.check_directory(output, overwrite)
    parts = [weighted(adapter) for adapter in adapters]
    of_pst = [name for name, _ in parts if method_of(name) == PST_TYPE]
    if of_pst:
        if len(adapters) > 1 or parts[0][1] != 1:
            raise ConfigError(f"{of_pst[0]} is what PST trained: it is merged alone, and without a weight")
        if rounding != "nearest" or seed is not None:
            raise ConfigError("--rounding and --seed are for adapters of SPP; what PST trained is rounded to nearest")
        with console.step(f"converting {base} by {adapters[0]}"):
            zeros = convert_checkpoint(base, of_pst[0], output, dtype=stored, overwrite=overwrite, dry_run=dry_run)
        console.show(sparsity_table(zeros, every=every))
        _say_where(output, dry_run)
        return
    with console.step(f"merging {', '.join(adapters)} into {base}"):
        report = merge_checkpoint(
            base,
            parts,
            output,
            dtype=stored,
            rounding=rounding,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            strict_values=strict_values,
        )
    console.show(merge_table(report, every=every))
    if report.base.line:
        console.say(report.base.line)
    _say_where(output, dry_run)


def weighted(text: str) -> tuple[str, float]:
    """Return the adapter and the weight that `ADAPTER` or `ADAPTER:WEIGHT` names; a directory of that name is itself.

    Raises:
        ConfigError: what follows the last colon is no finite number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise ConfigError(f"{text}: {weight!r} is no weight; write ADAPTER:WEIGHT with a finite number, or ADAPTER")
    return name, value


def _say_where(output: Path, dry_run: bool) -> None:
    if dry_run:
        console.say(f"nothing was written: without --dry-run the merged checkpoint goes to {output}")
    else:
        console.wrote(output)
