"""spp merge: a checkpoint and what was trained on it in, one plain checkpoint out; a pruned one keeps its zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console

NAME = "merge"


def run(
    base: Annotated[str, typer.Argument(help="Directory or hub id of the pruned model; for PST, of the dense one.")],
    adapter: Annotated[str, typer.Argument(help="Directory or hub id of the adapter, or of what PST trained.")],
    output: Annotated[Path, typer.Argument(help="Directory to write the merged checkpoint to.")],
    dtype: Annotated[
        str | None, typer.Option(help="Store the merged weights as float32, bfloat16 or float16 (default: the base's).")
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest or stochastic.")] = "nearest",
    seed: Annotated[int | None, typer.Option(help="Of stochastic rounding.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List every layer in the table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Merge an adapter into its pruned model, shard by shard; every zero stays a zero.

    What PST trained prunes its dense model instead, by the masks that it learned.

    Example: spp merge pruned run/adapter merged
    """
    import torch

    from spp.adapter_files import PST_TYPE, method_of
    from spp.checkpoint import convert_checkpoint, merge_checkpoint
    from spp.errors import ConfigError
    from spp.report import merge_table, sparsity_table

    stored = None if dtype is None else getattr(torch, console.pick_dtype(dtype, auto=False))
    console.check_output(output, overwrite)
    if method_of(adapter) == PST_TYPE:
        if rounding != "nearest" or seed is not None:
            raise ConfigError("--rounding and --seed are for adapters of SPP; what PST trained is rounded to nearest")
        with console.step(f"converting {base} by {adapter}"):
            zeros = convert_checkpoint(base, adapter, output, dtype=stored, overwrite=overwrite)
        console.show(sparsity_table(zeros, every=every))
        console.wrote(output)
        return
    with console.step(f"merging {adapter} into {base}"):
        report = merge_checkpoint(
            base, adapter, output, dtype=stored, rounding=rounding, seed=seed, overwrite=overwrite
        )
    console.show(merge_table(report, every=every))
    console.wrote(output)
