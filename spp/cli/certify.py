"""spp certify: the certificate of a checkpoint's zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console

NAME = "certify"


def run(
    directory: Annotated[Path, typer.Argument(help="Directory of the checkpoint (safetensors).")],
    base: Annotated[
        str | None, typer.Option(help="The pruned checkpoint that it was tuned from; its zeros must be the same.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Add the sha256 of every tensor's contents.")] = False,
    every: Annotated[bool, typer.Option("--all", help="List every tensor in the table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing certificate.")] = False,
) -> None:
    """Write sparsity.json, the certificate that spp verify checks, into a checkpoint's directory.

    Example: spp certify merged --base pruned
    """
    from spp.certificate import CERTIFICATE_NAME
    from spp.checkpoint import certify
    from spp.files.recognised import CERTIFICATE
    from spp.report import sparsity_table

    console.check_file(directory / CERTIFICATE_NAME, overwrite, CERTIFICATE)
    with console.step(f"certifying {directory}"):
        report = certify(directory, base, deep=deep)
    console.show(sparsity_table(report, every=every))
    console.wrote(directory / CERTIFICATE_NAME)
