"""Which trial is next: each contender's learning rates with the first seed, further ones where the best is at an end,
then the other seeds at the best; every trial that results.json has is left alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spp.comparing import trial
from spp.comparing.data import load
from spp.comparing.methods import PST_KINDS, RULES_OF, require_methods
from spp.comparing.results import NAME, REPORT, Presence, Results, refuse_existing
from spp.comparing.tables import markdown
from spp.comparing.trial import Trial
from spp.configs.comparing import REFERENCE, CompareConfig, Contender, parse_contender
from spp.errors import ConfigError, NonFiniteError, arg, some_of
from spp.files import atomic_file, require_directory
from spp.files.hashes import fingerprint, packed_sha256, weights_fingerprint
from spp.files.provenance import Provenance
from spp.files.recognised import COMPARISON_TEXT
from spp.masks.patterns import all_finite, count_kept, pack_bits
from spp.models.targets import projection_weights, resolve_projections
from spp.report import time_text
from spp.rules import get_rule
from spp.training.loading import load_model, load_tokenizer

logger = logging.getLogger(__name__)

_WAIT = 1.0  # seconds
Rows = Mapping[str, Mapping[str, Any]]
Masks = Mapping[str, tuple[tuple[int, ...], npt.NDArray[np.uint8]]]  # shape and bits, by the weight's name


@dataclass(frozen=True)
class Plan:
    """The trials that a comparison has to run.

    Args:
        contenders: in order.
        lrs: {contender's name: learning rates, ascending}.
        steps: {contender's name: optimizer steps}.
        seeds: the first is that of the search.
        extend: learning rates beyond the given ones, at most.
    """

    contenders: Sequence[Contender]
    lrs: Mapping[str, Sequence[float]]
    steps: Mapping[str, int]
    seeds: Sequence[int]
    extend: int

    def pending(self, rows: Rows) -> Iterator[tuple[Contender, Trial]]:
        """Yield what can run now, in order of importance: searches first, then seeds."""
        for contender in self.contenders:
            for lr in self.searched(contender, rows):
                one = self.trial(contender, lr, self.seeds[0])
                if one.key not in rows:
                    yield contender, one
        for contender in self.contenders:
            best = self.best(contender, rows)
            for seed in self.seeds[1:] if best is not None else ():
                one = self.trial(contender, best, seed)  # type: ignore[arg-type]
                if one.key not in rows:
                    yield contender, one

    def searched(self, contender: Contender, rows: Rows) -> list[float]:
        """Return the learning rates of a search as far as they are known: the given ones, and those beyond."""
        lrs = sorted(self.lrs[contender.name])
        for _ in range(self.extend if len(lrs) > 1 else 0):
            best = self._best_of(contender, lrs, rows)
            if best == lrs[0]:
                lrs.insert(0, _rounded(lrs[0] * lrs[0] / lrs[1]))
            elif best == lrs[-1]:
                lrs.append(_rounded(lrs[-1] * lrs[-1] / lrs[-2]))
            else:
                break
        return lrs

    def best(self, contender: Contender, rows: Rows) -> float | None:
        """Return the learning rate of the lowest validation loss; None before the search is over or if all diverged."""
        return self._best_of(contender, self.searched(contender, rows), rows)

    def trial(self, contender: Contender, lr: float, seed: int) -> Trial:
        """Return the trial of a contender."""
        return Trial(contender.name, lr, seed, self.steps[contender.name])

    def _best_of(self, contender: Contender, lrs: Sequence[float], rows: Rows) -> float | None:
        found = {lr: rows.get(self.trial(contender, lr, self.seeds[0]).key) for lr in lrs}
        if any(row is None for row in found.values()):
            return None
        losses = {lr: row["validation"]["loss"] for lr, row in found.items() if row and not row["diverged"]}
        return min(losses, key=lambda lr: losses[lr]) if losses else None


def compare(config: CompareConfig) -> Results:
    """Run a comparison, or what is left of it, and return its results; they are on disk after every trial.

    Several processes may run the same comparison with `resume` at once: each takes trials that no other has.

    Args:
        config: all options.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError: the options, data or model are bad; nothing has been
            trained then.
        DependencyError: a contender needs PEFT, which is missing; likewise.
        OutputExistsError: the directory holds results, and neither resume nor overwrite was asked for.
        OutputError: overwrite was asked for, and another process works on them; or they cannot be written.

    Example:
        >>> config = CompareConfig(model="pruned", output_dir="out", data="train.txt")  # doctest: +SKIP
        >>> results = compare(config)  # doctest: +SKIP
    """
    contenders, path = config.parsed(), Path(str(config.output_dir)) / NAME
    if not (config.resume and path.exists()):  # where they do, the rows that need PEFT may be there
        require_methods(contenders)
    require_directory(path.parent, "the results need")
    refuse_existing(path, resume=config.resume, overwrite=config.overwrite)
    tokenizer = load_tokenizer(str(config.model))
    data = load(config, tokenizer)
    contenders, hashes = _examine(config, contenders, lambda model: data.check(model, config, tokenizer))
    if config.taught:
        hashes["teacher_weights"] = _teacher_hash(config, data, tokenizer)
    hashes = {**data.hashes(), **hashes}
    conditions = {**config.conditions(), "kind": data.kind, "bos": data.bos, **Provenance(hashes=hashes).to_dict()}
    with Presence(path.parent) as present:
        options = {"resume": config.resume, "overwrite": config.overwrite, "alone": present.alone}
        results = Results(path.parent, conditions, **options)
        present.share()
        _fill(config, contenders, data, results)
    return results


def _fill(config: CompareConfig, contenders: list[Contender], data: Any, results: Results) -> None:
    """Run what the results lack."""
    if config.cost_rounds:
        costs = results.read()["costs"]
        require_methods([contender for contender in contenders if contender.name not in costs])
    for name, source in (("pruned", config.model), ("dense", config.dense)):
        if source is not None:
            results.once("baselines", name, partial(trial.measure_baseline, config, source, data))
    for contender in contenders if config.budget == "time" else ():
        while not _cost(config, contender, results):
            time.sleep(_WAIT)  # another process is at it
    plan = plan_of(config, contenders, _steps(config, contenders, results))
    require_methods([contender for contender, _ in plan.pending(results.read()["rows"])])
    _report(config, plan, results)
    _run_all(config, plan, data, results)
    for contender in contenders if config.cost_rounds else ():
        _cost(config, contender, results)
    _run_all(config, plan, data, results)  # what another process has left, or made possible, in the meantime
    for name in _report(config, plan, results):
        logger.warning(
            "%s is not there yet: another process was at it; should that have ended, resume the comparison", name
        )


def _examine(
    config: CompareConfig, contenders: list[Contender], check_data: Callable[[Any], None]
) -> tuple[list[Contender], dict[str, str]]:
    """Check the models and the ranks; return the contenders, with the ranks of the budget, and the models' hashes.

    Args:
        check_data: raises where a model cannot read the data.
    """
    model = load_model(config.model, config.dtype)
    check_data(model)
    _require_finite(model, config.model)
    masks = _masks(model)
    if all(count_kept(bits) == math.prod(shape) for shape, bits in masks.values()):
        raise ConfigError(
            f"{arg('model')} is {config.model}, whose projections have no zeros; a comparison needs a pruned one: "
            f"prune it first"
        )
    hashes = {"masks": _hash(masks), "weights": weights_fingerprint(model) or "unknown"}
    if config.budget == "parameters":
        contenders = list({one.name: one for one in (_nearest(contender, model) for contender in contenders)}.values())
    _check_ranks(contenders, model)
    del model  # one model at a time is in memory
    if config.dense is not None:
        dense = load_model(config.dense, config.dtype)
        check_data(dense)
        _require_finite(dense, config.dense)
        _require_unpruned(config, _masks(dense), masks)
        hashes["dense_weights"] = weights_fingerprint(dense) or "unknown"
    return contenders, hashes


def _teacher_hash(config: CompareConfig, data: Any, tokenizer: Any) -> str:
    """Return the hash of the teacher, which fits the pruned model and speaks of all the data."""
    teacher = trial.teacher_of(config, load_model(config.model, config.dtype), tokenizer)
    assert teacher is not None
    teacher.check_rows(data.train)
    (found,) = teacher.identity.values()
    return found or "unknown"


def _require_unpruned(config: CompareConfig, before: Masks, masks: Masks) -> None:
    """Raise a ConfigError unless `before` is of the model that was pruned to `masks`."""
    if {name: shape for name, (shape, _) in before.items()} != {name: shape for name, (shape, _) in masks.items()}:
        raise ConfigError(
            f"{arg('dense')} is {config.dense}, whose weights are not those of {config.model} before pruning"
        )
    if not any((before[name][1] & ~bits).any() for name, (_, bits) in masks.items()):
        raise ConfigError(
            f"{arg('dense')} is {config.dense}, which has the zeros of {config.model}; it must be the model before "
            f"pruning"
        )


def plan_of(
    config: CompareConfig, contenders: Sequence[Contender] | None = None, steps: Mapping[str, int] | None = None
) -> Plan:
    """Return the plan of a comparison.

    Args:
        config: all options.
        contenders: where they are not those of the config, as with a budget of parameters.
        steps: of each contender, by name, where they are not those of the config, as with a budget of time.
    """
    contenders = config.parsed() if contenders is None else contenders
    steps = steps or {contender.name: config.steps for contender in contenders}
    return Plan(contenders, config.learning_rates(contenders), steps, config.seeds, config.extend)


def missing(config: CompareConfig, plan: Plan, contents: Mapping[str, Any]) -> list[str]:
    """Return what has been asked for and is not in the results, as far as it is known before a search is over."""
    found = [one.key for _, one in plan.pending(contents["rows"])]
    if config.cost_rounds:
        found += [f"cost of {c.name}" for c in plan.contenders if c.name not in contents["costs"]]
    return found


def write_report(directory: Path, contents: Mapping[str, Any], missing: Sequence[str]) -> None:
    """Write results.md beside a results.json of these contents."""
    with atomic_file(directory / REPORT, overwrite=True, kind=COMPARISON_TEXT) as temporary:
        temporary.write_text(markdown(contents, missing), encoding="utf-8")


def _report(config: CompareConfig, plan: Plan, results: Results) -> list[str]:
    """Write results.md, and return what is missing in it."""
    contents = results.read()
    names = missing(config, plan, contents)
    write_report(results.directory, contents, names)
    return names


def _run_all(config: CompareConfig, plan: Plan, data: Any, results: Results) -> None:
    """Run every trial that no other process has."""
    while _run_one(config, plan, data, results):
        _report(config, plan, results)


def _run_one(config: CompareConfig, plan: Plan, data: Any, results: Results) -> bool:
    """Run the first trial that is pending and no other process has; return whether there was one."""
    rows = results.read()["rows"]
    for contender, one in plan.pending(rows):
        if results.once("rows", one.key, partial(_timed, config, contender, one, data, results)):
            return True
    return False


def _timed(config: CompareConfig, contender: Contender, one: Trial, data: Any, results: Results) -> dict[str, Any]:
    logger.info("%s …", one.key)
    row = trial.run_trial(config, contender, one, data, partial(_worth_testing, one, config.seeds[0], results))
    found = [f"{part} perplexity {row[part]['perplexity']:.3f}" for part in ("validation", "test") if part in row]
    outcome = "diverged" if row["diverged"] else ", ".join(found)
    took = f", {time_text(row['step_wall_s'])} a step" if "step_wall_s" in row else ""
    logger.info("%s: %s%s", one.key, outcome, took)
    return row


def _worth_testing(one: Trial, searched: int, results: Results, loss: float) -> bool:
    """Whether a trial is to be tested: of a search only the best yet; other seeds run at a chosen learning rate alone.

    Args:
        searched: the seed of the search.
        loss: on the validation part.
    """
    if one.seed != searched:
        return True
    peers = (row for row in results.read()["rows"].values() if not row["diverged"])
    same = ("contender", "steps", "seed")
    return all(
        loss <= row["validation"]["loss"] for row in peers if all(row[name] == getattr(one, name) for name in same)
    )


def _cost(config: CompareConfig, contender: Contender, results: Results) -> bool:
    """Measure a contender's cost unless that is done; return whether it is."""

    def find() -> dict[str, Any]:
        logger.info("cost of a step of %s …", contender.name)
        return trial.measure_cost(config, contender)

    return results.once("costs", contender.name, find) or contender.name in results.read()["costs"]


def _steps(config: CompareConfig, contenders: Sequence[Contender], results: Results) -> dict[str, int]:
    """Return the optimizer steps of each contender; with a budget of time, as many as the reference's time allows."""
    if config.budget != "time":
        return {contender.name: config.steps for contender in contenders}
    costs = results.read()["costs"]
    ratios = {c.name: costs[c.name]["reference_to_this_wall"]["median"] for c in contenders}
    return {name: max(1, round(config.steps * ratio)) for name, ratio in ratios.items()}


def _nearest(contender: Contender, model: Any) -> Contender:
    """Return the contender with the rank whose parameters are nearest to the reference's; as it is, without a rank."""
    if contender.traits.rank is None:
        return contender
    shapes = _shapes(model)
    wanted = _count(parse_contender(REFERENCE), shapes)
    ranks = range(1, min(min(shape) for shape in shapes) + 1)
    return contender.with_rank(min(ranks, key=lambda r: abs(_count(contender.with_rank(r), shapes) - wanted)))


def _check_ranks(contenders: Sequence[Contender], model: Any) -> None:
    """Raise a ConfigError for a rank that a layer cannot have, before anything is trained."""
    projections = resolve_projections(model)
    for contender in contenders:
        if contender.kind in RULES_OF:
            rule, r = get_rule(RULES_OF[contender.kind]), contender.options["r"]
            for path, projection in projections.items():
                where = f"contender {contender.name!r}: {path}"
                rule.check_rank(projection.out_features, projection.in_features, r, where, "lower the contender's r")


def _require_finite(model: Any, name: object) -> None:
    """Raise a NonFiniteError that names the model and its bad weights, before anything is measured."""
    bad = [key for key, value in model.state_dict().items() if not all_finite(value)]
    if bad:
        raise NonFiniteError(f"{name}: NaN or infinity in {some_of(bad)}; mend it, or save or fetch it again")


def _masks(model: Any) -> Masks:
    """Return where the projections are not zero."""
    return {name: (tuple(weight.shape), pack_bits(weight)) for name, weight, _ in projection_weights(model)}


def _hash(masks: Masks) -> str:
    return fingerprint({name: packed_sha256(shape, bits) for name, (shape, bits) in masks.items()})


def _shapes(model: Any) -> list[tuple[int, int]]:
    """Return (m, n) of every matrix that is adapted, those of fused experts one by one."""
    return [
        (projection.out_features, projection.in_features)
        for projection in resolve_projections(model).values()
        for _ in range(projection.shape[0] if projection.fused else 1)
    ]


def _count(contender: Contender, shapes: Sequence[tuple[int, int]]) -> int:
    """Return how many parameters a contender with a rank trains."""
    assert contender.traits.rank is not None
    r = contender.options[contender.traits.rank]
    if contender.kind == "spp-no-beta":  # β stays what it is
        return sum(r * n for _, n in shapes)
    if contender.kind in PST_KINDS:  # U V and A B, R and C
        return sum((2 * r + 1) * (m + n) for m, n in shapes)
    return sum(r * n + (m if contender.kind.startswith("spp") else r * m) for m, n in shapes)


def _rounded(lr: float) -> float:
    return float(f"{lr:.2g}")
