"""Several at once: processes at the price of starting one, which loads what they need and forks; and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
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


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run work(0), work(1), …, each in a thread of its own; none may fail."""
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
