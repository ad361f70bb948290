"""Threads at work on pieces: each is done once, the first error stops all, and nobody is at work afterwards."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from spp.files.pipeline import Job, Scratch, run
from spp.files.writer import PAGE
from tests.helpers.checkpoints import assert_no_threads_at_work


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
    assert_no_threads_at_work()


class Logged(Job):
    """A job that writes down what is done, and does something besides."""

    def __init__(self, name: str, pieces: int, log: list[object], extra: Callable[[int], object] | None = None) -> None:
        self.name, self.pieces, self.log, self.extra = name, pieces, log, extra

    def do(self, piece: int, scratch: Scratch) -> None:
        self.log.append((self.name, piece))
        if self.extra is not None:
            self.extra(piece)

    def finish(self) -> None:
        self.log.append(self.name)
        if self.extra is not None:
            self.extra(-1)


def test_every_piece_once_and_then_the_end_of_the_job() -> None:
    log: list[object] = []
    finished: list[Job] = []
    jobs = [Logged(str(i), 1 + i % 4, log) for i in range(50)]
    run(iter(jobs), finished.append, waiting=2)
    assert Counter(log) == Counter([job.name for job in jobs] + [(j.name, p) for j in jobs for p in range(j.pieces)])
    assert all(log.index(job.name) > max(log.index((job.name, p)) for p in range(job.pieces)) for job in jobs)
    assert sorted(map(id, finished)) == sorted(map(id, jobs))
    run([])


def test_a_job_is_made_shortly_before_its_pieces_are_begun(threads: int) -> None:
    log: list[object] = []
    made: list[int] = []

    def jobs() -> Iterator[Job]:
        for i in range(20):
            made.append(i)
            assert len(made) - sum(isinstance(entry, str) for entry in log) <= threads + 2  # 2 · threads pieces wait
            yield Logged(str(i), 2, log)

    run(jobs())
    assert made == list(range(20))


@pytest.mark.parametrize("where", [0, 5, -1])
def test_the_first_error_is_raised_and_nothing_more_is_begun(where: int, threads: int) -> None:
    log: list[object] = []

    def fail(piece: int) -> None:
        if piece == where:
            raise ValueError("the first")

    def wait_and_fail(piece: int) -> None:
        time.sleep(0.02)
        raise RuntimeError("a later one")

    jobs = [Logged("bad", 7, log, fail), *(Logged(str(i), 1, log, wait_and_fail) for i in range(50))]
    with pytest.raises(ValueError, match="the first"):
        run(jobs)
    assert len([entry for entry in log if entry[0] != "bad"]) <= 2 * threads


def test_the_first_error_is_that_of_the_earliest_piece() -> None:
    def fail(piece: int) -> None:
        if piece == 0:
            time.sleep(0.1)
        raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 0"):
        run([Logged("bad", 4, [], fail)])


def test_an_error_while_jobs_are_made_or_reported_is_raised() -> None:
    def jobs() -> Iterator[Job]:
        yield Logged("0", 1, [])
        raise ValueError("no more")

    def refuse(job: Job) -> None:
        raise ValueError("not wanted")

    with pytest.raises(ValueError, match="no more"):
        run(jobs())
    with pytest.raises(ValueError, match="not wanted"):
        run([Logged("0", 1, [])], refuse)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interruption_stops_all_threads_before_it_is_raised() -> None:
    log: list[object] = []

    def interrupt(piece: int) -> None:
        if piece == 3:
            signal.raise_signal(signal.SIGINT)  # the main thread, which waits, gets it
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run([Logged("0", 1000, log, interrupt)])
    assert 4 <= len(log) < 500


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interruption_does_not_leave_a_thread_behind() -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(piece: int) -> None:
        for _ in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        run([Logged("0", 1, [], interrupt)])


@pytest.mark.usefixtures("ctrl_c")
def test_a_handler_that_raises_nothing_does_not_stop_the_work() -> None:
    log: list[object] = []
    heard: list[int] = []
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(piece: int) -> None:
        if piece == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    try:
        run([Logged("0", 30, log, interrupt)])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(log) == 31 and sorted(heard) == [signal.SIGINT, signal.SIGTERM]


def test_buffers_are_used_again_and_begin_where_they_are_wanted() -> None:
    scratch = Scratch()
    for place in (0, 8, PAGE - 1):
        for count in (0, 10, PAGE, 50_000):
            buffer = scratch.bytes("a", count, place)
            assert buffer.size == count and (not count or buffer.ctypes.data % PAGE == place)
    assert scratch.bytes("a", 100).ctypes.data == scratch.bytes("a", 200).ctypes.data
    assert scratch.bytes("a", 100).ctypes.data != scratch.bytes("b", 100).ctypes.data
    own, others = scratch.bytes("a", 100).ctypes.data, []
    thread = threading.Thread(target=lambda: others.append(scratch.bytes("a", 100).ctypes.data))
    thread.start()
    thread.join()
    assert others and others != [own]
