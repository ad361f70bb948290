"""Several processes at once, at the price of starting one: a fresh process loads what they need, and forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FORK = """
import os, sys, traceback
children = []
for word in sys.argv[2:]:
    children.append(os.fork())
    if not children[-1]:
        try:
            work(sys.argv[1], word)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def side_by_side(code: str, target: Path, *words: str | Path) -> None:
    """Run work(target, word) for each word, each in a process of its own.

    Args:
        code: defines `work`, of two strings.
    """
    command = [sys.executable, "-c", code + _FORK, str(target), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
