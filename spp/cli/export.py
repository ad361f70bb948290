"""spp export: a pruned checkpoint packed, and a packed one dense again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console
from spp.errors import ConfigError

NAME = "export"


def run(
    directory: Annotated[str, typer.Argument(help="Directory or hub id of the checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to write to.")],
    packed: Annotated[bool, typer.Option("--packed", help="Store kept weights and masks instead of zeros.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Make a packed checkpoint a plain one again.")] = False,
    strict_bits: Annotated[
        bool, typer.Option("--strict-bits", help="With --packed: refuse −0.0, which would come back as 0.0.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="List every tensor in the table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Write a pruned checkpoint packed, at the size of what pruning left, or a packed one as a plain checkpoint.

    A packed checkpoint is loaded by spp.load_packed, checked by spp verify, and comes back bit for bit.

    Example: spp export pruned packed --packed
    """
    from spp.checkpoint import export_dense, export_packed
    from spp.report import byte_text, export_table

    if packed == dense:
        raise ConfigError("pass one of --packed and --dense")
    if dense and strict_bits:
        raise ConfigError("--strict-bits goes with --packed: a packed checkpoint holds no −0.0")
    console.check_directory(output, overwrite)
    with console.step(f"{'packing' if packed else 'unpacking'} {directory}"):
        if packed:
            report = export_packed(directory, output, strict_bits=strict_bits, overwrite=overwrite)
        else:
            report = export_dense(directory, output, overwrite=overwrite)
    console.show(export_table(report, every=every))
    console.say(f"all weights: {byte_text(report.dense_bytes)} dense, {byte_text(report.packed_bytes)} packed")
    console.wrote(output)
