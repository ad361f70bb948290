"""Whatever writes a checkpoint and is killed at a random moment leaves the old state or the new, and can go again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DAILY, STRESS = 5, 100  # of each work
WORKS = ("merge", "save", "export packed", "export dense")
OTHERS = ("convert", "adapter", "prune")


def test_kills(tmp_path: Path) -> None:
    run_kills(tmp_path, WORKS, DAILY)


@pytest.mark.stress
@pytest.mark.parametrize("work", WORKS + OTHERS)
def test_a_hundred_kills(tmp_path: Path, work: str) -> None:
    run_kills(tmp_path, (work,), STRESS)


def run_kills(folder: Path, works: tuple[str, ...], count: int) -> None:
    command = [sys.executable, str(ROOT / "tests/checkpoint/random_kills.py"), str(folder), ",".join(works), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    attempts = [int(number) for number in done.stdout.split()]
    assert len(attempts) == len(works) and min(attempts) >= count
