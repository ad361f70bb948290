"""examples/quickstart.py, what `make demo` runs, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_runs_twice_into_the_same_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_llama(max_position_embeddings=1024, num_hidden_layers=1).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    options = ["--model", str(model), "--out", str(tmp_path / "out"), "--steps", "2"]
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "examples/quickstart.py", *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stderr
    cells = {line[: line.find("  ")]: line.split("  ")[-1].strip() for line in run.stdout.splitlines() if "  " in line}
    assert cells["sparsity"] == "0.5000 (2:4)" and cells["mask"].startswith("verified")
    assert cells["perplexity, tuned 2 steps"] == cells["perplexity, merged and reloaded"]
    assert (tmp_path / "out" / "merged" / "sparsity.json").exists()
