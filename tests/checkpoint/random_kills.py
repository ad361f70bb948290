"""Run as a script: kill -9 a piece of work at random moments, and look at what is left.

    random_kills.py FOLDER WORK[,WORK…] COUNT [SEED]       WORK: a name in WORKS

A fork of this process does the work over an old output and is killed after a random part of the time that the work
takes; so that slow phases (fsync, hashing, a rename) are met as often as they last. After each kill the output is the
old state or the new one, whole by its own check; what lies beside it is hidden and marked as a temporary; a rerun
succeeds and leaves the new state and nothing else. COUNT kills meet the work alive; prints how many attempts each work
took.

Another kind of work joins by an entry in WORKS.
"""

from __future__ import annotations

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
from pathlib import Path

import torch
from tqdm import tqdm

import spp
from spp.adapter_files import read_adapter
from tests.checkpoint.helpers import contents, make_sources, pruned_model, wrapped_model

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


def killed(work: Callable[[], object], after: float) -> bool:
    """Do the work in a fork that is killed after so many seconds; return whether it was still at work."""
    ready, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begin, b"1")
        work()
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(begin)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the work failed by itself: status {status}"
    return os.WIFSIGNALED(status)


def main(sources: Path, outputs: Path, name: str, count: int, seed: int) -> int:
    """Kill the work `count` times while it is alive; return how many attempts that took."""
    work, draw = WORKS[name], random.Random(seed)
    outputs.mkdir()
    out = outputs / "out"

    def do() -> float:
        """Return how long it took."""
        started = time.perf_counter()
        work.run(sources, out)
        return time.perf_counter() - started

    work.old(sources, outputs / "old")
    old = contents(outputs / "old")
    shutil.move(outputs / "old", sources / f"old {name}")
    do()
    duration, new = do(), contents(out)
    assert old != new, "the old and the new state must differ"
    inputs = contents(sources)
    kills = attempts = 0
    while kills < count:
        attempts += 1
        assert attempts <= MOST * count, f"only {kills} of {attempts} kills met the work alive"
        shutil.rmtree(out)
        shutil.copytree(sources / f"old {name}", out)
        kills += killed(do, draw.uniform(0, duration))
        found = contents(out)
        assert found in (old, new), f"attempt {attempts}: neither the old nor the new state: {sorted(found)}"
        work.check(out)
        strays = [stray for stray in os.listdir(outputs) if stray != "out"]
        assert all(stray.startswith(MARKS) for stray in strays), f"attempt {attempts}: {strays}"
        duration = do()  # as busy as the machine is now
        assert contents(out) == new, f"attempt {attempts}: the rerun left something else"
        assert os.listdir(outputs) == ["out"], f"attempt {attempts}: {os.listdir(outputs)}"
    assert contents(sources) == inputs, "a source was changed"
    return attempts


if __name__ == "__main__":
    torch.set_num_threads(3)  # of a pipeline; tensors are too small for torch to share them out
    warnings.simplefilter("ignore")
    tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that dies with it would keep it for ever
    root, seed = Path(sys.argv[1]), int(sys.argv[4]) if len(sys.argv) > 4 else 0
    made = make_sources(root / "sources", "packed", "state")
    print(*(main(made, root / name, name, int(sys.argv[3]), seed) for name in sys.argv[2].split(",")))
