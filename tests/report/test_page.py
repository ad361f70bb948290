"""The page of runs and results: every number is in a file, compares with its neighbours, and is text."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from spp.certifying.save import save_model
from spp.configs.tuning import TuneConfig
from spp.errors import CheckpointError, ConfigError, DataError, OutputExistsError, SPPError
from spp.merging.disk import merge_checkpoint
from spp.merging.model import merge
from spp.report import html_report
from spp.report.contents import recipe_of
from spp.report.measured import Measured, columns_of
from spp.report.page import html_page
from spp.report.runs import read_sources
from spp.report.svg import _LINES, averaged, contrast, heat_colours, line_chart, ticks
from spp.wrapping.adapters import load_adapter, save_adapter
from spp.wrapping.wrap import adapter_parameters, wrap
from tests.helpers.models import prune_nm_, tiny_llama, tiny_tokenizer

NASTY = "<script>alert('1')</script>&\"x"
TEXT = {"text": "valid.txt", "text_sha256": "a" * 64, "window": 64, "windows": 9, "tokens": 567}


def write(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def measured(path: Path, model: object, perplexity: float, **values: object) -> Path:
    """A file as spp eval --json writes it."""
    found = {"model": str(model), "adapter": None, "perplexity": perplexity, "loss": math.log(perplexity), **TEXT}
    return write(path, found | values)


def make_run(path: Path, model: object, **evaluation: object) -> Path:
    """A run directory without an adapter, as spp tune leaves it before the last step."""
    options = TuneConfig(model=str(model), data="train.txt", output_dir=str(path), steps=4, lr=0.01).to_dict()
    data = {"kind": "text", "rows": 8, "tokens": 64, "sha256": "d" * 64}
    write(path / "config.json", {"format": "spp-tune-1", "tune": options, "data": data, "versions": {"torch": "2.8"}})
    write(path / "eval.json", {"text": "valid.txt", **evaluation})
    lines = [json.dumps({"step": i, "loss": 5.0 - i, "lr": 0.01, "seconds": 1.5 * i}) for i in (1, 2, 3)]
    (path / "log.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 4, "lo', encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense, a pruned and a merged model, a run with an adapter, and results of all of them."""
    root = tmp_path_factory.mktemp("road")
    tiny_llama().save_pretrained(root / "dense")
    model = prune_nm_(tiny_llama())
    save_model(model, root / "pruned")
    tiny_tokenizer().save_pretrained(root / "pruned")
    before, after = ({"perplexity": p, "loss": math.log(p), **TEXT} for p in (100.0, 20.0))
    make_run(root / "run", root / "pruned", before=before, after=after)
    wrap(model, r=2, seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_adapter(model, root / "run" / "adapter")
    merge_checkpoint(root / "pruned", root / "run" / "adapter", root / "merged")
    measured(root / "dense.json", root / "dense", 10.0)
    measured(root / "merged.json", root / "merged", 20.0, versions={"spp": "1"}, seconds=2.0)
    return root


class Parsed(HTMLParser):
    """The tags with their attributes, and the text, of a page whose tags are closed in order."""

    EMPTY = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in self.EMPTY else [tag]

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def cells(report: Any, column: int = 2) -> dict[str, str]:
    """The cells of a column of the table of perplexities, by stage."""
    return {row[1]: row[column] for row in report.results()[0].rows}


# ---- Columns.


@pytest.mark.parametrize("what", ["text_sha256", "tokenizer_sha256", "window", "bos", "protocol", "windows", "tokens"])
def test_numbers_of_other_conditions_have_columns_of_their_own(what: str, tmp_path: Path) -> None:
    known = {**TEXT, "tokenizer_sha256": "e" * 64, "bos": "auto", "protocol": "windows"}
    one = measured(tmp_path / "a.json", "a", 10.0, **known)
    for other in ("never", None):  # what is not recorded may be anything
        files = [one, measured(tmp_path / "b.json", "b", 20.0, **(known | {what: other}))]
        columns = columns_of(read_sources(files).measured)
        assert [list(column.values.values()) for column in columns] == [[10.0], [20.0]]
        assert len({column.label for column in columns}) == 2, "the labels say what differs"
        named = {"window": "of rows", "text_sha256": "b.json has it"}.get(what, "not recorded")  # rows have no window
        assert (named if other is None else "never") in columns[1].label
    files = [one, measured(tmp_path / "b.json", "b", 20.0, **known | {"text": "the same by another name"})]
    (column,) = columns_of(read_sources(files).measured)
    assert list(column.values.values()) == [10.0, 20.0] and column.label == "perplexity on valid.txt, window 64"


def test_a_text_whose_hash_was_not_recorded_compares_with_nothing_else(tmp_path: Path) -> None:
    """Of two runs, and of a run and a result, though the name of the text is the same."""
    found = {"perplexity": 30.0, "loss": 3.4, "window": 64, "windows": 9, "tokens": 567}
    runs = [make_run(tmp_path / name, "pruned", before=found, after=found) for name in ("a", "b")]
    columns = columns_of(read_sources([*runs, measured(tmp_path / "c.json", "pruned", 10.0)]).measured)
    assert len(columns) == 3 and len({column.label for column in columns}) == 3
    assert len(columns[0].values) == 2, "before and after, of one run"


def test_tasks_compare_where_their_documents_examples_and_versions_are_the_same(tmp_path: Path) -> None:
    facts = {"version": 1, "num_fewshot": 0, "items": 100, "split": "test", "documents_sha256": "f" * 64}

    def scored(name: str, value: float, **changed: object) -> Path:
        scores = {"boolq": {"acc": value, "acc_norm": value / 2}, "rte": {"acc": 0.5}}
        tasks = {"boolq": facts | changed, "rte": facts}
        return write(tmp_path / f"{name}.json", {"model": name, "scores": scores, "tasks": tasks, "mean": value})

    same = html_report([scored("a", 0.5), scored("b", 0.75)], verify=False)
    assert same.results()[0].columns == ("model", "stage", "acc boolq", "acc rte", "mean acc of boolq, rte")
    assert same.results()[0].rows[1] == ("b", "not known", "0.7500", "0.5000", "0.7500")
    assert same.results()[1].columns[2:] == ("acc_norm boolq",)
    other = html_report([scored("a", 0.5), scored("b", 0.75, num_fewshot=5)], verify=False).results()[0]
    assert other.columns[2:4] == ("acc boolq, examples 0", "acc rte") and "acc boolq, examples 5" in other.columns
    assert len(other.columns) == 2 + 3 + 2, "rte is in one column, boolq and the mean are in two"


# ---- A whole road.


def test_models_are_side_by_side_and_what_was_not_measured_says_so(road: Path) -> None:
    report = html_report([road / "run", road / "merged", road / "merged.json", road / "dense.json"])
    assert cells(report) == {"dense": "10.0000", "pruned": "100.0000", "tuned": "20.0000", "merged": "20.0000"}
    share = f"{100 * (math.log(100) - math.log(20)) / (math.log(100) - math.log(10)):.1f} %"
    assert cells(report, 3) == {"dense": "–", "pruned": "0.0 %", "tuned": share, "merged": share}
    assert report.notes == []
    alone = html_report([road / "run", road / "merged"], verify=False)
    assert cells(alone)["merged"] == "not measured" and len(alone.results()[0].columns) == 3
    assert any("what was recovered is not known" in note for note in alone.notes)


def test_nothing_is_recovered_of_another_text(road: Path, tmp_path: Path) -> None:
    dense = measured(tmp_path / "dense.json", road / "dense", 10.0, text_sha256="b" * 64)
    report = html_report([road / "run", dense], verify=False, dense=road / "dense")
    assert "recovered" not in report.results()[0].columns and len(report.results()[0].columns) == 4


def test_a_folder_of_stages_is_a_run(road: Path) -> None:
    whole = html_report(road, verify=False, dense=road / "dense")
    assert [stage for stage, _, _ in whole.models()] == ["dense", "pruned", "tuned", "merged"]
    assert cells(whole)["merged"] == "20.0000"


def test_the_road_through_reconstruction_and_mask_updates(road: Path, tmp_path: Path) -> None:
    """A model counts from the pruned one at the beginning of its road, whatever is between."""
    files = [road / "pruned", shutil.copytree(road / "pruned", tmp_path / "reconstructed")]
    files += [shutil.copytree(road / "run", tmp_path / "run"), road / "dense.json"]
    shutil.copytree(road / "pruned", tmp_path / "run" / "base")
    merge_checkpoint(tmp_path / "run" / "base", road / "run" / "adapter", tmp_path / "merged")
    files.append(measured(tmp_path / "reconstructed.json", tmp_path / "reconstructed", 40.0))
    files.append(measured(tmp_path / "m.json", tmp_path / "merged", 20.0))
    report = html_report(files, verify=False, dense=road / "dense")
    assert cells(report) | {"pruned": ""} == {
        "dense": "10.0000",
        "pruned": "",
        "reconstructed": "40.0000",
        "tuned": "20.0000",
        "merged": "20.0000",
    }
    shares = {stage: share for stage, share in cells(report, 3).items() if stage != "pruned"}
    told = [f"{100 * math.log(100 / p) / math.log(10):.1f} %" for p in (40, 20, 20)]
    assert shares == dict(zip(("dense", "reconstructed", "tuned", "merged"), ("–", *told), strict=True))


def test_a_recipe_says_what_taught_and_what_trained_too() -> None:
    """And is silent on both, and on their weights, where there were none."""
    plain = TuneConfig(model="m", data="t", output_dir="o", steps=4).to_dict()
    assert not recipe_of(plain).keys() & {"teacher", "kl_weight", "ce_weight", "temperature", "also_train", "also_lr"}
    taught = {"teacher": "dense", "kl_weight": 0.7, "ce_weight": 0.3, "also_train": ("norms",), "also_lr": 0.002}
    found = recipe_of(TuneConfig(model="m", data="t", output_dir="o", steps=4, **taught).to_dict())
    assert found | {"teacher": "dense", "kl_weight": "0.7", "ce_weight": "0.3"} == found
    assert found | {"also_train": "norms", "also_lr": "0.002", "temperature": "1.0"} == found
    memory = recipe_of({**plain, "kl_weight": 0.7})  # a teacher in memory has no name
    assert memory["kl_weight"] == "0.7" and "teacher" not in memory


def test_a_result_of_tune_names_its_run_and_nothing_is_read_twice(road: Path, tmp_path: Path) -> None:
    tuned = write(tmp_path / "tune.json", {"run_dir": str(road / "run"), "adapter_dir": "a", "steps": 4})
    report = html_report([tuned, road / "run", road / "dense.json", road / "dense.json"], verify=False)
    assert len(report.sources.runs) == 1 and len(report.sources.results) == 1
    write(tuned, {"run_dir": "moved", "adapter_dir": "a"})
    with pytest.raises(DataError, match="is of the run moved, which is not there"):
        html_report([tuned])
    assert html_report([write(tmp_path / "d.json", json.loads((road / "dense.json").read_text())).parent]).notes


def test_zeros_are_verified_now(road: Path, tmp_path: Path) -> None:
    holds = {one.name: one.holds for one in html_report([road / "merged", road / "pruned"]).zeros.values()}
    assert list(holds.values()) == [True, True]
    unread = html_report([road / "merged"], verify=False).zeros.values()
    assert [(one.holds, "not verified" in one.verdict) for one in unread] == [(None, True)]
    bad = shutil.copytree(road / "merged", tmp_path / "bad")
    data = bytearray((bad / "model.safetensors").read_bytes())
    data[-3] ^= 0x55
    (bad / "model.safetensors").write_bytes(data)
    report = html_report([bad], tmp_path / "page.html")
    (found,) = report.zeros.values()
    assert found.holds is False and "fails its certificate in 1 places" in found.verdict
    assert any("fails its certificate" in note for note in report.notes)
    assert "zeros wrong in 1 checkpoint" in (tmp_path / "page.html").read_text()


def test_changes_are_those_of_the_merged_weights(road: Path, tmp_path: Path) -> None:
    report = html_report([road / "run"])
    (found,) = report.changes
    before = prune_nm_(tiny_llama())
    after = load_adapter(prune_nm_(tiny_llama()), road / "run" / "adapter")
    merged = merge(after)
    assert found.merge.layers == merged.layers and found.merge.survived == merged.survived
    for path, (total, count, _) in found.sums.items():
        old, new = (m.get_submodule(path).weight.detach().double() for m in (before, after))
        expected = (new[old != 0] / old[old != 0] - 1).abs().mean()
        assert total / count == pytest.approx(float(expected), rel=1e-9) and expected > 0.01
    other = shutil.copytree(road / "run", tmp_path / "run")
    save_model(prune_nm_(tiny_llama(), 1), tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    values["tune"]["model"] = str(tmp_path / "other")
    write(other / "config.json", values)
    report = html_report([other])
    assert report.changes == [] and "has not the zeros that the adapter was trained on" in report.notes[0]


def test_prompts_are_answered_greedily(road: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the number"}) + "\n" + json.dumps({"prompt": NASTY}) + "\n")
    report = html_report([road / "run"], tmp_path / "p.html", prompts=prompts, max_new_tokens=3, verify=False)
    model, tokenizer = load_adapter(prune_nm_(tiny_llama()), road / "run" / "adapter").eval(), tiny_tokenizer()
    ids = tokenizer("the number", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    by_stage = {report.stage(key): answers for key, answers in report.answers.items()}
    assert by_stage.keys() == {"pruned", "tuned"} and all(len(answers) == 2 for answers in by_stage.values())
    assert by_stage["tuned"][0] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert NASTY in Parsed((tmp_path / "p.html").read_text()).text


# ---- The page.


def test_the_page_is_whole_accessible_and_needs_no_network(road: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    html_report([road / "run", road / "merged", road / "dense.json"], out)
    found = Parsed(out.read_text(encoding="utf-8"))
    names = [tag for tag, _ in found.tags]
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(names)
    for tag, attributes in found.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#"), tag
    assert not re.search(r"@import|url\(|https?:", out.read_text())
    assert ("html", {"lang": "en"}) in found.tags and names.count("h1") == 1
    charts = [a for tag, a in found.tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(charts) == 5 and all(a["role"] == "img" and a["aria-label"] for a in charts), "lines, 3 zeros, changes"
    assert all(a.get("scope") in ("row", "col") for tag, a in found.tags if tag == "th")
    anchors = {a["id"] for _, a in found.tags if "id" in a}
    assert {a["href"].removeprefix("#") for tag, a in found.tags if tag == "a"} == anchors
    assert "prefers-color-scheme: dark" in out.read_text() and "width=device-width" in out.read_text()
    for told in ("verified now", "spp tune", "of the update survived", "training loss from 4.000", "torch 2.8"):
        assert told in found.text + "".join(str(a.get("aria-label")) for a in charts), told
    again = tmp_path / "again.html"
    html_report([road / "run", road / "merged", road / "dense.json"], again)
    assert again.read_bytes() == out.read_bytes()


def test_everything_from_files_is_text(road: Path, tmp_path: Path) -> None:
    layer = {"shape": [4, 8], "pattern": "2:4", "sparsity": 0.5, "sparsity_before": 0.0}
    layer |= {"relative_error": 0.1, "tokens": 9, "seconds": 1.0, "note": NASTY}
    pruning = {"method": NASTY, "pattern": "2:4", "sparsity": 0.5, "windows": 1, "seqlen": 8, "seed": 0, "owl": None}
    pruning |= {"calibration": NASTY, "sparsity_before": 0.0, "keeps_zeros": True, "seconds": 1.0}
    files = [
        write(tmp_path / "prune.json", pruning | {"layers": {f"layers.0.{NASTY}": layer}}),
        measured(tmp_path / "eval.json", NASTY, 10.0, text=NASTY, dtype=NASTY, versions={NASTY: NASTY}),
        make_run(tmp_path / "run", NASTY, before={"perplexity": 20.0, **TEXT}),
    ]
    bad = shutil.copytree(road / "merged", tmp_path / f"m {NASTY}".replace("/", "|"))
    (bad / "model.safetensors").write_bytes(b"")
    html_report([*files, bad], tmp_path / "page.html", dense=NASTY)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = Parsed(page)
    assert "script" not in [tag for tag, _ in found.tags] and "<script" not in page
    assert found.text.count(NASTY) > 10
    assert not any("alert" in name for _, attributes in found.tags for name in attributes)


def test_a_page_replaces_a_page_and_nothing_else(road: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    html_report([road / "dense.json"], out)
    with pytest.raises(OutputExistsError, match="exists already"):
        html_report([road / "dense.json"], out)
    html_report([road / "merged.json"], out, overwrite=True)
    assert "merged" in out.read_text()
    out.write_text("<!doctype html><p>mine")
    with pytest.raises(OutputExistsError, match="is no page of spp report"):
        html_report([road / "dense.json"], out, overwrite=True)
    assert out.read_text().endswith("mine")


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"model": "a", "perplexity": Infinity, "window": 8, "loss": NaN}')
    report = html_report([file], tmp_path / "page.html")
    assert cells(report) == {"not known": "inf"}
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["columns"][0]["values"] == [None] and values["results"][0]["loss"] is None


# ---- Bad input.


def test_a_run_that_was_killed_is_reported_as_far_as_it_came(road: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", road / "pruned", before={"perplexity": 100.0, "loss": 4.6, **TEXT}, after=None)
    report = html_report([run, road / "dense.json"], tmp_path / "page.html")
    assert "unfinished: 3 of 4 steps are in its log, and there is no adapter" in report.notes[0]
    assert cells(report) == {"dense": "10.0000", "pruned": "100.0000", "tuned": "not measured"}
    page = Parsed((tmp_path / "page.html").read_text())
    assert "1 of them unfinished" in page.text and "unfinished: 3 of 4 steps" in page.text
    (run / "log.jsonl").write_text("{}\n[1]\n")
    (run / "eval.json").write_text('{"before": {"perp')
    notes = html_report([run, road / "dense.json"]).notes
    assert "the log cannot be read" in notes[0] and "no loss curve" in notes[0]
    assert "the perplexities cannot be read" in notes[1] and "0 of 4 steps" in notes[2]
    for name in ("log.jsonl", "eval.json"):
        (run / name).unlink()
    assert "0 of 4 steps" in html_report([run]).notes[0]


def _a_run(path: Path) -> None:
    write(path / "config.json", {"format": "spp-tune-9", "tune": {}})


def _results(path: Path) -> None:
    write(path / "results.json", {"format_version": 9, "rows": [], "novel": 1})


def _certificate(path: Path) -> None:
    write(path / "config.json", {"model_type": "llama"})
    write(path / "sparsity.json", {"format_version": 9, "tensors": {}, "totals": {}})


def _adapter(path: Path) -> None:
    write(path / "adapter_config.json", {"peft_type": "SPP"})


def _notes(path: Path) -> None:
    write(path / "notes.json", {"mine": 1})
    (path / "thoughts").mkdir()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "there is no file or directory .*; expected a run directory of spp tune"),
        (lambda path: path.mkdir(), "is no run: it holds nothing; expected a run directory"),
        (_notes, "is no run: it holds notes.json, thoughts; expected a run directory"),
        (_adapter, "it holds an adapter alone; .*; pass its run"),
        (_a_run, "says format spp-tune-9; this spp reads spp-tune-1"),
        (_results, "has format_version 9; this spp reads 1"),
        (_certificate, "has format_version 9; this spp .* reads up to 1"),
    ],
    ids=["missing", "empty", "notes", "adapter", "run", "results", "certificate"],
)
def test_a_directory_that_cannot_be_reported(make: Any, told: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=told):
        html_report([tmp_path / "x"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("not json", "is not valid JSON"),
        ('{"mine": 1}', "is no result of spp: its keys are mine; expected"),
        ("[1]", "holds a JSON list; an object was expected"),
        ('{"model": "a", "perplexity": 1}\n{"model', "line 2 is not valid JSON"),
        ('{"layers": {"a": {}}, "method": 1, "pattern": "2:4", "sparsity": 0, "windows": 0}', "another version of spp"),
        ('{"layers": {"a": 7}, "survived": 1, "kept": 3}', "another version of spp"),
    ],
)
def test_a_file_that_cannot_be_reported(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=told):
        html_report([tmp_path / "x.json"], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def _places(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in values if isinstance(values, dict) else ():
        yield (*before, key)
        yield from _places(values[key], (*before, key))


_OPTIONS = ((), ("model",), ("steps",), ("data",), ("lr",))


@pytest.mark.slow
def test_a_value_of_any_kind_is_shown_or_refused(road: Path, tmp_path: Path) -> None:
    """Files by hand, by another version, or damaged: never an error that is not one of spp."""
    scored = {
        "scores": {"boolq": {"acc": 0.5}},
        "tasks": {"boolq": {"version": 1}},
        "mean": 0.5,
        "versions": {"a": "1"},
    }
    layer = {"shape": [4], "pattern": "2:4", "sparsity": 0.5, "sparsity_before": 0, "relative_error": None, "tokens": 0}
    pruning = {
        "layers": {"0.a": {**layer, "seconds": 1.0}},
        "method": "m",
        "pattern": "2:4",
        "sparsity": 0.5,
        "owl": None,
    }
    pruning |= {"windows": 0, "seqlen": 1, "seed": 0, "calibration": "", "sparsity_before": 0.0, "keeps_zeros": True}
    run = shutil.copytree(road / "run", tmp_path / "run")
    shown = 0
    for file, whole in (
        (tmp_path / "eval.json", {"model": "m", "perplexity": 2.0, "seconds": 1.0, **TEXT, **scored}),
        (tmp_path / "prune.json", pruning | {"seconds": 1.0}),
        (run / "config.json", json.loads((run / "config.json").read_text())),
        (run / "eval.json", json.loads((run / "eval.json").read_text())),
    ):
        options = [place for place in _places(whole) if place[0] == "tune" and place[1:] not in _OPTIONS]
        for place in [place for place in [(), *_places(whole)] if place not in options]:
            for value in ("x", [1], 10**400):
                changed = json.loads(json.dumps(whole))
                inner = changed
                for key in place[:-1]:
                    inner = inner[key]
                inner |= dict.fromkeys(place[-1:], value)
                file.write_text(json.dumps(changed))
                with contextlib.suppress(SPPError):
                    report = html_report(run if file.parent == run else file, verify=False)
                    json.dumps(report.to_dict(), allow_nan=False)
                    shown += html_page(report).startswith("<!doctype html>")
        file.write_text(json.dumps(whole))
    assert shown > 100


def test_results_may_be_lines_of_one_file(tmp_path: Path) -> None:
    lines = [measured(tmp_path / f"{name}.json", name, 10.0).read_text() for name in ("a", "b")]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    assert [row[0] for row in html_report([tmp_path / "all.jsonl"]).results()[0].rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "told"), [("\n \n", "holds no prompt"), ('{"text": "a"}', r'it has the keys \["text"\]'), (None, "read")]
)
def test_prompts_that_cannot_be_read(text: str | None, told: str, road: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    if text is not None:
        prompts.write_text(text)
    with pytest.raises(SPPError, match=told):
        html_report([road / "run"], prompts=prompts)


def test_there_must_be_something_to_report() -> None:
    with pytest.raises(ConfigError, match="there is nothing to report"):
        html_report([])


def test_a_comparison_and_reports_of_commands_have_tables(tmp_path: Path) -> None:
    row = {"contender": "spp", "lr": 0.02, "seed": 1, "steps": 9, "diverged": False, "validation": {"perplexity": 25.5}}
    rows = {"one": row, "two": row | {"contender": NASTY, "diverged": True}}
    write(tmp_path / "c" / "results.json", {"format_version": 1, "conditions": {}, "rows": rows})
    layer = {"kept": 4, "rescued": 0, "survived": 0.75, "max_relative_change": 0.5}
    layer |= {"update_norm": 1.0, "updated": 4, "moved": 3, "of a later version": 1}
    write(tmp_path / "merge.json", {"layers": {"layers.0.up": layer}, "survived": 0.75, "kept": 4})
    html_report([tmp_path / "c", tmp_path / "merge.json"], tmp_path / "page.html")
    text = Parsed((tmp_path / "page.html").read_text()).text
    assert "25.5000" in text and "diverged" in text and NASTY in text and "0.7500" in text


# ---- Charts.


def test_colours_can_be_told_and_read() -> None:
    for dark, page, card in ((False, (255, 255, 255), (0xF5, 0xF7, 0xF9)), (True, (18, 23, 27), (27, 34, 40))):
        assert all(contrast(fill, ink) >= 4.5 for fill, ink in heat_colours(dark))
        for pair in _LINES:
            code = pair[dark].removeprefix("#")
            colour = [int(code[i : i + 2], 16) for i in (0, 2, 4)]
            assert contrast(colour, page) >= 3 and contrast(colour, card) >= 3
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21) and contrast((9, 9, 9), (9, 9, 9)) == 1


@pytest.mark.parametrize(
    ("ends", "found"),
    [((0, 10), [0, 2, 4, 6, 8, 10]), ((0.013, 0.0262), [0.015, 0.02, 0.025]), ((5, 5), [4.6, 4.8, 5, 5.2, 5.4])],
)
def test_ticks_are_round(ends: tuple[float, float], found: list[float]) -> None:
    assert ticks(*ends) == pytest.approx(found)


@pytest.mark.parametrize("ends", [(0, 0), (-3, 7), (1e-9, 2e-9), (1e30, 3e30), (0, 1)])
def test_ticks_are_few_and_inside(ends: tuple[float, float]) -> None:
    found = ticks(*ends)
    assert 3 <= len(found) <= 7 and found == sorted(set(found))


def test_long_curves_are_means_of_neighbours() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    found = averaged(points, 100)
    assert len(found) == 100 and all(y == 0.5 for _, y in found) and found[0][0] == 4.5
    assert averaged([], 5) == [] and averaged(points[:3], 5) == points[:3]
    assert line_chart([], "nothing", "x", "y") == ""


def test_measured_keys_are_those_of_models(tmp_path: Path) -> None:
    (one,) = read_sources([measured(tmp_path / "a.json", "owner/name", 9.0)]).measured
    assert isinstance(one, Measured) and one.model == ("owner/name", None) and one.of == "valid.txt"
