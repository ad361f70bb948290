"""spp run: what is finished is skipped, what changed is made again, and a kill changes no number."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from spp.files.leftovers import FolderLock
from spp.training.callbacks import read_log
from spp.training.run_directory import RunDirectory
from tests.cli.conftest import LINES, Outcome
from tests.cli.test_interruption import TerminatedAtStepTwo
from tests.helpers.models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
model: {model}
data: {text}
text: {text}
prune: {{nsamples: 2, seqlen: 16}}
tune: {{recipe: short, steps: 2, batch_size: 2, block_length: 16, window: 16, eval_windows: 2, device: cpu}}
merge:
verify:
eval: {{window: 16, max_windows: 2}}
report:
"""
STEPS = ["prune", "tune", "merge", "verify", "eval/dense-text-16", "eval/pruned-text-16"]
STEPS += ["eval/merged-text-16", "report"]

Program = Callable[..., Outcome]


def made(folder: Path) -> dict[str, Any]:
    """Return what a run must reproduce: adapter and checkpoints as bytes, measurements without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            found[str(path.relative_to(folder))] = path.read_bytes()
    for path in sorted((folder / "eval").iterdir()):
        found[path.name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "model")}
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of every stage on a model of one layer."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(LINES))
    (folder / "my.yaml").write_text(RECIPE.format(model=folder / "model", text=folder / "text.txt"))
    return folder / "my.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spp", "run", str(recipe), "--out", str(folder)])
        from spp.cli.main import main

        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def told(outcome: Outcome) -> dict[str, str]:
    """Return {step: why} of a run with --json, with a + before what was made."""
    assert outcome.code == 0, outcome.err
    (line,) = outcome.out.splitlines()
    return {
        one["step"]: ("+" if one.get("made", one.get("runs")) else "") + one["why"] for one in json.loads(line)["steps"]
    }


def test_a_finished_run_is_skipped_and_a_moved_one_too(spp: Program, recipe: Path, copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    found = spp("run", recipe, "--out", copied)
    assert [f"{name}: skipped, made with the same options" for name in STEPS] == found.out.splitlines()[: len(STEPS)]
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert told(spp("run", recipe, "--out", copied, "--json")) == dict.fromkeys(STEPS, "made with the same options")
    # What only changes how it is shown, and an option that is set to what it is.
    same = ("--set", "tune.save_every=1", "--set", "prune.all=true", "--set", "tune.lr=0.02")
    assert set(told(spp("run", recipe, "--out", copied, *same, "--json", "--dry-run")).values()) == {
        "made with the same options"
    }


def test_a_changed_option_makes_its_stage_and_the_later_ones_again(spp: Program, recipe: Path, copied: Path) -> None:
    found = told(spp("run", recipe, "--out", copied, "--set", "merge.dtype=bfloat16", "--json"))
    assert found["tune"] == "made with the same options" == found["eval/pruned-text-16"]
    assert found["merge"] == "+merge.dtype was None and is 'bfloat16'"
    assert found["verify"] == found["eval/merged-text-16"] == "+merge is made again"
    planned = told(spp("run", recipe, "--out", copied, "--set", "prune.pattern=1:4", "--dry-run", "--json"))
    assert planned["prune"] == "+prune.pattern was '2:4' and is '1:4'" and planned["tune"] == "+prune is made again"
    assert planned["eval/dense-text-16"] == "made with the same options"
    again = spp("run", recipe, "--out", copied, "--overwrite", "--dry-run", "--json")
    assert set(told(again).values()) == {"+made again, as asked"} and again.out.count(" --overwrite") == 4


def test_another_text_under_the_same_name_is_another_input(spp: Program, recipe: Path, copied: Path) -> None:
    text = copied.parent / "text.txt"
    text.write_text("\n".join(LINES[::-1]))
    found = told(spp("run", recipe, "--out", copied, "--text", text, "--dry-run", "--json"))
    assert found["prune"] == "made with the same options"
    assert found["tune"] == f"+eval_text ({text}) is another than then"
    assert found["eval/dense-text-16"] == f"+text ({text}) is another than then"


@pytest.mark.parametrize(
    ("path", "damage", "step", "why"),
    [
        ("merged/model.safetensors", "flip", "merge", "is damaged"),
        ("merged", "remove", "merge", "is missing"),
        ("tuned/adapter/adapter_model.safetensors", "flip", "tune", "has changed since"),
        ("eval/pruned-text-16.json", "remove", "eval/pruned-text-16", "is missing"),
    ],
)
def test_an_output_that_is_not_valid_is_made_again(
    spp: Program, recipe: Path, copied: Path, path: str, damage: str, step: str, why: str
) -> None:
    target = copied / path
    if damage == "flip":
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)
    else:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    found = told(spp("run", recipe, "--out", copied, "--dry-run", "--json"))
    assert found[step].startswith("+") and why in found[step]
    assert all(not found[name].startswith("+") for name in STEPS[: STEPS.index(step)])


def test_what_another_wrote_there_is_never_replaced(spp: Program, recipe: Path, copied: Path) -> None:
    changed = ("run", recipe, "--out", copied, "--set", "merge.dtype=bfloat16")
    (copied / "merged" / "notes.txt").write_text("mine")
    found = spp(*changed)
    assert found.code == 1 and "also holds notes.txt" in found.err
    assert (copied / "merged" / "notes.txt").read_text() == "mine"
    shutil.rmtree(copied / "merged")
    shutil.copytree(copied / "pruned", copied / "merged")  # another's checkpoint, which --overwrite of merge replaces
    found = spp(*changed)
    assert found.code == 1 and f"{copied / 'merged'} exists, and is not what this run wrote there" in found.err
    assert (copied / "merged" / "sparsity.json").read_bytes() == (copied / "pruned" / "sparsity.json").read_bytes()
    shutil.copy(recipe.parent / "model" / "config.json", copied / "tuned" / "config.json")
    found = spp("run", recipe, "--out", copied, "--set", "tune.steps=3")
    assert found.code == 1 and f"{copied / 'tuned'} exists, and is not what this run wrote there" in found.err


def test_a_folder_that_is_no_run_and_one_in_use_are_refused(spp: Program, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for more in ((), ("--overwrite",), ("--dry-run",)):
        found = spp("run", recipe, "--out", tmp_path, *more)
        assert found.code == 1 and "is not empty and no run of a recipe" in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out", "told", "remedy")
    found = spp("run", recipe, "--out", tmp_path / "out")
    lock.release()
    assert found.code == 1 and f"another process is at work in {tmp_path / 'out'}: process {os.getpid()}" in found.err
    (tmp_path / "out" / "run.json").write_text('{"format": "spp-run-2", "steps": {}}')
    found = spp("run", recipe, "--out", tmp_path / "out")
    assert found.code == 1 and "has the format 'spp-run-2'" in found.err and "another --out" in found.err


def test_errors_name_the_line_and_nothing_is_written(spp: Program, recipe: Path, tmp_path: Path) -> None:
    found = spp("run", recipe, "--out", tmp_path / "out", "--set", "tune.eval_windows=0")
    assert found.code == 1 and "--set tune.eval_windows: tune: eval_windows is 0" in found.err
    found = spp("run", recipe, recipe.parent / "gone", "--out", tmp_path / "out")
    assert found.code == 1 and "there is no model directory" in found.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pst", "mask updates", "pruned"])
def test_every_road_comes_to_its_end_and_is_skipped_then(
    spp: Program, recipe: Path, finished: Path, tmp_path: Path, kind: str
) -> None:
    sets = {
        "pst": ("prune=false", "tune.method=pst", "tune.pattern=2:4", "tune.lr=0.01"),
        "mask updates": ("tune.mask_update_every=1", "tune.block_length=32", "eval.models=[pruned, tuned, merged]"),
        "pruned": ("prune=false", f"model={finished / 'pruned'}", "tune.steps=3"),
    }[kind]
    sets += ("tune.recipe=default",) if kind == "pst" else ()
    words = ["run", recipe, "--out", tmp_path / "out", "--json", *(word for one in sets for word in ("--set", one))]
    assert all(why == "+not made yet" for why in told(spp(*words)).values())
    assert set(told(spp(*words)).values()) == {"made with the same options"}


@pytest.mark.slow
def test_the_demo_takes_any_model_and_its_texts_are_made_once(
    spp: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pydoc_data.topics.topics", dict(sorted(topics.items())[:30]))
    tiny_llama(max_position_embeddings=1024, num_hidden_layers=1).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    words = (
        "run",
        "demo",
        "model",
        "--set",
        "tune.steps=2",
        "--set",
        "prune.nsamples=1",
        "--set",
        "eval.max_windows=1",
    )
    found = told(spp(*words, "--json"))
    assert found["texts"] == "+not made yet" and list(found)[-2:] == ["eval/merged-held-out-512", "report"]
    assert (tmp_path / "demo-run/held-out.txt").read_text() not in (tmp_path / "demo-run/train.txt").read_text()
    monkeypatch.setattr("pydoc_data.topics.topics", {"another": "Python's"})
    assert set(told(spp(*words, "--json")).values()) == {"made with the same options"}
    (tmp_path / "demo-run/train.txt").write_text("mine")
    refused = spp(*words, "--overwrite")
    assert refused.code == 1 and "train.txt exists, and is not what this run wrote there" in refused.err


@pytest.mark.slow
def test_the_commands_of_a_dry_run_make_the_same_bytes(
    spp: Program, recipe: Path, finished: Path, tmp_path: Path
) -> None:
    found = spp("run", recipe, "--out", tmp_path / "by hand", "--dry-run")
    assert not (tmp_path / "by hand").exists()
    for line in found.out.splitlines():
        if line.startswith("#"):
            continue
        words = shlex.split(line)
        if words[0] == "mkdir":
            (tmp_path / "by hand" / "eval").mkdir(exist_ok=True)
            words, target = words[words.index("&&") + 1 : -2], Path(words[-1])
            target.write_text(spp(*words[1:]).out)
        else:
            assert words[0] == "spp"
            assert spp(*words[1:]).code == 0, line
    assert made(tmp_path / "by hand") == made(finished)


# Starts runs as children of a process that has imported what they need, and kills some of them; prints how each ended.
# It learns what that is by a run without training, since a process whose autograd ran may not fork where GPUs are.
_KILLER = """
import os, random, shutil, signal, sys, time
import spp.cli.main, spp.merging, spp.training

def run(out, *more):
    sys.argv = ["spp", "run", *words, *more, "--out", out]
    try:
        spp.cli.main.main()
    except SystemExit as stop:
        assert not stop.code

words = sys.argv[1:]
run("warm", "--set", "tune=false", "--set", "merge=false")

def start(out):
    child = os.fork()
    if not child:
        run(out)
        os._exit(0)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

draw = random.Random(21)
began = time.perf_counter()
ends, took = [end(start("undisturbed"))], time.perf_counter() - began
while ends.count(-signal.SIGKILL) < 2:
    child = start("killed")
    time.sleep(draw.uniform(0.05, 0.6) * took)
    os.kill(child, signal.SIGKILL)
    ends.append(end(child))
    if ends[-1] == 0:  # it was finished: from the beginning
        shutil.rmtree("killed")
        ends = ends[:1]
ends.append(end(start("killed")))
print("ends", *ends)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_in_the_same_numbers(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of a run of more steps, each with its own checkpoint."""
    words = [str(recipe), "--set", "tune.save_every=1", "--set", "tune.steps=8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _KILLER, *words]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert "ends 0 -9 -9 0" in run.stdout, run.stderr
    assert made(tmp_path / "killed") == made(tmp_path / "undisturbed")


@pytest.mark.slow
def test_an_interruption_says_how_to_go_on(
    spp: Program, recipe: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", recipe, "--out", tmp_path / "out", "--set", "tune.steps=4", "--set", "prune=false")
    words += ("--set", f"model={finished / 'pruned'}")
    with monkeypatch.context() as patch:
        patch.setattr("spp.training.tuning.ProgressBar", TerminatedAtStepTwo)
        stopped = spp(*words)
    assert stopped.code == 130 and "run the same again with the same command to continue" in stopped.err
    assert "goes on with tune" in stopped.err and "resume" not in stopped.err
    assert spp(*words).code == 0
    assert [entry["step"] for entry in read_log(tmp_path / "out/tuned/log.jsonl")] == [1, 2, 3, 4]


class Killed(BaseException):
    """Ends a run as a kill does: nobody catches it."""


@pytest.mark.parametrize("moment", ["begin", "adapter", "finish"])
def test_tuning_goes_on_from_its_checkpoint_wherever_it_was_killed(
    spp: Program, recipe: Path, finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Also while it replaces an earlier run, and between its end and the record of it."""
    from spp.recipes.running import RunFolder
    from spp.training import tuning

    place = {"begin": (RunDirectory, "begin"), "adapter": (tuning, "_Measure"), "finish": (RunFolder, "finish")}[moment]
    words = ("run", recipe, "--out", copied, "--json", "--set", "tune.lr=0.01")

    def kill(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*place, kill)
        with pytest.raises(Killed):
            spp(*words)
    record = json.loads((copied / "run.json").read_text())["steps"]["tune"]
    assert record["state"] == "begun" and record["options"]["lr"] == 0.01
    # The old run is still there, or the new one: never the old adapter with the new options.
    planned = json.loads(spp(*words, "--dry-run").out)["steps"][1]
    assert ("--resume" in planned["command"]) == (moment == "finish")
    assert ("--overwrite" in planned["command"]) == (moment != "finish")
    monkeypatch.undo()
