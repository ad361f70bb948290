"""Work on tensors, cut into pieces, by a few threads.

    jobs, in order: piece 0, piece 1, …    each piece, by whichever thread is free: read → compute → write
    last piece of a job done: finish

A thread that reads or writes waits for the system, and compiled functions release Python's lock, so one piece is read
while another is computed and a third is written. The pieces that are begun or wait for a thread are at most twice as
many as the threads, and a thread reuses its buffers, so memory does not depend on the size of a tensor. The first error
in the order of the pieces stops the work, and so does an interruption; it is raised when no thread is at work any more.
"""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType

import numpy as np
import numpy.typing as npt
import torch

from spp.files.writer import PAGE

MOST_THREADS = 8  # more than a disk keeps busy
_ALERT = 0.2  # seconds after which the main thread looks for a signal that another thread was woken up for


class Scratch(threading.local):
    """Buffers that are reused from piece to piece; every thread sees its own."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def bytes(self, tag: str, count: int, place: int = 0) -> npt.NDArray[np.uint8]:
        """Return `count` bytes; the thread's earlier ones of this tag are no longer the caller's.

        Args:
            place: where in a page of memory they begin.
        """
        buffer = self._buffers.get(tag)
        if buffer is None or buffer.size < place + count:
            whole = np.empty(count + 2 * PAGE, np.uint8)
            buffer = self._buffers[tag] = whole[-whole.ctypes.data % PAGE :]
        return buffer[place : place + count]


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
        jobs: taken one after the other, shortly before their pieces are begun.
        done: called with each job that is finished, in order.
        waiting: threads more, for as many as wait for the disk at a time.

    Raises:
        Exception: the first that a job raised, in the order of jobs and pieces; later ones are dropped.
    """
    threads = max(1, min(torch.get_num_threads() + waiting, MOST_THREADS))
    begun: deque[tuple[Future[None], Job | None]] = deque()  # (a piece, its job if it is the last one)
    scratch = Scratch()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="spp")

    def complete() -> None:
        piece, job = begun.popleft()
        while not wait([piece], _ALERT).done:
            handle_signals()
        piece.result()
        if job is not None:
            job.finish()
            if done is not None:
                done(job)

    with _signals_deferred() as handle_signals:
        try:
            for job, piece in ((one, index) for one in jobs for index in range(one.pieces)):
                handle_signals()
                if len(begun) == 2 * threads:
                    complete()
                begun.append((pool.submit(job.do, piece, scratch), job if piece == job.pieces - 1 else None))
            while begun:
                complete()
        finally:
            pool.shutdown(cancel_futures=True)  # threads are at our files


@contextmanager
def _signals_deferred() -> Iterator[Callable[[], None]]:
    """Defer the handlers of Ctrl-C and SIGTERM; yield a function that calls those whose signal has come.

    A handler that raised inside the pool could make it forget a thread that it has just started.
    """
    heard: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}

    def handle() -> None:
        while heard:
            number = heard.pop()
            handlers[number](number, None)

    for number in handlers:
        signal.signal(number, lambda number, _: heard.append(number))
    try:
        yield handle
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        handle()
