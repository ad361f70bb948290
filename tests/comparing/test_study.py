"""What is run next, what is kept, and what two processes share."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from spp.comparing.chart import make_figure
from spp.comparing.results import Presence, Results
from spp.comparing.study import Plan, _worth_testing
from spp.comparing.tables import main_table, markdown, notes, search_table, summaries, verdict
from spp.comparing.trial import Trial
from spp.configs.comparing import parse_contenders
from spp.errors import CheckpointError, ConfigError, DataError, OutputError, OutputExistsError

CONDITIONS = {
    "budget": "steps",
    "steps": 100,
    "batch_size": 2,
    "block_length": 128,
    "model": "pruned",
    "data": ["train.txt"],
    "eval_text": "valid.txt",
    "kind": "text",
    "test_windows": 20,
    "validation_windows": 10,
    "window": 512,
}
ENVIRONMENT = {
    "device": "a processor",
    "dtype": "float32",
    "threads": 1,
    "cores": 2,
    "kernels": "auto",
    "compiled_products": False,
    "python": "3.11",
    "versions": {"spp": "0"},
}


def row(contender: str, lr: float, seed: int, loss: float | None, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"contender": contender, "lr": lr, "seed": seed, "steps": 100, "trainable": 1000}
    values |= {"diverged": loss is None, "environment": ENVIRONMENT, "zeros_kept": 1.0, "pattern_valid": True}
    if loss is not None:
        values |= {
            "validation": {"loss": loss, "perplexity": 10 * loss},
            "test": {"loss": loss, "perplexity": 9 * loss},
        }
    return values | more


def plan(*names: str, extend: int = 1, seeds: tuple[int, ...] = (0,)) -> Plan:
    contenders = parse_contenders(names)
    lrs = {c.name: (1e-2, 2e-2, 4e-2) for c in contenders}
    return Plan(contenders, lrs, {c.name: 100 for c in contenders}, seeds, extend)


def run_all(one: Plan, loss: Any) -> dict[str, dict[str, Any]]:
    """Run a plan to its end with a made-up loss; return the rows in the order in which they were asked for."""
    rows: dict[str, dict[str, Any]] = {}
    while (following := next(iter(one.pending(rows)), None)) is not None:
        _, trial = following
        rows[trial.key] = row(trial.contender, trial.lr, trial.seed, loss(trial))
    return rows


def test_a_search_ends_where_the_best_lies_inside() -> None:
    rows = run_all(plan("spp", extend=3), lambda t: abs(t.lr - 2e-2))
    assert [r["lr"] for r in rows.values()] == [1e-2, 2e-2, 4e-2]


@pytest.mark.parametrize(("best", "expected"), [(1.0, [8e-2, 0.16]), (1e-9, [5e-3, 2.5e-3])])
def test_a_search_goes_on_beyond_an_end(best: float, expected: list[float]) -> None:
    rows = run_all(plan("spp", extend=2), lambda t: abs(t.lr - best))
    assert [r["lr"] for r in rows.values()][3:] == expected


def test_other_seeds_come_last_and_at_the_best_rate_only() -> None:
    one = plan("spp", "hira", seeds=(3, 1, 2))
    rows = run_all(one, lambda t: abs(t.lr - 2e-2) + 0.001 * t.seed)
    asked = [(r["contender"], r["lr"], r["seed"]) for r in rows.values()]
    assert asked[:6] == [(name, lr, 3) for name in ("spp", "hira") for lr in (1e-2, 2e-2, 4e-2)]
    assert asked[6:] == [(name, 2e-2, seed) for name in ("spp", "hira") for seed in (1, 2)]


def test_what_diverged_is_never_the_best_and_never_tried_again() -> None:
    one = plan("spp", extend=0, seeds=(0, 1))
    rows = run_all(one, lambda t: None if t.lr > 1.5e-2 else 1.0)
    assert one.best(one.contenders[0], rows) == 1e-2
    everything = run_all(one, lambda t: None)
    assert len(everything) == 3 and one.best(one.contenders[0], everything) is None


def test_results_go_on_only_where_they_were_found_alike(tmp_path: Path) -> None:
    Results(tmp_path / "out", CONDITIONS).add("rows", "a", row("spp", 1e-2, 0, 3.0))
    with pytest.raises(OutputExistsError, match="resume"):
        Results(tmp_path / "out", CONDITIONS)
    assert "a" in Results(tmp_path / "out", CONDITIONS, resume=True).read()["rows"]
    with pytest.raises(ConfigError, match="steps: 100 there, 99 now"):
        Results(tmp_path / "out", {**CONDITIONS, "steps": 99}, resume=True)
    data = {**CONDITIONS, "data_sha256": "aa"}
    assert "a" in Results(tmp_path / "out", data, resume=True).read()["rows"]  # written before this was a condition
    anew = Results(tmp_path / "out", data, overwrite=True)
    assert anew.read()["rows"] == {}
    anew.add("rows", "a", row("spp", 1e-2, 0, 3.0))
    with pytest.raises(ConfigError, match="data_sha256: 'aa' there, 'bb' now"):
        Results(tmp_path / "out", {**data, "data_sha256": "bb"}, resume=True)
    assert "a" in Results(tmp_path / "out", {**data, "bos": False}, resume=True).read()["rows"]
    with pytest.raises(ConfigError, match="bos: False there, True now"):  # the rows there had no BOS in their windows
        Results(tmp_path / "out", {**data, "bos": True}, resume=True)


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 2}', '{"format_version": 1, "rows": []}', "[1]"])
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CheckpointError):
        Results(tmp_path, CONDITIONS, resume=True)
    assert (tmp_path / "results.json").read_text() == text


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("rows", "lr", None),
        ("rows", "lr", "fast"),
        ("rows", "environment", "here"),
        ("costs", "this_to_reference_wall", {}),
        ("costs", "reference_to_this_wall", None),
        ("rows", "validation", {"loss": 3.0}),
        ("rows", "validation", {"loss": 3.0, "perplexity": "30"}),
        ("rows", "test", None),
        ("costs", "peak_bytes", "many"),
        ("baselines", "pattern", None),
    ],
)
def test_an_entry_that_lacks_something_is_named(tmp_path: Path, part: str, key: str, value: Any) -> None:
    measured = {"loss": 3.0, "perplexity": 20.0}
    whole: dict[str, dict[str, Any]] = {
        "rows": row("spp", 1e-2, 0, 3.0),
        "costs": {
            "peak_bytes": 1,
            "environment": ENVIRONMENT,
            "this_to_reference_wall": {"median": 1.0},
            "reference_to_this_wall": {"median": 1.0},
        },
        "baselines": {"pattern": "2:4", "test": measured, "validation": measured},
    }
    for name, entry in whole.items():
        Results(tmp_path, CONDITIONS, resume=True).add(name, "x", entry)
    contents = json.loads((tmp_path / "results.json").read_text())
    assert "| spp |" in markdown(contents)
    if value is None and key != "test":
        del contents[part]["x"][key]
    else:
        contents[part]["x"][key] = value
    (tmp_path / "results.json").write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match=f"{part} 'x' lacks what it must say; put back a copy"):
        Results(tmp_path, CONDITIONS, resume=True)


def test_results_that_hold_nothing_are_in_nobodys_way(tmp_path: Path) -> None:
    Results(tmp_path, CONDITIONS)
    other = CONDITIONS | {"model": "another"}
    assert Results(tmp_path, other).read()["conditions"] == other
    mine = Results(tmp_path, CONDITIONS, resume=True)
    assert mine.read()["conditions"] == CONDITIONS
    theirs = Results(tmp_path, other)  # takes it over, before there is anything in it
    with pytest.raises(ConfigError, match="was begun anew under other conditions"):
        mine.add("rows", "x", row("spp", 1e-2, 0, 3.0))
    theirs.add("rows", "x", row("spp", 1e-2, 0, 3.0))
    with pytest.raises(OutputExistsError):
        Results(tmp_path, CONDITIONS)


def test_a_trial_that_someone_runs_is_left_to_him(tmp_path: Path) -> None:
    results, others = (Results(tmp_path, CONDITIONS, resume=bool(i)) for i in range(2))  # a lock each, as two processes
    one, two = row("spp", 1e-2, 0, 3.0), row("spp", 2e-2, 0, None)
    with others.claim("rows a") as mine:
        assert mine
        assert not results.once("rows", "a", lambda: pytest.fail("it is claimed"))
        assert results.once("rows", "b", lambda: one)
    assert results.once("rows", "a", lambda: two)  # let go without a row, as a killed process does
    assert not results.once("rows", "a", lambda: pytest.fail("it is there"))
    assert json.loads(results.path.read_text())["rows"] == {"a": two, "b": one}


def test_what_others_work_on_is_not_begun_anew(tmp_path: Path) -> None:
    """Neither asked for, nor by the way, where there is nothing in it yet (deepinv/deepinv#525)."""
    other = CONDITIONS | {"model": "another"}
    with Presence(tmp_path) as first:
        assert first.alone
        results = Results(tmp_path, CONDITIONS, alone=True)
        first.share()
        with Presence(tmp_path) as second:
            assert not second.alone
            with pytest.raises(OutputError, match=r"another process is at work .*join it \(resume=True\)"):
                Results(tmp_path, CONDITIONS, overwrite=True, alone=second.alone)
            with pytest.raises(ConfigError, match="other conditions"):
                Results(tmp_path, other, alone=second.alone)
            Results(tmp_path, CONDITIONS, resume=True, alone=second.alone).add("rows", "a", row("spp", 1e-2, 0, 3.0))
        assert list(results.read()["rows"]) == ["a"]
    with Presence(tmp_path) as third:
        assert third.alone
        assert Results(tmp_path, other, overwrite=True, alone=third.alone).read()["rows"] == {}


def test_other_seeds_are_tested_though_another_rate_was_better_with_them(tmp_path: Path) -> None:
    results = Results(tmp_path, CONDITIONS)
    for seed in (0, 1):  # the best of a search that went on later
        results.add("rows", f"{seed}", row("spp", 1e-2, seed, 2.8))
    assert _worth_testing(Trial("spp", 2e-2, 0, 100), 0, results, 2.7)
    assert not _worth_testing(Trial("spp", 4e-2, 0, 100), 0, results, 2.9)
    assert _worth_testing(Trial("spp", 2e-2, 1, 100), 0, results, 2.9)


def contents(*rows: dict[str, Any], **parts: Any) -> dict[str, Any]:
    named = {f"{r['contender']} {r['lr']} {r['seed']}": r for r in rows}
    return {"conditions": CONDITIONS, "baselines": {}, "costs": {}, "rows": named, **parts}


def test_the_table_takes_the_rate_that_validation_chose() -> None:
    good = row("spp", 2e-2, 0, 3.0)
    lucky = row("spp", 4e-2, 0, 3.5)
    lucky["test"] = {"loss": 1.0, "perplexity": 1.0}  # the best on the test windows, which must not choose
    found = contents(row("spp", 1e-2, 0, 4.0), good, lucky, row("spp", 2e-2, 1, 3.2), row("lora", 1e-3, 0, 1.5))
    found["rows"]["lora 0.001 0"] |= {"zeros_kept": 0.25, "pattern_valid": False}
    first, second = summaries(found)
    assert (first.contender, second.contender) == ("lora", "spp")
    assert second.best == 2e-2 and second.perplexities == pytest.approx([27.0, 28.8]) and not second.at_an_end
    table = main_table(found)
    cells = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    assert cells["spp"]["after"] == "27.90 (27.00 … 28.80)" and cells["spp"]["lr"] == "0.02"
    assert cells["spp"]["zeros kept"] == "100" and cells["spp"]["N:M"] == "yes"
    assert cells["lora"]["zeros kept"] == "25.00" and cells["lora"]["N:M"] == "no" and cells["lora"]["lr"] == "0.001 †"
    pruned = {"test": {"perplexity": 40.0}, "pattern": "unstructured"}
    assert {line[7] for line in main_table(found | {"baselines": {"pruned": pruned}}).rows} == {"–"}
    assert any("lowest or highest" in line for line in notes(found))
    assert "**30.00**" in search_table(found).markdown()
    text = markdown(found, ["hira, lr 0.01, seed 0, 100 steps"])
    assert "## Missing\n\n- hira, lr 0.01, seed 0, 100 steps" in text


def test_the_verdict_is_on_peers_that_keep_every_zero() -> None:
    def searched(name: str, loss: float, **more: Any) -> list[dict[str, Any]]:
        return [row(name, lr, 0, loss + abs(lr - 2e-2), **more) for lr in (1e-2, 2e-2, 4e-2)]

    rows = [*searched("spp", 3.0), *searched("hira", 3.5), *searched("masked-lora", 2.5), *searched("spp:r=4", 1.0)]
    rows += [*searched("lora", 1.0, zeros_kept=0.0), row("ia3", 1e-2, 0, 9.0)]
    found = contents(*rows)
    for one in found["rows"].values():
        one["test"]["perplexity"] = 10.0
    assert verdict(found) == (
        "Of those that keep every zero: spp (10.00) does not hold against masked-lora (10.00); "
        "it is ahead of hira (10.00) and ia3 (10.00); of its own forms, spp:r=4 (10.00) is ahead of it. "
        "Not settled, for want of learning rates on both sides of the best: ia3."
    )
    assert verdict(contents(row("hira", 1e-2, 0, 3.0))) == ""
    level = contents(
        *searched("spp", 3.0), *searched("hira", 3.0), *searched("spp:r=4", 3.0), row("spp:r=8", 1e-2, 0, 1.0)
    )
    assert "own forms, spp:r=8 (9.00) is ahead of it." in (text := verdict(level)) and "spp:r=4" not in text
    assert "does not hold against hira" in text and text.endswith("best: spp:r=8.")
    assert verdict(contents(*searched("spp", 3.0), *searched("hira", 4.0))).count("is ahead of hira") == 1


def test_the_verdict_counts_the_seeds_that_both_have() -> None:
    losses = {"spp": (3.0, 3.2, 3.1), "hira": (2.8, 3.3), "masked-lora": (3.1, 3.3, 3.1), "norms": (3.1,)}
    found = contents(*(row(name, 1e-2, i, loss) for name, some in losses.items() for i, loss in enumerate(some)))
    expected = "with the same batches, spp is ahead of hira in 1 of 2, masked-lora in 2 of 3. "
    assert f" Seed by seed, which is {expected}" in verdict(found)


def test_the_verdict_is_over_the_seeds_that_both_have() -> None:
    """spp has the worse mean of all its seeds, and the better one of each that the others have."""
    losses = {"spp": (3.0, 4.0, 5.0), "hira": (3.1, 4.1), "norms": (3.2,), "ia3": (2.9, 4.2, 5.0), "full": (2.9,)}
    rows = [row(name, 1e-2, i, loss) for name, some in losses.items() for i, loss in enumerate(some)]
    for one in rows:
        one["test"]["perplexity"] = 10 * one["test"]["loss"]
    assert verdict(contents(*rows)).startswith(
        "Of those that keep every zero: spp (40.00) does not hold against full (29.00 against 30.00 with the same "
        "seeds); it is ahead of norms (32.00 against 30.00 with the same seeds), hira (36.00 against 35.00 with the "
        "same seeds) and ia3 (40.33). "
    )
    apart = contents(row("spp", 1e-2, 0, 3.0), row("hira", 1e-2, 1, 4.0))
    assert "spp (27.00) is ahead of hira (36.00). " in verdict(apart)


def test_groups_are_whole_only_if_they_are_with_every_seed() -> None:
    found = contents(row("spp", 1e-2, 0, 3.0), row("spp", 1e-2, 1, 3.0, pattern_valid=False))
    assert main_table(found).rows[0][7] == "no"


def test_the_notes_tell_every_machine_and_who_trains_rounded_weights() -> None:
    half = {"environment": ENVIRONMENT | {"dtype": "bfloat16"}}
    cost = {"environment": ENVIRONMENT | {"device": "another"}, "peak_bytes": 1}
    text = " ".join(notes(contents(row("spp", 1e-2, 0, 3.0, **half), costs={"spp": cost})))
    assert "Measured on a processor, 1 thread" in text and "Measured on another, 1 thread" in text
    assert "without a float32 copy" not in text
    text = " ".join(notes(contents(row("full", 1e-2, 0, 3.0, **half))))
    assert "full and norms train the weights themselves, in bfloat16 without a float32 copy" in text


def test_what_a_column_does_not_tell_the_notes_do() -> None:
    baselines = {name: {"test": {"perplexity": p}, "pattern": "2:4"} for name, p in (("pruned", 90.0), ("dense", 9.0))}
    rows = [row(name, 1e-2, 0, 3.0) for name in ("spp-mask-updates:every=5", "pst", "pst-pruned", "ia3")]
    found = contents(*rows, baselines=baselines)
    assert {line[0]: line[4] for line in main_table(found).rows} == {
        "spp-mask-updates:every=5": "90.00",
        "pst": "9.00",  # it starts there
        "pst-pruned": "90.00",
        "ia3": "90.00",
    }
    assert "–" in main_table(contents(row("pst", 1e-2, 0, 3.0), baselines={"pruned": baselines["pruned"]})).rows[0][4]
    note = "A step of spp-mask-updates is one without an update"
    assert note not in " ".join(notes(found))
    cost = {"environment": ENVIRONMENT, "peak_bytes": 1}
    assert note in " ".join(notes(found | {"costs": {"ia3": cost}}))
    fixed = "The number of parameters is not equal where there is no rank to choose: ia3."
    assert fixed not in " ".join(notes(found))
    assert fixed in notes(found | {"conditions": CONDITIONS | {"budget": "parameters"}})


def test_a_zero_that_was_lost_never_rounds_to_all_kept() -> None:
    found = contents(row("spp", 1e-2, 0, 3.0, zeros_kept=0.9999999))
    assert "< 100" in main_table(found).rows[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spread", [1.0, 1.05, 3.0, 12.0, 1e4, 1e7])
def test_labels_of_the_chart_do_not_overlap(spread: float) -> None:
    pytest.importorskip("matplotlib")
    sizes = {"spp": 2_442_240, "hira": int(2_442_240 * spread)}
    found = contents(*(row(name, 1e-2, 0, 3.0 + size / 1e9, trainable=size) for name, size in sizes.items()))
    if spread == 1.0:
        found["rows"] = dict(list(found["rows"].items())[:1])  # one point spans nothing
    figure = make_figure(found)
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    shown = [
        t.label1
        for which in (axis.get_major_ticks(), axis.get_minor_ticks())
        for t in which
        if low <= t.get_loc() <= high
    ]
    boxes = sorted((b.x0, b.x1) for b in (one.get_window_extent() for one in shown if one.get_text()))
    assert boxes and all(one[1] < other[0] for one, other in itertools.pairwise(boxes))


def test_numbers_of_a_crowd_lie_on_nothing() -> None:
    text_of = pytest.importorskip("matplotlib.text").Text
    names = [f"spp:r={r}" for r in range(1, 33)]
    cost = {"this_to_reference_wall": {"median": 1.0}, "peak_bytes": 1, "environment": ENVIRONMENT}
    rows = [row(name, 1e-2, 0, 3.0 + i / 1000) for i, name in enumerate(names)]
    found = contents(*rows, row("ia3", 1e-2, 0, 9.0), costs=dict.fromkeys(names, cost))
    figure = make_figure(found)
    figure.canvas.draw()
    for axes, count in zip(figure.axes[:2], (32, 33), strict=True):
        boxes = [text_of.get_window_extent(text) for text in axes.texts]  # without the lines
        assert [text.get_text() for text in axes.texts] == [str(i + 1) for i in range(count)]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        dots = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert len(dots) == count
        assert not any(box.contains(*axes.transData.transform(dot)) for box in boxes for dot in dots)


def test_a_perplexity_too_large_for_a_number_is_not_drawn() -> None:
    pytest.importorskip("matplotlib")
    wild = row("lora", 1e-2, 0, 800.0)
    wild["test"] = {"loss": 800.0, "perplexity": float("inf")}
    figure = make_figure(contents(row("spp", 1e-2, 0, 3.0), wild))
    figure.canvas.draw()
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["1"]
    with pytest.raises(DataError, match="nothing to draw"):
        make_figure(contents(wild))


def test_costs_are_relative_to_the_reference() -> None:
    cost = {"this_to_reference_wall": {"median": 1.5}, "peak_bytes": 300}
    reference = {"this_to_reference_wall": {"median": 1.0}, "peak_bytes": 200}
    found = contents(row("hira", 1e-2, 0, 3.0), costs={"hira": cost, "spp": reference})
    whole = {name: {**entry, "environment": ENVIRONMENT} for name, entry in found["costs"].items()}
    assert main_table(found).rows[0][-2:] == ("1.50", "1.50") and "memory / spp" in main_table(found).columns
    assert "Time and peak memory of a step relative" in " ".join(notes(found | {"costs": whole}))
    del found["costs"]["spp"]
    assert main_table(found).rows[0][-1] == "0.0 MiB" and main_table(found).columns[-1] == "peak memory"
    assert "Time of a step relative" in " ".join(notes(found | {"costs": {"hira": whole["hira"]}}))
    assert main_table(contents(row("hira", 1e-2, 0, None))).rows[0][2] == "diverged"
