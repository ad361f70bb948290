"""Run as a script: kill -9 a writer at every moment of its work, and look at what is left.

    kills.py FOLDER SCENARIO[,SCENARIO…] [STEP]       SCENARIO: fresh, exchange, aside, file

A fork of this process writes an output and is killed at the k-th event that touches the disk (an audit hook counts
them), for k = 1, 1 + STEP, … until it gets through. After each kill the output must be the old state or the new one, a
rerun must succeed, and nothing may be left beside it. Prints how many kills there were, of each scenario.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from spp.files import atomic, atomic_directory, atomic_file, recognised, recover

COUNTED = ("open", "os.", "shutil.", "ctypes.dlsym")
PARTS = {"tokenizer.model": 3000, "additional_chat_templates/own.jinja": 100, "tokenizer.json": 1}
CONFIG = '{"model_type": "llama"}'  # makes it a folder that is replaced


def write(target: Path, word: str, scenario: str) -> None:
    if scenario == "file":
        with atomic_file(target, overwrite=True, kind=recognised.OWN) as path:
            path.write_text(word * 1000)
        return
    if scenario == "aside":
        atomic._exchange = lambda one, other: False  # as on a system that cannot exchange
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "additional_chat_templates").mkdir()
        (folder / "config.json").write_text(CONFIG)
        for name, length in PARTS.items():
            (folder / name).write_text(word * length)


def state(target: Path, scenario: str) -> str | None:
    if not target.exists():
        return None
    if scenario == "file":
        text = target.read_text()
        assert text == text[:3] * 1000, "half a file"
        return text[:3]
    found = {name: (target / name).read_text() for name in PARTS}
    word = found["tokenizer.json"]
    assert found == {name: word * length for name, length in PARTS.items()}, "half a directory"
    return word


def killed(target: Path, scenario: str, at: int) -> bool:
    """Write in a fork that dies at the `at`-th event; return whether it died."""
    child = os.fork()
    if child == 0:
        left = at

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event.startswith(COUNTED):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write(target, "new", scenario)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the writer failed at event {at}"
    return os.WIFSIGNALED(status)


def main(folder: Path, scenario: str, step: int) -> int:
    """Return how many kills there were."""
    folder.mkdir()
    target = folder / "out"
    at, kills = 1, 0
    while True:
        if scenario != "fresh":
            write(target, "old", scenario)
        died = killed(target, scenario, at)
        if scenario == "aside":
            recover(target)  # the one scenario in which the output can be away for a moment
        allowed = {"new", None} if scenario == "fresh" else {"new", "old"}
        assert (found := state(target, scenario)) in (allowed if died else {"new"}), f"event {at}: {found}"
        write(target, "end", scenario)
        assert state(target, scenario) == "end"
        assert os.listdir(folder) == ["out"], f"event {at}: {os.listdir(folder)}"
        if not died:
            break
        kills += 1
        at += step
        if scenario == "fresh":
            shutil.rmtree(target)
    return kills


if __name__ == "__main__":
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    print(*(main(Path(sys.argv[1], scenario), scenario, steps) for scenario in sys.argv[2].split(",")))
