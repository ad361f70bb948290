"""spp verify: that a checkpoint has the zeros it must have."""

from __future__ import annotations

from pathlib import Path

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import VerifyConfig

NAME = "verify"


@command(VerifyConfig)
def run(config: VerifyConfig) -> None:
    """Check that two checkpoints have the same zeros, or one against its own certificate; exit code 1 if not.

    The tables give a verdict on each tensor: its zeros and pattern, whether it is finite, and with a certificate its
    values.

    Example: spp verify pruned merged

    The same: spp verify merged --against pruned

    Of a model that was pruned further: spp verify pruned further --more-zeros-allowed
    """
    from spp.files.carry import CERTIFICATE_NAME

    before, after = config.pair
    _check(before, after, config.deep and after is None, config.every, more=config.more_zeros_allowed)
    if after is None:
        return
    if (Path(after) / CERTIFICATE_NAME).is_file():
        _check(after, None, config.deep, config.every)
    else:
        console.say(f"{after} has no {CERTIFICATE_NAME}: its values were not checked")


def _check(before: str, after: str | None, deep: bool, every: bool, *, more: bool = False) -> None:
    """Show what was found, and raise what is wrong."""
    from spp.certifying.verify import examine
    from spp.report import survival_table, verdict_table

    with console.step("verifying" if after is not None else "verifying contents"):
        found = examine(before, after, deep=deep, more_zeros_allowed=more)
    console.show(verdict_table(found, every=every))
    if found.survival:
        console.show(survival_table(found, every=every))
    added = found.require().zeros_added
    if after is None:
        console.say(f"verified: {before} is what its certificate says")
    elif added is None:
        console.say(f"verified: {after} has exactly the zeros of {before}")
    else:
        console.say(f"verified: {after} has every zero of {before}, and {added} more")
