"""Run as a script: kill -9 a piece of work at random moments and at many events, and look at what is left.

    kills.py FOLDER WORK[,WORK…] COUNT [STEP]       WORK: a name in WORKS

A fork of this process does the work over an old output and is killed: COUNT times while it is alive, after a random
part of the time that the work takes, so that slow phases (fsync, hashing, a rename) are met as often as they last; and
with STEP at the k-th event that touches the folder of the output, k = 1, 1 + STEP, … until it gets through. After each
kill the output is the old state or the new one, whole by its own check; what lies beside it is hidden and marked as a
temporary; a rerun succeeds and leaves the new state and nothing else. Prints for each work how often it was killed.

Another kind of work joins by an entry in WORKS.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import spp
from spp.wrapping.adapter_files import read_adapter
from tests.helpers.checkpoints import contents, make_sources, pruned_model, wrapped_model

MARKS = (
    ".out.spp-",
    ".out.pruning",
)  # how what may lie beside the output `out` begins: temporaries, a pruning to go on
MOST = 5  # attempts a kill: some come when the work is done


@dataclass(frozen=True)
class Work:
    """Something that replaces the directory `out`.

    Args:
        run: does it, given the folder of sources and the output.
        check: raises unless the output is whole.
        old: makes an older output of the same kind, which must differ in bytes from what `run` makes.
    """

    run: Callable[[Path, Path], object]
    check: Callable[[Path], object]
    old: Callable[[Path, Path], object]


def _save_old(sources: Path, out: Path) -> None:
    spp.save_model(pruned_model(torch.float16), out, overwrite=True)


def _read(out: Path) -> None:
    read_adapter(out).layers()


WORKS: dict[str, Work] = {
    "merge": Work(
        run=lambda sources, out: spp.merge_checkpoint(sources / "base", sources / "adapter", out, overwrite=True),
        check=spp.verify,
        old=_save_old,
    ),
    "save": Work(
        run=lambda sources, out: spp.save_model(pruned_model(), out, overwrite=True),
        check=spp.verify,
        old=_save_old,
    ),
    "adapter": Work(
        run=lambda sources, out: spp.save_adapter(wrapped_model(), out, overwrite=True),
        check=_read,
        old=lambda sources, out: spp.save_adapter(wrapped_model(scale=0.1), out, overwrite=True),
    ),
    "export packed": Work(
        run=lambda sources, out: spp.export_packed(sources / "base", out, overwrite=True),
        check=spp.verify,
        old=_save_old,
    ),
    "export dense": Work(
        run=lambda sources, out: spp.export_dense(sources / "packed", out, overwrite=True),
        check=spp.verify,
        old=_save_old,
    ),
    "convert": Work(
        run=lambda sources, out: spp.convert_checkpoint(sources / "base", sources / "state", out, overwrite=True),
        check=spp.verify,
        old=_save_old,
    ),
    "prune": Work(
        run=lambda sources, out: spp.prune_checkpoint(sources / "base", out, "magnitude", "1:4", overwrite=True),
        check=spp.verify,
        old=_save_old,
    ),
}


def killed(work: Callable[[], object], begun: Callable[[], None], wait: float | None = None) -> bool:
    """Do the work in a fork that is killed after `wait` seconds, or kills itself; return whether it was still at work.

    Args:
        begun: called in the fork first.
    """
    ready, begin = os.pipe()
    child = os.fork()
    if child == 0:
        begun()
        os.write(begin, b"1")
        work()
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(begin)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the work failed by itself: status {status}"
    return os.WIFSIGNALED(status)


def kill_at(event: int, folder: Path) -> None:
    """Have this process kill itself at its n-th event that touches a folder."""
    left = event

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if any(str(folder) in str(argument) for argument in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class Killing:
    """One work, the states that may be found of it, and what is looked at after a kill."""

    def __init__(self, sources: Path, outputs: Path, name: str) -> None:
        self.work, self.sources, self.outputs = WORKS[name], sources, outputs
        outputs.mkdir()
        self.out, self.before = outputs / "out", sources / f"old {name}"
        self.work.old(sources, outputs / "old")
        shutil.move(outputs / "old", self.before)
        self.do()
        self.duration = self.do()
        self.states = contents(self.before), contents(self.out)
        assert self.states[0] != self.states[1], "the old and the new state must differ"

    def do(self) -> float:
        """Return how long it took."""
        started = time.perf_counter()
        self.work.run(self.sources, self.out)
        return time.perf_counter() - started

    def at_random(self, count: int) -> int:
        """Kill the work `count` times while it is alive."""
        draw, kills = random.Random(0), 0
        for attempt in range(MOST * count):
            if kills == count:
                break
            wait = draw.uniform(0, self.duration)
            kills += self.attempt(f"attempt {attempt}", lambda: None, wait)
        assert kills == count, f"only {kills} kills met the work alive"
        return kills

    def at_events(self, step: int) -> int:
        """Kill the work at every `step`-th event."""
        for kills in itertools.count():
            event = 1 + kills * step
            if not self.attempt(f"event {event}", partial(kill_at, event, self.outputs)):
                break
        return kills

    def attempt(self, where: str, begun: Callable[[], None], wait: float | None = None) -> bool:
        """Do the work over the old state, killed or not; return whether it was."""
        old, new = self.states
        shutil.rmtree(self.out)
        shutil.copytree(self.before, self.out)
        died = killed(self.do, begun, wait)
        found = contents(self.out)
        assert found == new or (died and found == old), f"{where}: {sorted(found)} are of neither state"
        self.work.check(self.out)
        strays = [stray for stray in os.listdir(self.outputs) if stray != "out"]
        assert all(stray.startswith(MARKS) for stray in strays), f"{where}: {strays}"
        self.duration = self.do()  # as busy as the machine is now
        assert contents(self.out) == new, f"{where}: the rerun left something else"
        assert os.listdir(self.outputs) == ["out"], f"{where}: {os.listdir(self.outputs)}"
        return died


if __name__ == "__main__":
    torch.set_num_threads(3)  # of a pipeline; tensors are too small for torch to share them out
    warnings.simplefilter("ignore")
    tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that dies with it would keep it for ever
    root, works, count, *steps = Path(sys.argv[1]), sys.argv[2].split(","), *map(int, sys.argv[3:])
    made = make_sources(root / "sources", "packed", "state")
    for name in works:
        killing = Killing(made, root / name, name)
        inputs = contents(made)
        print(killing.at_random(count), *(killing.at_events(step) for step in steps))
        assert contents(made) == inputs, "a source was changed"
