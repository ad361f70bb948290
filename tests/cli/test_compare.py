"""spp compare: a table, results that go on, and mistakes in the words of the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

Call = Callable[..., Outcome]
SMALL = ("--steps", 2, "--block-length", 16, "--window", 16, "--test-windows", 2, "--validation-windows", 2)
QUICK = (*SMALL, "--cost-rounds", 0, "--lr", "2e-2", "--device", "cpu")


@pytest.mark.slow
def test_compare(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("compare", pruned, out, "--data", text, *QUICK, "--contenders", "spp:r=4 norms")
    found = spp(*arguments, "--plot", tmp_path / "chart.png")
    assert found.code == 0, found.err
    assert f"wrote {out / 'results.json'}" in found.out and f"wrote {out / 'results.md'}" in found.out
    assert (out / "results.md").exists() and f"wrote {tmp_path / 'chart.png'}" in found.out
    assert "spp:r=4, lr 0.02, seed 0, 2 steps: validation perplexity" in found.err
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["contender"] for row in rows.values()} == {"spp:r=4", "norms"}

    assert "exists" in (again := spp(*arguments)).err and "--resume" in again.err and again.code == 1
    assert "rows" not in again.err  # said before the data is tokenized
    assert "lr 0.02" not in spp(*arguments, "--resume").err
    other = spp("compare", pruned, out, "--data", text, *QUICK, "--contenders", "norms", "--resume", "--batch-size", 3)
    assert other.code == 1 and "--batch-size: 2 there, 3 now" in other.err


def test_mistakes(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    start = ("compare", pruned, tmp_path / "out", "--data", text)
    for options, words in (
        (("--contenders", "dora"), "contender 'dora': known are spp"),
        (("--seeds", "a"), "--seeds: 'a'"),
        (("--budget", "money"), "--budget is 'money'"),
        (("--lr", "x"), "--lr is 'x'"),
        (("--lr", "1e99"), "--lr is '1e99'"),
        (("--plot", "chart.bmp"), "--plot is chart.bmp"),
        (("--overwrite", "--resume"), "--overwrite and --resume exclude"),
    ):
        found = spp(*start, *options)
        assert found.code == 1 and words in found.err, found.err
    assert not (tmp_path / "out").exists()
    assert spp("compare", "nowhere", tmp_path / "out", "--data", text).code == 1


def test_a_missing_library_is_said_before_anything_is_trained(
    spp: Call, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    found = spp("compare", pruned, tmp_path / "out", "--data", text, *QUICK, "--contenders", "spp hira:r=4 ia3")
    assert found.code == 1 and "spp, lr" not in found.err and not (tmp_path / "out").exists()
    assert "the contender hira needs peft: pip install 'spp[peft]', or leave it out" in found.err


def test_the_list(spp: Call) -> None:
    out = spp("compare", "--list").out
    assert "masked-lora" in out and "ablations: spp-no-beta spp-random-beta" in out


def test_an_interruption_says_what_is_kept(
    spp: Call, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spp.comparing.trial.run_trial", interrupted)
    out = tmp_path / "out"
    found = spp("compare", pruned, out, "--data", text, *QUICK, "--contenders", "norms")
    assert found.code == 130 and f"interrupted; --resume goes on with what {out / 'results.json'} holds" in found.err
    assert json.loads((out / "results.json").read_text())["baselines"].keys() == {"pruned"}
