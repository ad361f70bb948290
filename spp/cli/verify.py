"""spp verify: that a checkpoint has the zeros it must have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import VerifyConfig

if TYPE_CHECKING:
    from spp.certifying.verify import Verification

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
    found = _examined(before, after, config.deep and after is None, more=config.more_zeros_allowed)
    console.answer({**found.to_dict(), "certificate": None})
    _tell(found, before, after, config.every)
    if after is None:
        return
    if (Path(after) / CERTIFICATE_NAME).is_file():
        values = _examined(after, None, config.deep)
        console.answer({"ok": values.ok, "certificate": values.to_dict()})
        _tell(values, after, None, config.every)
    else:
        console.say(f"{after} has no {CERTIFICATE_NAME}: its values were not checked")


def _examined(before: str, after: str | None, deep: bool, *, more: bool = False) -> Verification:
    from spp.certifying.verify import examine

    with console.step("verifying" if after is not None else "verifying contents"):
        return examine(before, after, deep=deep, more_zeros_allowed=more)


def _tell(found: Verification, before: str, after: str | None, every: bool) -> None:
    """Show what was found, and raise what is wrong."""
    from spp.report import survival_table, verdict_table

    console.show(verdict_table(found, every=every))
    if found.survival:
        console.show(survival_table(found, every=every))
    added = found.require(None if every else 10).zeros_added
    if after is None:
        console.say(f"verified: {before} is what its certificate says")
    elif added is None:
        console.say(f"verified: {after} has exactly the zeros of {before}")
    else:
        console.say(f"verified: {after} has every zero of {before}, and {added} more")
