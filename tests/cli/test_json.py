"""With --json every command answers by one object on one line, the last that is printed, whatever becomes of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from spp.cli import console
from spp.cli.main import COMMANDS
from spp.comparing.results import Results
from spp.configs.checks import with_non_finite
from spp.errors import CheckpointError
from spp.files import CheckpointReader, save_tensors
from tests.cli.conftest import PYTHON, Outcome
from tests.cli.test_compare import QUICK
from tests.integrations.fake_hub import FakeHub

Call = Callable[..., Outcome]
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--steps", 1, "--block-length", 16, "--batch-size", 1, "--window", 32, "--device", "cpu")
FEW = ("--nsamples", 2, "--seqlen", 32, "--epochs", 1, "--device", "cpu")


def constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def answer(found: Outcome, code: int = 0) -> dict[str, Any]:
    """The object that a command answers, which is all that it prints on standard output."""
    assert found.code == code, found.err
    assert found.out.endswith("\n") and found.out.count("\n") == 1, f"not one line: {found.out!r}"
    assert found.out.isascii()
    values = json.loads(found.out, parse_constant=constant)
    assert isinstance(values, dict) and isinstance(values["wrote"], list)
    assert ("error" in values) == (code != 0)
    assert not PYTHON.search(values.get("error", "")), f"Python's spelling on the command line: {values}"
    return values


@pytest.mark.parametrize(
    "out", ["", "\n", '{"wrote": []}', '{"wrote": []}\nwrote x\n', 'x\n{"wrote": []}\n', "[]\n", '{"wrote": [NaN]}\n']
)
def test_the_check_can_fail(out: str) -> None:
    answer(Outcome(0, '{"wrote": []}\n', ""))
    with pytest.raises((AssertionError, ValueError)):
        answer(Outcome(0, out, ""))


RUNS: list[tuple[tuple[object, ...], list[str], set[str]]] = [
    (
        ("prune", "{dense}", "{out}", "--method", "magnitude", "--report", "{out}.json"),
        ["{out}", "{out}.json"],
        {"method", "pattern", "layers", "sparsity", "versions", "device", "threads", "seconds"},
    ),
    (
        ("tune", "{pruned}", "{out}", "--data", "{text}", "--eval-windows", 1, "--r", 2, *SMALL),
        ["{out}", "{out}/adapter"],
        {"perplexity_before", "perplexity_after", "run_dir", "adapter_dir", "data", "steps", "dtype", "versions"},
    ),
    (
        ("merge", "{pruned}", "{adapter}", "{out}"),
        ["{out}"],
        {"layers", "survived", "kept", "sparsity_report", "base_values", "dry_run"},
    ),
    (("merge", "{pruned}", "{adapter}", "{out}", "--dry-run"), [], {"layers", "survived", "dry_run"}),
    (
        ("reconstruct", "{pruned}", "{out}", "--dense", "{dense}", "--calibration", "{text}", *FEW),
        ["{out}"],
        {"blocks", "windows", "held_out", "seqlen", "options", "seconds", "versions", "device"},
    ),
    (
        ("teacher-cache", "{dense}", "{out}", "--data", "{text}", "--block-length", 16, "--top-k", 4),
        ["{out}"],
        {"rows", "tokens", "top_k", "rest", "bytes", "data", "versions", "device", "dtype"},
    ),
    (("verify", "{pruned}", "{pruned}"), [], {"ok", "name", "against", "problems", "tensors", "certificate"}),
    (("inspect", "{pruned}"), [], {"kind", "sparsity", "pattern", "tensors"}),
    (("inspect", "{adapter}"), [], {"kind", "method", "config", "base", "parameters", "bytes", "tensors"}),
    (("certify", "{copy}", "--deep"), ["{copy}/sparsity.json"], {"sparsity", "pattern", "tensors"}),
    (
        ("eval", "{pruned}", "--text", "{text}", "--window", 64, "--max-windows", 2, "--device", "cpu"),
        [],
        {"perplexity", "tokens", "windows", "window", "text_sha256", "model_fingerprint", "dtype", "seconds"},
    ),
    (
        ("export", "{pruned}", "{out}", "--packed"),
        ["{out}"],
        {"tensors", "dense_bytes", "packed_bytes", "ratio"},
    ),
    (("convert", "{compressed}", "{out}"), ["{out}"], {"sparsity", "pattern", "tensors"}),
    (("push", "{adapter}", "owner/name", "--dry-run"), [], {"repo_id", "url", "files", "card", "dry_run"}),
    (
        ("push", "{adapter}", "owner/name"),
        ["https://hub/owner/name/commit/1"],
        {"repo_id", "url", "files", "card", "dry_run"},
    ),
    (("compare", "--list"), [], {"contenders", "groups"}),
    (
        ("plan", "{dense}", "--memory", "1GB"),
        [],
        {"parameters", "adapter", "lora", "full", "largest_batch", "notes", "command"},
    ),
]


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
@pytest.mark.parametrize(("arguments", "wrote", "keys"), RUNS, ids=lambda x: x[0] if isinstance(x, tuple) else "")
def test_one_object_on_one_line(
    arguments: tuple[object, ...],
    wrote: list[str],
    keys: set[str],
    spp: Call,
    dense: Path,
    pruned: Path,
    adapter: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub())
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in pruned.iterdir():
        os.link(file, copy / file.name)
    places = {"dense": dense, "pruned": pruned, "adapter": adapter, "text": text, "copy": copy, "out": tmp_path / "out"}
    places["compressed"] = ROOT / "tests/fixtures/compressed-tensors-0.9.4/sparse-bitmask"
    found = answer(spp(*(str(part).format(**places) for part in arguments), "--json"))
    assert keys <= found.keys(), keys - found.keys()
    assert found["wrote"] == [path.format(**places) for path in wrote]
    assert all(path.startswith("https:") or Path(path).exists() for path in found["wrote"])
    assert found.get("ok", True) is True
    assert found.get("dry_run", False) == ("--dry-run" in arguments)


def test_every_command_is_run_above() -> None:
    elsewhere = {"report", "run"}  # test_report.py, test_run.py: they need finished runs
    assert {run[0][0] for run in RUNS} == set(COMMANDS) - elsewhere


@pytest.mark.slow
def test_compare(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = answer(spp("compare", pruned, out, "--data", text, *QUICK, "--contenders", "norms", "--json"))
    assert found["wrote"] == [str(out / "results.json"), str(out / "results.md")]
    assert found["rows"] and json.loads((out / "results.json").read_text())["rows"] == found["rows"]
    assert {"conditions", "baselines", "costs", "verdict", "notes"} <= found.keys()


def test_verify_tells_what_is_wrong(spp: Call, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    answer(spp("merge", pruned, adapter, merged, "--json"))
    found = answer(spp("verify", pruned, merged, "--json"))
    assert found["ok"] is True and found["problems"] == [] and found["certificate"]["ok"] is True
    assert found["pattern"] == "2:4" and found["sparsity"] == 0.5 and found["certificate"]["against"] is None
    with CheckpointReader(merged) as reader:
        tensors = {key: reader.load(key) for key in reader}
    key = "model.layers.1.mlp.up_proj.weight"
    tensors["model.norm.weight"][0] = 7.0
    save_tensors(merged / "model.safetensors", tensors)
    found = answer(spp("verify", pruned, merged, "--json"), code=1)  # the zeros are there, a value is another
    assert found["ok"] is False and found["problems"] == [] and found["certificate"]["ok"] is False
    assert [one["key"] for one in found["certificate"]["problems"]] == ["model.norm.weight"]
    assert found["type"] == "CheckpointError" and "fails its certificate" in found["error"]
    tensors[key][0, :4] = 1.0
    save_tensors(merged / "model.safetensors", tensors)
    found = answer(spp("verify", merged, "--json"), code=1)
    assert found["ok"] is False and found["type"] == "MaskError" and found["pattern"] == "mixed"
    assert {one["key"] for one in found["problems"]} == {key, "model.norm.weight"}
    assert found["tensors"][key]["pattern"] == "unstructured" and found["tensors"]["model.norm.weight"] is None


def test_errors_name_options(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    failed = spp("prune", pruned, out, "--method", "magnitude", "--json")
    found = answer(failed, code=1)
    assert found["type"] == "OutputExistsError" and found["error"] == f"{out} exists; {found['remedy']}"
    assert found["remedy"].endswith("with --overwrite") and failed.err.endswith(f"error: {found['error']}\n")
    found = answer(spp("eval", pruned, "--text", text, "--window", 1, "--json"), code=1)
    assert found["option"] == "--window" and "--window is 1" in found["error"] and "remedy" not in found
    found = answer(spp("push", pruned, "name", "--json"), code=1)
    assert found["option"] == "REPO"


@pytest.mark.parametrize(
    ("arguments", "kind", "option"),
    [
        (("prune", "model", "--json"), "MissingParameter", "OUTPUT"),
        (("tune", "model", "out", "--json", "--steps", "x"), "BadParameter", "--steps"),
        (("inspect", "--json", "model", "--no-such"), "NoSuchOption", "--no-such"),
    ],
)
def test_a_mistake_in_what_is_typed(spp: Call, arguments: tuple[str, ...], kind: str, option: str) -> None:
    failed = spp(*arguments)
    found = answer(failed, code=2)
    assert found["type"] == kind and found["option"] == option and "Usage" in failed.err
    assert spp(*(part for part in arguments if part != "--json")).out == ""


def test_what_stops_a_command(spp: Call, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(error: BaseException) -> None:
        def raising(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("spp.certifying.verify.sparsity", raising)

    stop(KeyboardInterrupt())
    assert answer(spp("inspect", pruned, "--json"), code=130)["error"] == "interrupted"
    stop(FileNotFoundError(2, "No such file", "x\udc80"))
    assert answer(spp("inspect", pruned, "--json"), code=1)["error"] == "x\udc80: No such file"
    stop(RuntimeError("a fault"))
    failed = spp("inspect", pruned, "--json")
    assert answer(failed, code=1) == {"error": "a fault", "type": "RuntimeError", "wrote": []}
    assert "Traceback" in failed.err and failed.err.endswith("RuntimeError: a fault\n")
    with pytest.raises(RuntimeError, match="a fault"):  # and without --json as ever
        spp("inspect", pruned)
    failed = spp("--debug", "inspect", tmp_path / "none", "--json")
    assert "Traceback" in failed.err and answer(failed, code=1)["type"] == "CheckpointError"


def test_what_was_written_before_an_error_is_told(
    spp: Call, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device", "report")

    monkeypatch.setattr("spp.files.write_json", failing)
    out = tmp_path / "out"
    command = ("prune", pruned, out, "--method", "magnitude", "--report", tmp_path / "report", "--json")
    found = answer(spp(*command), code=1)
    assert found["wrote"] == [str(out)] and found["layers"] and "disk is full" in found["error"]


def test_what_libraries_print_is_no_answer(spp: Call, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spp.certifying import verify

    count = verify.sparsity

    def noisy(directory: Path) -> object:
        print("a library prints")
        return count(directory)

    monkeypatch.setattr(verify, "sparsity", noisy)
    found = spp("inspect", pruned, "--json")
    assert answer(found)["kind"] == "model" and "a library prints" in found.err
    assert "a library prints" in spp("inspect", pruned).out


def test_of_several_processes_one_answers(spp: Call, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert spp("inspect", pruned, "--json").out == ""
    monkeypatch.setenv("RANK", "0")
    answer(spp("inspect", pruned, "--json"))


def test_help_stays_help(spp: Call) -> None:
    assert spp("inspect", "--json", "--help").out == spp("inspect", "--help").out != ""
    assert "one JSON object on one line" in " ".join(spp("--help").out.split())


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    values = {"a": math.inf, "b/c": {"d~": [1.5, -math.inf]}, "e": [math.nan, None, True, 2], "f": "x\udc80ü\n"}
    line = console.json_line(values)
    found = json.loads(line, parse_constant=constant)
    assert line.isascii() and "\n" not in line
    assert found["non_finite"] == {"/a": "Infinity", "/b~1c/d~0/1": "-Infinity", "/e/0": "NaN"}
    assert found["b/c"] == {"d~": [1.5, None]} and found["e"] == [None, None, True, 2] and found["f"] == values["f"]
    assert "non_finite" not in console.json_line({"a": 1.0, "path": tmp_path})
    assert repr(with_non_finite(found)) == repr(values)
    for wrong in ("/b", "/a/b", "a", "", "/e/9", "/e/x"):
        with pytest.raises(ValueError, match="where no null is"):
            with_non_finite({"a": 1.0, "e": [None], "non_finite": {wrong: "NaN"}})
    assert with_non_finite({"non_finite": 3}) == {"non_finite": 3}  # another's


def test_files_of_results_are_json_too(tmp_path: Path) -> None:
    results = Results(tmp_path, {"seed": 0})
    measured = {"loss": 800.0, "perplexity": math.inf}
    results.add("baselines", "pruned", {"pattern": "2:4", "validation": measured, "test": measured})
    stored = json.loads(results.path.read_text(), parse_constant=constant)
    assert stored["baselines"]["pruned"]["test"]["perplexity"] is None and len(stored["non_finite"]) == 2
    assert results.read()["baselines"]["pruned"]["test"] == measured and "non_finite" not in results.read()
    again = Results(tmp_path, {"seed": 0}, resume=True)
    assert again.read() == results.read()
    results.path.write_text(json.dumps({**stored, "non_finite": {"/baselines/x": "NaN"}}))
    with pytest.raises(CheckpointError, match="'/baselines/x', where no null is"):
        again.read()


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_names_that_are_no_text(spp: Call, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "漢\n\udc80"
    assert answer(spp("export", pruned, out, "--packed", "--json"))["wrote"] == [str(out)] and out.is_dir()
    assert str(out) in answer(spp("export", pruned, out, "--packed", "--json"), code=1)["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "code"), [("--all", 0), ("--no-such", 2)])
def test_nothing_follows_when_python_ends(pruned: Path, option: str, code: int) -> None:
    noise = (
        "import atexit, sys, warnings\nfrom tqdm import tqdm\nfrom spp.cli.main import main\n"
        "class Late:\n    def __del__(self): print('late', file=sys.__stderr__)\n"
        "atexit.register(lambda: [print('at exit'), warnings.warn('at exit')])\n"
        "late, bar = Late(), tqdm(total=9)\nbar.update()\nmain()"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", noise, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    found = run("inspect", str(pruned), option, "--json")
    assert found.returncode == code and found.stdout.endswith("}\n"), found.stdout
    assert ("error" in json.loads(found.stdout.splitlines()[-1])) == bool(code)
    assert "at exit" not in found.stdout and "late" not in found.stdout
    assert "at exit" in (heard := run("inspect", "--no-such").stdout) and "late" in heard  # it is heard otherwise
