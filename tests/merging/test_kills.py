"""Whatever writes a checkpoint and is killed leaves the old state or the new, and can go again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKS = ("merge", "save", "export packed", "export dense")
OTHERS = ("convert", "adapter", "prune")


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    for at_random, at_events in run_kills(tmp_path, WORKS, count=5, step=16):
        assert at_random == 5 and at_events >= 2


@pytest.mark.stress
@pytest.mark.parametrize("work", WORKS + OTHERS)
def test_a_hundred_kills(tmp_path: Path, work: str) -> None:
    ((at_random, at_events),) = run_kills(tmp_path, (work,), count=100, step=1)
    assert at_random == 100 and at_events >= 20


def run_kills(folder: Path, works: tuple[str, ...], count: int, step: int) -> list[list[int]]:
    """Return for each work how often it was killed at random moments, and at every `step`-th event."""
    script = str(ROOT / "tests/merging/kills.py")
    command = [sys.executable, script, str(folder), ",".join(works), str(count), str(step)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [[int(kills) for kills in line.split()] for line in done.stdout.splitlines()]
