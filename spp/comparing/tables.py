"""The tables of a comparison, on a terminal and as Markdown: one line a contender, from the rows of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from spp.configs.comparing import KINDS, REFERENCE, parse_contender
from spp.files.provenance import Provenance
from spp.report import Table, byte_text

UNKNOWN = "–"
AT_AN_END = "†"
OWN_WEIGHTS = ("full", "norms")  # kinds that train parameters of the model, in its dtype
MASK_UPDATES = "spp-mask-updates"
OURS = (REFERENCE, "spp-no-beta", "spp-random-beta", MASK_UPDATES)  # kinds that are no peers of SPP


@dataclass(frozen=True)
class Summary:
    """The results of one contender with one number of steps.

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


def main_table(contents: Mapping[str, Any]) -> Table:
    """Return one line a contender, the best first; N:M is told where all of the pruned model has one such pattern."""
    timed = contents["conditions"]["budget"] == "time"
    reference = contents["costs"].get(REFERENCE)
    columns = (
        *("contender", "trainable", "lr", "seeds", "before", "after", "zeros kept", "N:M"),
        *(("steps",) if timed else ()),
        *(f"step / {REFERENCE}", f"memory / {REFERENCE}" if reference else "peak memory"),
    )
    pruned, dense = (contents["baselines"].get(name) for name in ("pruned", "dense"))
    grouped = pruned is None or ":" in pruned["pattern"]
    lines = []
    for one in summaries(contents):
        valid = one.pattern_valid if grouped else None
        before = dense if parse_contender(one.contender).traits.from_dense else pruned
        lines.append(
            (
                one.contender,
                f"{one.row['trainable']:,}",
                _lr(one),
                str(len(one.losses)),
                _perplexity([before["test"]["perplexity"]] if before else []),
                _perplexity(one.perplexities),
                UNKNOWN if one.zeros_kept is None else _percent(one.zeros_kept),
                UNKNOWN if valid is None else "yes" if valid else "no",
                *((str(one.steps),) if timed else ()),
                _time(one.cost),
                _memory(one.cost, reference),
            )
        )
    return Table(title(contents), columns, tuple(lines))


def search_table(contents: Mapping[str, Any]) -> Table:
    """Return what each learning rate came to, with the first seed."""
    found = sorted(summaries(contents), key=lambda one: (one.contender, one.steps))
    lrs = sorted({lr for one in found for lr in one.lrs})
    lines = []
    for one in found:
        cells = [_found(one.lrs[lr], lr == one.best) if lr in one.lrs else "" for lr in lrs]
        lines.append((one.contender, *cells))
    return Table("validation perplexity by learning rate", ("contender", *(f"{lr:g}" for lr in lrs)), tuple(lines))


def title(contents: Mapping[str, Any]) -> str:
    """Return what was compared, on one line."""
    given = contents["conditions"]
    data = ", ".join(given["data"])
    size = f"{given['batch_size']} × {given['block_length']} tokens"
    return f"{given['model']}, trained on {data}: equal {given['budget']}, {given['steps']} steps of {size}"


def notes(contents: Mapping[str, Any]) -> list[str]:
    """Return what the table leaves out: how it was measured, and where it is not to be trusted."""
    found = summaries(contents)
    lines = [_measured_on(contents["conditions"])]
    if dense := contents["baselines"].get("dense"):
        lines.append(f"The dense model has {dense['test']['perplexity']:.2f}.")
    if several := [len(one.losses) for one in found if len(one.losses) > 1]:
        lines.append(f"With several seeds (up to {max(several)}): the mean, with the lowest and the highest.")
    if any(one.best is not None and one.at_an_end for one in found):
        lines.append(f"{AT_AN_END} the best learning rate is the lowest or highest tried, or the only one.")
    lines += _reservations(contents, {parse_contender(one.contender).kind for one in found})
    measured = [*contents["rows"].values(), *contents["costs"].values()]
    return lines + sorted({f"Measured on {Provenance.from_dict(one['environment']).line}." for one in measured})


def _measured_on(given: Mapping[str, Any]) -> str:
    """Return on what perplexities were measured, and by what learning rates were chosen."""
    if given["kind"] == "instruction":
        what = f"{given['test_windows']} instruction rows, on the answers"
        other = f"{given['validation_windows']} other rows"
    else:
        text = given["eval_text"] or "held-out text"
        bos = " with BOS" if given.get("bos") else ""
        what = f"{given['test_windows']} windows of {given['window']} tokens{bos} of {text}"
        other = f"the {given['validation_windows']} windows behind them"
    return f"Perplexity on {what}, after each method's own merge; the learning rate is the best on {other}."


def _reservations(contents: Mapping[str, Any], kinds: set[str]) -> list[str]:
    """Return where contenders of these kinds are not compared on equal terms."""
    budget, lines = contents["conditions"]["budget"], []
    if contents["costs"]:
        lines.append(
            f"Time {'and peak memory ' if REFERENCE in contents['costs'] else ''}of a step relative to {REFERENCE}'s: "
            "medians of interleaved rounds, fresh processes."
        )
    if MASK_UPDATES in kinds and (contents["costs"] or budget == "time"):
        lines.append(f"A step of {MASK_UPDATES} is one without an update, which comes in one of many.")
    if budget == "parameters" and (fixed := sorted(kind for kind in kinds if KINDS[kind].rank is None)):
        lines.append(f"The number of parameters is not equal where there is no rank to choose: {', '.join(fixed)}.")
    own = [row for row in contents["rows"].values() if parse_contender(row["contender"]).kind in OWN_WEIGHTS]
    if few := sorted({row["environment"]["dtype"] for row in own} - {"float32", "float64"}):
        lines.append(
            f"{' and '.join(OWN_WEIGHTS)} train the weights themselves, in {', '.join(few)} without a float32 copy, "
            "where small changes are rounded away; the others train float32 parameters."
        )
    return lines


def verdict(contents: Mapping[str, Any]) -> str:
    """Say how the reference does against the peers that keep every zero; empty where nothing is measured yet.

    Of two contenders the one with the lower mean test loss is ahead, at the best learning rate of each, over the seeds
    that both have, however small the difference; of several seeds it is said in how many. Forms of the reference are no
    peers: those that are ahead of it are named.
    """
    found = {one.contender: one for one in summaries(contents) if one.perplexities}
    ours = found.get(REFERENCE)
    others = [one for one in found.values() if one.zeros_kept == 1 and one is not ours]
    peers = [one for one in others if parse_contender(one.contender).kind not in OURS]
    if ours is None or not peers:
        return ""
    won = [one for one in peers if _is_ahead(ours, one)]
    lost = [one for one in peers if one not in won]
    forms = [one for one in others if one not in peers and _is_ahead(one, ours)]
    ahead, behind, better = ([_beside(ours, one) for one in some] for some in (won, lost, forms))
    name = f"{ours.contender} ({ours.perplexity:.2f})"
    parts = [f"{name} does not hold against {_joined(behind)}"] if behind else []
    if ahead:
        parts.append(f"{'it' if behind else name} is ahead of {_joined(ahead)}")
    if better:
        parts.append(f"of its own forms, {_joined(better)} {'is' if len(better) == 1 else 'are'} ahead of it")
    text = f"Of those that keep every zero: {'; '.join(parts)}."
    if several := [f"{one.contender} in {wins}" for one in peers if (wins := _wins(ours, one))]:
        text += f" Seed by seed, which is with the same batches, {REFERENCE} is ahead of {', '.join(several)}."
    if unsettled := [one.contender for one in (ours, *peers, *forms) if one.at_an_end]:
        text += f" Not settled, for want of learning rates on both sides of the best: {', '.join(unsettled)}."
    return text


def markdown(contents: Mapping[str, Any], missing: Sequence[str] = (), heading: str = "#") -> str:
    """Return results.md.

    Args:
        contents: of results.json.
        missing: what has been asked for and is not there yet.
        heading: the marks of the title.
    """
    parts = [
        f"{heading} {title(contents)}",
        main_table(contents).markdown(),
        verdict(contents),
        " ".join(notes(contents)),
    ]
    parts += [
        f"{heading}# Learning rates",
        "Validation perplexity with the first seed; bold is the best, whose test perplexity is in the table above.",
    ]
    parts.append(search_table(contents).markdown())
    if missing:
        parts += [f"{heading}# Missing", "\n".join(f"- {name}" for name in missing)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _wins(one: Summary, other: Summary) -> str:
    """Return in how many of the seeds that both have the first is ahead; empty where there are not several."""
    mine, theirs = one.by_seed, other.by_seed
    seeds = mine.keys() & theirs.keys()
    return f"{sum(mine[seed] < theirs[seed] for seed in seeds)} of {len(seeds)}" if len(seeds) > 1 else ""


def _is_ahead(one: Summary, other: Summary) -> bool:
    """Whether the first has the lower loss over the seeds that both have."""
    first, second = over_equal_seeds(one, other)
    return first.loss < second.loss


def _beside(ours: Summary, one: Summary) -> str:
    """Return a peer's name and perplexity, and beside it the reference's, where that is not of all its seeds."""
    theirs, own = over_equal_seeds(one, ours)
    same = "" if own.by_seed == ours.by_seed else f" against {own.perplexity:.2f} with the same seeds"
    return f"{one.contender} ({theirs.perplexity:.2f}{same})"


def _joined(some: Sequence[str]) -> str:
    *first, last = some
    return f"{', '.join(first)} and {last}" if first else last


def _lr(one: Summary) -> str:
    if one.best is None:
        return "diverged"
    return f"{one.best:g}{f' {AT_AN_END}' if one.at_an_end else ''}"


def _perplexity(found: Sequence[float]) -> str:
    if not found:
        return UNKNOWN
    mean = sum(found) / len(found)
    return f"{mean:.2f}" if len(found) == 1 else f"{mean:.2f} ({min(found):.2f} … {max(found):.2f})"


def _found(row: Mapping[str, Any], best: bool) -> str:
    if row["diverged"]:
        return "diverged"
    mark = "**" if best else ""
    return f"{mark}{row['validation']['perplexity']:.2f}{mark}"


def _percent(share: float) -> str:
    text = f"{100 * share:.2f}"
    return "100" if share == 1 else "< 100" if text == "100.00" else text


def _time(cost: Mapping[str, Any] | None) -> str:
    return UNKNOWN if cost is None else f"{cost['this_to_reference_wall']['median']:.2f}"


def _memory(cost: Mapping[str, Any] | None, reference: Mapping[str, Any] | None) -> str:
    if cost is None:
        return UNKNOWN
    if reference is None:
        return byte_text(cost["peak_bytes"])
    return f"{cost['peak_bytes'] / reference['peak_bytes']:.2f}"
