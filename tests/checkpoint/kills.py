"""Run as a script: kill -9 a merge or a save at many moments of its work, and look at what is left.

    kills.py FOLDER WORK[,WORK…] STEP       WORK: merge, save

As tests/files/kills.py: a fork is killed at the k-th event that touches FOLDER, k = 1, 1 + STEP, … After each kill the
output must be the old checkpoint or the new one, whole by its own certificate, a rerun must succeed, and nothing may be
left beside it. Prints how many kills there were, of each work.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from spp.certificate import Certificate
from spp.checkpoint import merge_checkpoint, save_model, verify
from tests.checkpoint.helpers import make_sources, pruned_model


def killed(folder: Path, at: int, work: object) -> bool:
    child = os.fork()
    if child == 0:
        left = at

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if any(str(folder) in str(a) for a in arguments[:2]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()  # type: ignore[operator]
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the work failed at event {at}"
    return os.WIFSIGNALED(status)


def main(sources: Path, kind: str, step: int) -> int:
    """Return how many kills there were."""
    folder = sources / kind
    folder.mkdir()
    target = folder / "out"
    work = {
        "save": lambda: save_model(pruned_model(), target, overwrite=True),
        "merge": lambda: merge_checkpoint(sources / "base", sources / "adapter", target, overwrite=True),
    }[kind]
    work()
    states = {"old": Certificate.read(sources / "old"), "new": Certificate.read(target)}
    at, kills = 1, 0
    while True:
        shutil.rmtree(target)
        shutil.copytree(sources / "old", target)
        died = killed(folder, at, work)
        verify(target)
        found = Certificate.read(target)
        assert found in (list(states.values()) if died else [states["new"]]), f"event {at}"
        work()
        assert Certificate.read(target) == states["new"]
        assert os.listdir(folder) == ["out"], f"event {at}: {os.listdir(folder)}"
        if not died:
            break
        kills += 1
        at += step
    return kills


if __name__ == "__main__":
    torch.set_num_threads(3)  # of a merge's pipeline; tensors are too small for torch to share them out
    tqdm.set_lock(threading.RLock())  # its own is one of all forks: who is killed with it in hand stops the others
    warnings.simplefilter("ignore")
    made = make_sources(Path(sys.argv[1], "sources"))
    save_model(pruned_model(torch.float16), made / "old")
    print(*(main(made, kind, int(sys.argv[3])) for kind in sys.argv[2].split(",")))
