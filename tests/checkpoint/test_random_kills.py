"""An export that is killed at a random moment leaves the old state or the new one, and the next one succeeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DAILY, STRESS = 3, 100  # of each work
WORKS = ("export packed", "export dense")


def test_kills(tmp_path: Path) -> None:
    run_kills(tmp_path, DAILY)


@pytest.mark.stress
def test_a_hundred_kills(tmp_path: Path) -> None:
    assert min(run_kills(tmp_path, STRESS)) >= STRESS // 2  # some of the moments lie behind the end of the work


def run_kills(folder: Path, count: int) -> list[int]:
    command = [sys.executable, str(ROOT / "tests/checkpoint/random_kills.py"), str(folder), ",".join(WORKS), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(kills) for kills in done.stdout.split()]
