"""spp plan: what a training would take on each device, from the config alone."""

from __future__ import annotations

from spp.cli import console
from spp.cli.options import command
from spp.configs.planning import PlanConfig

NAME = "plan"


@command(PlanConfig)
def run(config: PlanConfig) -> None:
    """Show the memory that a training takes on each device, against LoRA and full fine-tuning; nothing is loaded.

    Example: spp plan MODEL --pattern 2:4 --world 8 --strategy fsdp --memory 80GB
    """
    from spp.planning import plan

    found = plan(config)
    console.answer(found.to_dict())
    console.show(found.table())
    for note in found.notes:
        console.say(note)
    console.say(found.command)
