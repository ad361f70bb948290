"""`--overwrite` of every command: its own output again, and nothing that is not recognised as an output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.helpers.checkpoints import contents

Call = Callable[..., Outcome]
UNUSUAL = {"notes.txt": "of the base", "figures/zeros.svg": "<svg/>", "weird.dat": "\x00", "LICENSE": "free"}
TUNED = ("--steps", 2, "--block-length", 16, "--window", 16, "--eval-windows", 1, "--batch-size", 1)
COMPARED = ("--steps", 1, "--block-length", 16, "--window", 16, "--test-windows", 1, "--validation-windows", 1)
CHEAP = ("--cost-rounds", 0, "--lr", "2e-2", "--device", "cpu", "--contenders", "norms")


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome
    message = outcome.err[outcome.err.index("error: ") :]
    assert all(word in message for word in words), message
    assert "wrote" not in outcome.out


@pytest.fixture
def base(pruned: Path, tmp_path: Path) -> Path:
    """The pruned checkpoint, with files that no library writes."""
    shutil.copytree(pruned, tmp_path / "base")
    put(tmp_path / "base", UNUSUAL)
    return tmp_path / "base"


@pytest.fixture
def command(
    request: pytest.FixtureRequest, spp: Call, base: Path, dense: Path, adapter: Path, text: Path, tmp_path: Path
) -> tuple[object, ...]:
    """The arguments of a command that writes the folder out, without --overwrite."""
    out, name = tmp_path / "out", request.param
    if name == "export --dense":
        assert spp("export", base, tmp_path / "packed", "--packed").code == 0
    if name == "merge PST":
        put(tmp_path / "dense", UNUSUAL)
        shutil.copytree(dense, tmp_path / "dense", dirs_exist_ok=True)
        tune = ("tune", tmp_path / "dense", tmp_path / "pst", "--data", text, "--method", "pst", "--pattern", "2:4")
        assert (made := spp(*tune, *TUNED)).code == 0, made.err
    return {
        "prune": ("prune", base, out, "--method", "magnitude"),
        "prune --in-memory": ("prune", base, out, "--method", "magnitude", "--in-memory"),
        "merge": ("merge", base, adapter, out),
        "merge --dtype": ("merge", base, adapter, out, "--dtype", "bfloat16"),
        "merge PST": ("merge", tmp_path / "dense", tmp_path / "pst/adapter", out),
        "export --packed": ("export", base, out, "--packed"),
        "export --dense": ("export", tmp_path / "packed", out, "--dense"),
    }[name]


FOLDERS = ("prune", "prune --in-memory", "merge", "merge --dtype", "merge PST", "export --packed", "export --dense")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("command", FOLDERS, indirect=True)
def test_a_folder(spp: Call, command: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for files in ({"train.jsonl": "mine"}, {"thesis.txt": "mine"}, {"src/main.py": "mine"}):
        put(out, files)  # public report: --overwrite onto a folder that is no output
        refused(spp(*command, "--overwrite"), *files, "is no checkpoint, adapter, run or comparison")
        assert contents(out) == {name: text.encode() for name, text in files.items()}
        shutil.rmtree(out)
    out.mkdir()  # empty
    assert (first := spp(*command, "--overwrite")).code == 0, first.err
    before = contents(out)
    again = spp(*command, "--overwrite")
    assert again.code == 0 and f"wrote {out}" in again.out, again.err
    assert contents(out) == before
    if "--in-memory" not in command:
        assert {"notes.txt", "figures/zeros.svg", "weird.dat"} <= before.keys()  # carried along from the base
    put(out, {"data/train.jsonl": "mine", "notes.txt": "changed"})
    before = contents(out)
    refused(spp(*command, "--overwrite"), "but also holds notes.txt, data/train.jsonl, which would be lost")
    assert contents(out) == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# public report: --overwrite deletes files of a recognised name that a user wrote
@pytest.mark.parametrize(
    "name", ["README.md", "NOTICE.txt", "LICENSE", "dict.txt", "vocab.txt", "original/README.md", "modeling_x.py"]
)
def test_pages_texts_and_code_that_somebody_wrote_stay(
    spp: Call, base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    config = json.loads((base / "config.json").read_text())
    put(base, {"config.json": json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.M"}})})
    out = tmp_path / "out"
    command = ("merge", base, adapter, out, "--overwrite")
    assert spp(*command).code == 0
    put(out, {name: "mine"})
    before = contents(out)
    refused(spp(*command), f"also holds {name}, which would be lost")
    refused(spp("export", base, out, "--packed", "--overwrite"), name)
    assert contents(out) == before
    put(base, {name: "mine"})  # the same bytes are where the operation copies from
    assert spp(*command).code == 0


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_output_in_its_source_is_no_matter_of_overwriting(
    spp: Call, base: Path, adapter: Path, overwrite: tuple[str, ...]
) -> None:
    before = contents(base)
    for arguments, what in (  # public report: an output that is the base proposes --overwrite
        (("merge", base, adapter, base), f"is the base {base}"),
        (("merge", base, adapter, adapter), f"is the adapter {adapter}"),
        (("merge", base, adapter, base / "figures"), f"lies inside the base {base}"),
        (("prune", base, base, "--method", "magnitude"), f"is the model {base}"),
        (("export", base, base.parent, "--packed"), f"contains the checkpoint {base}"),
    ):
        outcome = spp(*arguments, *overwrite)
        refused(outcome, what, "choose a path outside it")
        assert "--overwrite" not in outcome.err
    assert contents(base) == before


def test_a_dry_run_says_so_too(spp: Call, base: Path, adapter: Path, tmp_path: Path) -> None:
    put(tmp_path / "out", {"train.jsonl": "mine"})
    refused(spp("merge", base, adapter, tmp_path / "out", "--overwrite", "--dry-run"), "out holds train.jsonl and")


def test_one_kind_of_output_takes_the_place_of_another(spp: Call, base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "out")
    for arguments in (
        ("merge", base, adapter, tmp_path / "out"),
        ("export", base, tmp_path / "out", "--packed"),
        ("prune", base, tmp_path / "out", "--method", "magnitude", "--in-memory"),  # which carries nothing along
    ):
        assert (found := spp(*arguments, "--overwrite")).code == 0, found.err


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # the first step of a warm-up learns nothing
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # the rate of a first step is zero
def test_a_run(spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("tune", pruned, run, "--data", text, *TUNED)
    put(run, {"train.jsonl": "mine"})
    refused(spp(*command, "--overwrite"), "is not empty and no earlier run")
    (run / "train.jsonl").unlink()
    for _ in range(2):
        assert (found := spp(*command, "--overwrite")).code == 0, found.err
    put(run, {"adapter/train.jsonl": "mine"})
    before = contents(run)
    refused(spp(*command, "--overwrite"), "adapter is an adapter, but also holds train.jsonl")
    refused(spp("merge", pruned, adapter, run, "--overwrite"), "is a run of spp tune", "adapter/train.jsonl")
    assert contents(run) == before
    (run / "adapter/train.jsonl").unlink()
    assert spp("merge", pruned, adapter, run, "--overwrite").code == 0


@pytest.mark.slow
def test_a_comparison(spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    out, chart = tmp_path / "out", tmp_path / "chart.png"
    command = ("compare", pruned, out, "--data", text, *COMPARED, *CHEAP)
    for name, content in (("results.json", '{"mine": 1}'), ("results.json", "mine"), ("results.md", "# Mine")):
        put(out, {name: content})
        refused(spp(*command, "--overwrite"), f"{name} is no", "not replaced")
        assert (out / name).read_text() == content
        if name == "results.md":
            refused(spp(*command), f"{name} is no")
        (out / name).unlink()
    for _ in range(2):
        assert (found := spp(*command, "--overwrite", "--plot", chart)).code == 0, found.err
    put(tmp_path, {"chart.png": "mine"})
    refused(spp(*command, "--overwrite", "--plot", chart), "chart.png is no chart")
    refused(spp(*command, "--resume", "--plot", chart), "chart.png is no chart")
    put(out, {"notes.txt": "mine"})
    assert spp(*command, "--overwrite").code == 0
    assert (out / "notes.txt").read_text() == "mine"  # it is in nobody's way
    refused(spp("merge", pruned, adapter, out, "--overwrite"), "is a comparison, but also holds notes.txt")
    (out / "notes.txt").unlink()
    assert spp("merge", pruned, adapter, out, "--overwrite").code == 0


def test_a_report(spp: Call, dense: Path, tmp_path: Path) -> None:
    command = ("prune", dense, tmp_path / "out", "--method", "magnitude", "--overwrite", "--report")
    for name, text in (("train.jsonl", '{"text": "mine"}\n{"text": "mine"}\n'), ("config.json", "{}")):
        put(tmp_path, {name: text})
        refused(spp(*command, tmp_path / name), f"{name} is no report of spp prune", "not replaced")
        assert (tmp_path / name).read_text() == text and not (tmp_path / "out").exists()
    for _ in range(2):
        assert spp(*command, tmp_path / "report.json").code == 0
    assert json.loads((tmp_path / "report.json").read_text())["method"] == "magnitude"
    for _ in range(2):
        assert spp(*command, tmp_path / "out/report.json").code == 0  # among the output's own files
    assert (tmp_path / "out/report.json").exists()
    refused(spp(*command, "/dev/null"), "/dev/null is no regular file")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["chart.png", "chart.svg", "chart.pdf"])
def test_a_chart(spp: Call, pruned: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    for _ in range(2):
        assert spp("inspect", pruned, "--plot", tmp_path / name, "--overwrite").code == 0
    put(tmp_path, {name: "\\documentclass{mine}"})
    refused(spp("inspect", pruned, "--plot", tmp_path / name, "--overwrite"), f"{name} is no chart")
    assert (tmp_path / name).read_text() == "\\documentclass{mine}"
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.savefig(tmp_path / name)  # public report: --plot --overwrite replaces any picture
    before = (tmp_path / name).read_bytes()
    refused(spp("inspect", pruned, "--plot", tmp_path / name, "--overwrite"), f"{name} is no chart that spp drew")
    assert (tmp_path / name).read_bytes() == before
    refused(spp("inspect", pruned, "--plot", tmp_path / "thesis.tex", "--overwrite"), "must end in")


def test_a_certificate(spp: Call, base: Path) -> None:
    for _ in range(2):
        assert spp("certify", base, "--overwrite").code == 0
    put(base, {"sparsity.json": '{"layer": 0.5}'})
    refused(spp("certify", base, "--overwrite"), "sparsity.json is no certificate of spp")
    assert (base / "sparsity.json").read_text() == '{"layer": 0.5}'
    put(base, {"sparsity.json": ""})
    assert spp("certify", base, "--overwrite").code == 0


def test_pushing_leaves_the_folder_alone(spp: Call, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    put(tmp_path / "adapter", {"notes.txt": "mine"})
    before = contents(tmp_path / "adapter")
    assert spp("push", tmp_path / "adapter", "owner/name", "--overwrite", "--dry-run").code == 0
    assert contents(tmp_path / "adapter") == before


def test_finished_blocks_go_and_what_is_not_ours_stays(spp: Call, base: Path, tmp_path: Path) -> None:
    waiting = tmp_path / ".out.pruning"
    put(waiting, {"notes.txt": "mine"})
    assert spp("prune", base, tmp_path / "out", "--method", "magnitude").code == 0
    assert contents(waiting) == {"notes.txt": b"mine"}
    put(waiting, {"progress.json": '{"mine": 1}'})
    refused(spp("prune", base, tmp_path / "out", "--method", "magnitude", "--overwrite"), "progress.json is not what")
    assert (waiting / "progress.json").read_text() == '{"mine": 1}'
