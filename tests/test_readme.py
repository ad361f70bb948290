"""The README's example runs as it stands, its commands exist, and it stays short."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spp.cli.main import app
from tests.helpers.models import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(max_position_embeddings=2048, num_hidden_layers=1).save_pretrained("MODEL")
    tiny_tokenizer().save_pretrained("MODEL")
    Path("calibration.txt").write_text("".join(f"Sentence number {i} of the calibration text.\n" for i in range(7000)))
    rows = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(40)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "merged" / "sparsity.json").exists()


def test_its_commands_exist() -> None:
    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    named = set(re.findall(r"^    spp (\w+)", README, re.M))
    assert named and named <= known
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    benchmarks = set(re.findall(r"\bbenchmarks\.(\w+)", README))
    assert benchmarks and all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in benchmarks)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200
