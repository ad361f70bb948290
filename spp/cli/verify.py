"""spp verify: that a checkpoint has the zeros it must have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console

NAME = "verify"


def run(
    before: Annotated[str, typer.Argument(help="The pruned checkpoint; alone: a checkpoint with a certificate.")],
    after: Annotated[str | None, typer.Argument(help="The checkpoint that must have the same zeros.")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare sha256 of contents too, where the certificate has them.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="List every tensor in the table.")] = False,
) -> None:
    """Check that two checkpoints have the same zeros, or one against its own certificate; exit code 1 if not.

    Example: spp verify pruned merged
    """
    from spp.certificate import CERTIFICATE_NAME
    from spp.checkpoint import verify
    from spp.report import sparsity_table

    with console.step("verifying"):
        report = verify(before, after, deep=deep)
    console.show(sparsity_table(report, every=every))
    if after is None:
        console.say(f"verified: {before} is what its certificate says")
        return
    console.say(f"verified: {after} has exactly the zeros of {before}")
    if (Path(after) / CERTIFICATE_NAME).is_file():
        with console.step("verifying its contents"):
            verify(after, deep=deep)
        console.say(f"verified: {after} is what its certificate says")
    else:
        console.say(f"{after} has no {CERTIFICATE_NAME}: its values were not checked")
