"""Work on tensors, cut into pieces, by a few threads.

    jobs, in order: piece 0, piece 1, …    each piece: read → compute → write, by whichever thread is free
    last piece of a job: finish

A thread that reads or writes waits for the system, and compiled functions let go of Python's lock, so one piece is read
while another is computed and a third is written. Memory is a piece or two a thread, whatever the size of a tensor. The
first error stops all threads and is raised when they have stopped; so is an interruption.
"""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from spp.files.output import PAGE
from spp.files.writer import TensorFile

MOST_THREADS = 8  # more than a disk keeps busy
_ALERT = 0.2  # seconds after which the main thread looks for a signal that another thread was woken up for


class Scratch:
    """A thread's own buffers, used again from piece to piece."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def bytes(self, tag: str, count: int, place: int = 0) -> npt.NDArray[np.uint8]:
        """Return `count` bytes; those that were returned before for the tag are no longer the caller's.

        Args:
            place: where in a page of memory they begin.
        """
        buffer = self._buffers.get(tag)
        if buffer is None or buffer.size < place + count:
            whole = np.empty(count + 2 * PAGE, np.uint8)
            buffer = self._buffers[tag] = whole[-whole.ctypes.data % PAGE :]
        return buffer[place : place + count]


class Sink:
    """Where the bytes of a tensor go that a job makes: into a file, or nowhere.

    Args:
        file: that has a tensor of this name; None to throw the bytes away.
    """

    def __init__(self, file: TensorFile | None, name: str) -> None:
        self.file, self.name = file, name

    def write(self, start: int, data: npt.NDArray[np.uint8]) -> None:
        """Take some bytes, from byte `start` of the tensor on."""
        if self.file is not None:
            self.file.write(self.name, start, data.data)

    def place(self, start: int) -> int:
        """Return where in a page of memory the bytes from `start` on had best begin."""
        return 0 if self.file is None else self.file.place(self.name, start)


class Job(ABC):
    """The work on one tensor."""

    pieces: int = 1

    @abstractmethod
    def do(self, piece: int, scratch: Scratch) -> None:
        """Do a piece; pieces are begun in order, but several threads may be at a job's pieces."""

    @abstractmethod
    def finish(self) -> None:
        """Do what is left to do when all pieces are done; called once."""


def run(jobs: Iterable[Job], done: Callable[[Job], object] | None = None, *, waiting: int = 0) -> None:
    """Do all jobs, with as many threads as torch uses.

    Args:
        jobs: taken one after the other, when a thread is free.
        done: called with each job that is finished; one call at a time.
        waiting: threads more, for as many as wait for the disk at a time.

    Raises:
        Exception: the first that a job raised; what others raised after it is dropped.
    """
    work = _Work(iter(jobs), done)
    try:
        with _deaf() as heard:  # Thread.start is not to be interrupted: has it started one, or not?
            for number in range(max(1, min(torch.get_num_threads() + waiting, MOST_THREADS))):
                work.start(number)
        if heard:
            signal.raise_signal(signal.SIGINT)
        work.wait()
    except BaseException as error:
        work.stop(error)
        with _deaf():  # however often the user interrupts: threads are at our files
            work.wait()
    if work.error is not None:
        raise work.error


@contextmanager
def _deaf() -> Iterator[list[int]]:
    """Put Ctrl-C off; give the list to which it is added."""
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield heard
        return
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


class _Work:
    """What the threads share. The main thread takes none of its locks: a signal could keep it from letting go."""

    def __init__(self, jobs: Iterator[Job], done: Callable[[Job], object] | None) -> None:
        self.error: BaseException | None = None
        self._jobs = jobs
        self._done = done
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._next = 0
        self._left: dict[Job, int] = {}  # {job that was begun: pieces that are not done}
        self._begun: list[threading.Thread] = []  # Thread.join would not do: after a signal it takes one for stopped
        self._ended: list[threading.Thread] = []
        self._bell = threading.Lock()  # free when all threads have ended
        self._bell.acquire()

    def start(self, number: int) -> None:
        """Start a thread."""
        thread = threading.Thread(target=self._run, name=f"spp-{number}", daemon=True)
        self._begun.append(thread)
        try:
            thread.start()
        except RuntimeError:  # the system has none left
            self._begun.remove(thread)
            raise

    def wait(self) -> None:
        """Wait until no thread is at work."""
        while len(self._ended) < len(self._begun):
            self._bell.acquire(timeout=_ALERT)

    def stop(self, error: BaseException) -> None:
        """Remember the first error; nothing more is begun."""
        self.error = self.error or error

    def _run(self) -> None:
        """Do pieces until there are none, or until something went wrong: a thread's whole life."""
        scratch = Scratch()
        try:
            while (taken := self._take()) is not None:
                job, piece = taken
                job.do(piece, scratch)
                with self._lock:
                    self._left[job] -= 1
                    last = not self._left[job]
                if last and self.error is None:
                    job.finish()
                    with self._lock:
                        del self._left[job]
                        if self._done is not None:
                            self._done(job)
        except BaseException as error:
            self.stop(error)
        finally:
            with self._lock:
                self._ended.append(threading.current_thread())
                if self._bell.locked():
                    self._bell.release()

    def _take(self) -> tuple[Job, int] | None:
        with self._lock:
            if self.error is not None:
                return None
            if self._job is None or self._next == self._job.pieces:
                self._job, self._next = next(self._jobs, None), 0
                if self._job is None:
                    return None
                self._left[self._job] = self._job.pieces
            piece, self._next = self._next, self._next + 1
            return self._job, piece
