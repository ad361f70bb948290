"""spp merge: a pruned checkpoint and its adapter in, one plain checkpoint with the same zeros out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console

NAME = "merge"


def run(
    base: Annotated[str, typer.Argument(help="Directory or hub id of the pruned model.")],
    adapter: Annotated[str, typer.Argument(help="Directory or hub id of the adapter.")],
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

    Example: spp merge pruned run/adapter merged
    """
    import torch

    from spp.checkpoint import merge_checkpoint
    from spp.report import merge_table

    stored = None if dtype is None else getattr(torch, console.pick_dtype(dtype, auto=False))
    console.check_output(output, overwrite)
    with console.step(f"merging {adapter} into {base}"):
        report = merge_checkpoint(
            base, adapter, output, dtype=stored, rounding=rounding, seed=seed, overwrite=overwrite
        )
    console.show(merge_table(report, every=every))
    console.wrote(output)
