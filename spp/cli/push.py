"""spp push: an adapter or a model to the Hugging Face hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp.cli import console

NAME = "push"


def run(
    directory: Annotated[Path, typer.Argument(help="Directory of an adapter, or of a model with its certificate.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name; made if it is not there.")],
    private: Annotated[bool | None, typer.Option(help="Make a new repository private (default: the owner's).")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to (default: the main one).")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run", help="Run directory of spp tune: its recipe and results go into the card.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Hub id of the base, where the files name a directory.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence for the card, such as apache-2.0.")] = None,
    new_card: Annotated[
        bool, typer.Option("--new-card", help="Make a card in spite of a README.md that is there.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in an existing repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check files, print the card, send nothing.")] = False,
) -> None:
    """Push a directory to the hub as one commit; its files are checked first.

    A README.md in the directory is the card; without one, a card is made. The token is that of `hf auth login`.

    Example: spp push merged owner/name --run run --dry-run
    """
    from spp.integrations.hub import push
    from spp.report import byte_text

    with console.step(f"{'checking' if dry_run else 'pushing'} {directory}"):
        report = push(
            directory,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            run=run_dir,
            base=base,
            license=license,
            new_card=new_card,
            overwrite=overwrite,
            dry_run=dry_run,
        )
    if dry_run and report.card is not None:
        console.say(report.card)
    if report.card is None:
        console.say("the card is the README.md that is there; --new-card makes one of the files")
    size = byte_text(sum(report.files.values()))
    if dry_run:
        console.say(f"would push {len(report.files)} files, {size}: {', '.join(report.files)}")
    else:
        console.say(f"pushed {len(report.files)} files, {size}")
        console.wrote(str(report.url))
