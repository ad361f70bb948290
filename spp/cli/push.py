"""spp push: an adapter or a model to the Hugging Face hub, with a model card."""

from __future__ import annotations

from dataclasses import asdict

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import PushConfig

NAME = "push"


@command(PushConfig)
def run(config: PushConfig) -> None:
    """Push a directory to the hub as one commit; its files are checked first.

    A README.md in the directory becomes the model card; without one, a card is made. Log in first: hf auth login.

    Example: spp push merged owner/name --run run --dry-run
    """
    from spp.integrations.hub import push
    from spp.report import byte_text

    options = asdict(config)
    directory, repo_id = options.pop("directory"), options.pop("repo_id")
    with console.step(f"{'checking' if config.dry_run else 'pushing'} {directory}"):
        report = push(directory, repo_id, **options)
    console.answer({"dry_run": config.dry_run, **report.to_dict()})
    if config.dry_run and report.card is not None:
        console.say(report.card)
    if report.card is None:
        console.say("the card is the README.md that is there; --new-card makes one of the files")
    size = byte_text(sum(report.files.values()))
    if config.dry_run:
        console.say(f"would push {len(report.files)} files, {size}: {', '.join(report.files)}")
    else:
        console.say(f"pushed {len(report.files)} files, {size}")
        console.wrote(str(report.url))
