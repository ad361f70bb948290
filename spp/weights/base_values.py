"""Whether a base has the values that an adapter was trained on, and how that is said.

An adapter records of each weight the hash of its values, and the form that they were held in (spp.weights.base). Like
is compared with like:

    same            the values at hand, rounded to the recorded dtype where they have another, have the recorded hash
    other           they have not, in a form that could hold the recorded ones: the adapter belongs to another base
    not comparable  they have not, but they could not: trained in float32 and at hand in bfloat16, or trained on what a
                    quantizer made and at hand dense, or the other way round
    unknown         the adapter does not say, or there are no values to look at

Only "other" is worth a warning: a base that was quantized or converted since is what it is, a fact for a report.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from spp.weights.base import FLOATS, Weight

SAME, OTHER, NOT_COMPARABLE, UNKNOWN = "same", "other", "not comparable", "unknown"
_GRAVEST_FIRST = (OTHER, NOT_COMPARABLE, UNKNOWN, SAME)


@dataclass(frozen=True)
class BaseVerdict:
    """Whether a base has the values that an adapter was trained on.

    Attributes:
        state: "same", "other", "not comparable" or "unknown".
        note: of "other", which layers differ and where the adapter belongs; of "not comparable", the two forms.
        source: where the adapter was read from, or "the adapter".
    """

    state: str = SAME
    note: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return JSON-ready values for a report: "base_values", the state, and "base_values_note"."""
        return {"base_values": self.state, "base_values_note": self.note}

    @property
    def message(self) -> str:
        """The verdict as a sentence."""
        if self.state == NOT_COMPARABLE:
            return f"the base's values cannot be compared with those that {self.source} was trained on: {self.note}"
        return f"the base's values are not those that {self.source} was trained on: {self.note}"

    @property
    def line(self) -> str:
        """The verdict as a line of a result; "" where there is nothing to say."""
        return f"base values: {self.state}: {self.note}" if self.note else ""


class BaseComparison:
    """Compares weights of a base, one after the other, with what an adapter recorded.

    Args:
        hashes, forms: of the adapter, by module path; None where it does not say.
        source: where it was read from.
        base_name: where its base came from, or None.
        given: where the base at hand came from, or None.
    """

    def __init__(
        self,
        hashes: Mapping[str, str] | None,
        forms: Mapping[str, str] | None,
        source: object = "the adapter",
        base_name: str | None = None,
        given: object = None,
    ) -> None:
        self._hashes, self._forms = hashes or {}, forms or {}
        self._source, self._home = str(source), where_it_belongs(base_name, given)
        self._states: dict[str, str] = {}
        self._unlike: dict[str, None] = {}

    def form(self, path: str) -> str | None:
        """Return the form that was hashed of a weight; None where nothing was recorded."""
        return self._forms.get(path) if path in self._hashes else None

    def add(self, path: str, form: str, digest: str | None) -> None:
        """Take a weight.

        Args:
            form: that it is held in.
            digest: of its values in the recorded form; None where they cannot be had in it.
        """
        recorded = self.form(path)
        if recorded is None:
            state = UNKNOWN
        elif digest is not None and digest == self._hashes[path]:
            state = SAME
        elif digest is not None and _could_hold(form, recorded):
            state = OTHER
        else:
            state = NOT_COMPARABLE
            self._unlike[f"trained on {recorded}, this one is {form}"] = None
        self._states[path] = state

    def add_held(self, path: str, weight: Weight, *, anew: bool = False) -> None:
        """Take a weight of a model, hashed `anew` if asked; one without values is unknown."""
        recorded = self.form(path)
        digest = None if recorded is None else weight.values_sha256(recorded, anew=anew)
        if recorded is not None and digest is None and weight.is_meta:
            self._states[path] = UNKNOWN
        else:
            self.add(path, weight.form, digest)

    def verdict(self) -> BaseVerdict:
        """Return what all weights together say: the gravest."""
        found = set(self._states.values()) or {UNKNOWN}
        state = next(state for state in _GRAVEST_FIRST if state in found)
        note = ""
        if state == OTHER:
            differing = [path for path, one in self._states.items() if one == OTHER]
            first = min(differing, key=lambda path: [p.zfill(9) if p.isdigit() else p for p in path.split(".")])
            layers = f"{len(differing)} of {len(self._states)} layers, first in {first}"
            note = f"they differ in {layers}; {self._home}"
        elif state == NOT_COMPARABLE:
            note = "; ".join(sorted(self._unlike))
        return BaseVerdict(state, note, self._source)


UNSAID = BaseVerdict(UNKNOWN)


def where_it_belongs(recorded: str | None, given: object) -> str:
    """Return what can be done where a base has not what an adapter was trained on.

    Args:
        recorded: where the adapter's base came from, as its files say, or None.
        given: where the base at hand came from, or None: the recorded place, or another.
    """
    if recorded is None:
        return (
            "the adapter belongs to another base, and its files do not say which: pass the one that it was trained on"
        )
    if given is not None and os.path.realpath(str(given)) == os.path.realpath(recorded):
        return (
            f"the adapter belongs to {recorded} as it was in training; this one is from there too, and was changed "
            f"since: bring the earlier one back, or train an adapter on this one"
        )
    gone = "" if os.path.exists(recorded) or not os.path.isabs(recorded) else ", which is no longer there"
    return f"the adapter belongs to {recorded}{gone}: pass that one"


def gravest(verdicts: Iterable[BaseVerdict]) -> BaseVerdict:
    """Return the gravest of some verdicts, the first of equals."""
    return min(verdicts, key=lambda verdict: _GRAVEST_FIRST.index(verdict.state))


def _could_hold(form: str, recorded: str) -> bool:
    """Whether every value of the recorded form is one of another form, too."""
    if form == recorded:
        return True
    if form not in FLOATS or recorded not in FLOATS:
        return False
    return torch.promote_types(FLOATS[form], FLOATS[recorded]) == FLOATS[form]
