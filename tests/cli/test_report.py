"""spp report: the page and the JSON object say the same; a whole road of real commands comes out on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import LINES, Outcome

Call = Callable[..., Outcome]


@pytest.fixture
def result(tmp_path: Path, pruned: Path) -> Path:
    """A result of spp eval on a checkpoint that has no certificate."""
    values = {"model": str(pruned), "adapter": None, "perplexity": 20.5, "window": 64, "text": "valid.txt"}
    (tmp_path / "result.json").write_text(json.dumps(values))
    return tmp_path / "result.json"


def test_json_is_one_line_with_what_the_page_has(spp: Call, result: Path, tmp_path: Path) -> None:
    found = spp("report", result, "--json", "--out", tmp_path / "page.html")
    assert found.code == 0 and found.out.count("\n") == 1
    values = json.loads(found.out)
    assert values["models"][0]["stage"] == "pruned" and values["columns"][0]["values"] == [20.5]
    assert values["zeros"][0]["report"]["sparsity"] == 0.5 and values["zeros"][0]["verified"] is None
    page = (tmp_path / "page.html").read_text()
    assert "20.5000" in page and all(note.split(":")[0] in page for note in values["notes"])
    assert values["commands"] == [f"spp eval {values['results'][0]['model']} --text valid.txt --window 64 --json"]


def test_the_page_is_report_html_and_an_earlier_one_stays(
    spp: Call, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "wrote report.html" in spp("report", result, "--no-verify").out
    refused = spp("report", result)
    assert refused.code == 1 and "report.html exists" in refused.err and "--overwrite" in refused.err
    assert spp("report", result, "--overwrite").code == 0
    (tmp_path / "report.html").unlink()
    assert spp("report", result, "--json").code == 0 and not (tmp_path / "report.html").exists()


def test_mistakes_are_one_message(spp: Call, result: Path, tmp_path: Path) -> None:
    for arguments, told in (
        (["nowhere"], "there is no file or directory nowhere; expected a run directory of spp tune"),
        ([result, "--prompts", tmp_path / "none.txt"], "--prompts: "),
        ([result, "--max-new-tokens", 0], "--max-new-tokens is 0"),
        ([result, "--device", "tpu"], "--device is 'tpu'"),
    ):
        found = spp("report", *arguments, "--out", tmp_path / "page.html")
        assert found.code == 1 and f"error: {told}" in found.err and not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_a_whole_road(spp: Call, dense: Path, tmp_path: Path) -> None:
    """What prune, tune, merge and eval write is what is read, and the page has the commands that were given."""
    text, pruned, run, merged = (tmp_path / name for name in ("train.txt", "pruned", "run", "merged"))
    text.write_text("\n".join(LINES), encoding="utf-8")
    data = ["--calibration", text, "--nsamples", 4, "--seqlen", 32]
    spp("prune", dense, pruned, "--method", "wanda", *data, "--report", tmp_path / "prune.json")
    options = ["--steps", 3, "--lr", "0.02", "--block-length", 32, "--r", 4]
    spp("tune", pruned, run, "--data", text, "--eval-text", text, "--window", 64, *options)
    spp("merge", pruned, run / "adapter", merged)
    for name, model in (("dense", [dense]), ("tuned", [pruned, "--adapter", run / "adapter"]), ("merged", [merged])):
        found = spp("eval", *model, "--text", text, "--window", 64, "--json")
        (tmp_path / f"{name}.json").write_text(found.out)
    found = spp("report", tmp_path, "--dense", dense, "--out", tmp_path / "page.html", "--json")
    assert found.code == 0, found.err
    values = json.loads(found.out)
    assert [model["stage"] for model in values["models"]] == ["dense", "pruned", "tuned", "merged"]
    (column,) = values["columns"]
    best, start, tuned, merged_value = column["values"]
    assert tuned == merged_value != start, "of the run's own measurement, and of spp eval: one column"
    if best < start:
        share = (math.log(start) - math.log(tuned)) / (math.log(start) - math.log(best))
        assert column["recovered"][2] == pytest.approx(share)
    assert {zeros["verified"] for zeros in values["zeros"] if zeros["name"] != str(dense)} == {True}
    assert values["changes"][0]["merge"]["survived"] > 0.99
    typed = [" ".join(map(str, ["spp prune", dense, pruned, "--method wanda --pattern 2:4", *data, "--seed 0"]))]
    typed += [f"spp merge {pruned} {run / 'adapter'} {merged}", f"spp verify {merged} --against {pruned}"]
    assert set(typed) - {command.replace("PRUNED", str(pruned)) for command in values["commands"]} == set()
    (tune,) = (command for command in values["commands"] if command.startswith("spp tune"))
    for part in (f"spp tune {pruned} {run} --data {text}", "--steps 3", "--lr 0.02", "--window 64", "--r 4"):
        assert part in tune
