"""spp verify: that a checkpoint has the zeros it must have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console
from spp.errors import ConfigError

NAME = "verify"


def run(
    before: Annotated[str, typer.Argument(help="The pruned checkpoint; alone: a checkpoint with a certificate.")],
    after: Annotated[str | None, typer.Argument(help="The checkpoint that must have the same zeros.")] = None,
    against: Annotated[
        str | None, typer.Option(help="The pruned checkpoint whose zeros the first one must have: BEFORE, named last.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare sha256 of contents too, where the certificate has them.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="List every tensor in the table.")] = False,
) -> None:
    """Check that two checkpoints have the same zeros, or one against its own certificate; exit code 1 if not.

    The tables give a verdict on each tensor: its zeros and pattern, whether it is finite, and with a certificate its
    values.

    Example: spp verify pruned merged

    The same: spp verify merged --against pruned
    """
    from spp.certificate import CERTIFICATE_NAME

    if against is not None and after is not None:
        raise ConfigError("--against names the pruned checkpoint; leave out AFTER, or pass BEFORE AFTER without it")
    if against is not None:
        before, after = against, before
    if after is None:
        _check(before, None, deep, every)
        return
    _check(before, after, False, every)
    if (Path(after) / CERTIFICATE_NAME).is_file():
        _check(after, None, deep, every)
    else:
        console.say(f"{after} has no {CERTIFICATE_NAME}: its values were not checked")


def _check(before: str, after: str | None, deep: bool, every: bool) -> None:
    """Show what was found, and raise what is wrong."""
    from spp.checkpoint.verifying import examine
    from spp.report import verdict_table

    with console.step("verifying" if after is not None else "verifying contents"):
        found = examine(before, after, deep=deep)
    console.show(verdict_table(found, every=every))
    found.require()
    if after is None:
        console.say(f"verified: {before} is what its certificate says")
    else:
        console.say(f"verified: {after} has exactly the zeros of {before}")
