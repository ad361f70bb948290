"""examples/quickstart.py, what `make demo` runs, on a tiny model."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.helpers.models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_runs_twice_into_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    tiny_llama(max_position_embeddings=1024, num_hidden_layers=1).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    options = ["--model", str(model), "--out", str(tmp_path / "out"), "--steps", "2"]
    run = subprocess.run(
        [sys.executable, "examples/quickstart.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    # Once more in this process, whose imports are done already, on a part of the text.
    monkeypatch.setattr("pydoc_data.topics.topics", dict(sorted(topics.items())[:30]))
    script = str(ROOT / "examples/quickstart.py")
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    capsys.readouterr()
    runpy.run_path(script, run_name="__main__")
    for printed in (run.stdout, capsys.readouterr().out):
        check(printed)
    assert (tmp_path / "out" / "merged" / "sparsity.json").exists()


def check(printed: str) -> None:
    cells = {line[: line.find("  ")]: line.split("  ")[-1].strip() for line in printed.splitlines() if "  " in line}
    assert cells["sparsity"] == "0.5000 (2:4)" and cells["mask"].startswith("verified")
    assert cells["perplexity, tuned 2 steps"] == cells["perplexity, merged and reloaded"]
