"""One line a contender, from the rows of results.json: its best learning rate, its seeds at that, its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Summary:
    """What was found of one contender with one number of steps.

    Attributes:
        contender, steps: what the rows have in common.
        lrs: {learning rate: row} with the seed of the search, ascending.
        best: the learning rate of the lowest validation loss; None where all diverged.
        rows: at the best learning rate, by seed.
        cost: the entry of "costs", or None.
    """

    contender: str
    steps: int
    lrs: Mapping[float, Mapping[str, Any]]
    best: float | None
    rows: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, Any] | None

    @property
    def at_an_end(self) -> bool:
        """Whether the best learning rate is the lowest or highest that was tried: a better one may lie beyond."""
        return self.best in (min(self.lrs), max(self.lrs))

    @property
    def by_seed(self) -> dict[int, float]:
        """Test losses, {seed: loss}."""
        return {row["seed"]: row["test"]["loss"] for row in self.rows if "test" in row}

    @property
    def losses(self) -> list[float]:
        """Test losses over the seeds."""
        return list(self.by_seed.values())

    @property
    def loss(self) -> float:
        """Their mean; infinite where there is none."""
        return fmean(self.losses) if self.losses else float("inf")

    @property
    def perplexities(self) -> list[float]:
        """Test perplexities over the seeds."""
        return [row["test"]["perplexity"] for row in self.rows if "test" in row]

    @property
    def perplexity(self) -> float:
        """Their mean; NaN where there is none."""
        return fmean(self.perplexities or [float("nan")])

    @property
    def row(self) -> Mapping[str, Any]:
        """A row for what all seeds share."""
        return self.rows[0] if self.rows else next(iter(self.lrs.values()))

    @property
    def zeros_kept(self) -> float | None:
        """The least share of zeros kept over the seeds."""
        found = [row["zeros_kept"] for row in self.rows if row.get("zeros_kept") is not None]
        return min(found) if found else None

    @property
    def pattern_valid(self) -> bool | None:
        """Whether N:M groups are whole with every seed; None where there are none."""
        found = [row["pattern_valid"] for row in self.rows if row.get("pattern_valid") is not None]
        return all(found) if found else None


def summaries(contents: Mapping[str, Any]) -> list[Summary]:
    """Return a summary of every contender in results.json, the best first."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in contents["rows"].values():
        groups.setdefault((row["contender"], row["steps"]), []).append(row)
    found = [_summary(name, steps, rows, contents["costs"].get(name)) for (name, steps), rows in groups.items()]
    return sorted(found, key=lambda one: (one.loss, one.contender, one.steps))


def over_equal_seeds(one: Summary, other: Summary) -> tuple[Summary, Summary]:
    """Return both with the rows of the seeds that both have; unchanged where there is no such seed."""
    seeds = one.by_seed.keys() & other.by_seed.keys()
    if not seeds:
        return one, other
    first, second = (replace(s, rows=tuple(row for row in s.rows if row["seed"] in seeds)) for s in (one, other))
    return first, second


def _summary(contender: str, steps: int, rows: list[Mapping[str, Any]], cost: Mapping[str, Any] | None) -> Summary:
    seeds = {row["seed"] for row in rows}
    searched = max(seeds, key=lambda seed: (sum(row["seed"] == seed for row in rows), -seed))
    lrs = {row["lr"]: row for row in sorted(rows, key=lambda row: row["lr"]) if row["seed"] == searched}
    losses = {lr: row["validation"]["loss"] for lr, row in lrs.items() if not row["diverged"]}
    best = min(losses, key=lambda lr: losses[lr]) if losses else None
    chosen = sorted((row for row in rows if row["lr"] == best), key=lambda row: row["seed"])
    return Summary(contender, steps, lrs, best, tuple(chosen), cost)
