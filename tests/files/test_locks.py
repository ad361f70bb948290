"""A folder that one process works in: whoever else comes is told who does, and a process that is gone locks nothing.

Two trainings in one folder write over each other's checkpoints (deepinv/deepinv#525); not every network file system has
flock (huggingface/huggingface_hub#2399).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
from pathlib import Path

import pytest

from spp.errors import OutputError
from spp.files import atomic_directory, leftovers
from spp.files.leftovers import LOCK_NAME, FolderLock

ME = f"process {os.getpid()} (this one) on {socket.gethostname()}"


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_WAIT", 0)


def take(folder: Path) -> FolderLock:
    return FolderLock(folder, f"{folder} is in use", "choose another")


def test_one_at_a_time(tmp_path: Path) -> None:
    first = take(tmp_path)
    with pytest.raises(OutputError) as refused:
        take(tmp_path)
    assert str(refused.value) == f"{tmp_path} is in use: {ME}; choose another"
    first.release()
    assert os.listdir(tmp_path) == []
    second = take(tmp_path)
    first.release()  # not the second one's
    with pytest.raises(OutputError):
        take(tmp_path)
    second.release()


def test_a_process_that_was_killed_locks_nothing_and_its_children_neither(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        take(tmp_path)
        grandchild = os.fork()  # as a loader of data, which lives on when its parent is killed
        if not grandchild:
            signal.pause()
        os.write(tell, str(grandchild).encode())
        signal.pause()
    grandchild = int(os.read(ready, 20))
    try:
        with pytest.raises(OutputError, match=f"process {child} on"):
            take(tmp_path)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (tmp_path / LOCK_NAME).exists()
        take(tmp_path).release()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_forked_child_does_not_release_the_lock_of_its_parent(tmp_path: Path) -> None:
    held = take(tmp_path)
    child = os.fork()
    if not child:
        held.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(OutputError):
        take(tmp_path)
    held.release()


@pytest.mark.parametrize("note", [b"", b"nonsense", b'{"pid": 1}', b"[]", b"\xff"])
def test_a_lock_that_does_not_say_whose_it_is(tmp_path: Path, note: bytes) -> None:
    held = take(tmp_path)
    (tmp_path / LOCK_NAME).write_bytes(note)
    with pytest.raises(OutputError) as refused:
        take(tmp_path)
    assert str(refused.value) == f"{tmp_path} is in use; choose another"
    held.release()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        take(tmp_path).release()
    assert f"the file system of {tmp_path} has no locks" in caplog.text


def test_a_lock_that_was_removed_while_it_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder removes the file: a lock on a file that nobody can find is none."""
    real, removed = leftovers.lock, []

    def removing(handle: int, **options: bool) -> bool | None:
        if not removed:
            removed.append((tmp_path / LOCK_NAME).unlink())
        return real(handle, **options)

    monkeypatch.setattr(leftovers, "lock", removing)
    held = take(tmp_path)
    with pytest.raises(OutputError):
        take(tmp_path)
    held.release()


def test_a_folder_in_use_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"format": "spp-tune-1"}')
    held = take(folder)
    with (
        pytest.raises(OutputError, match=f"another process is at work in {folder}"),
        atomic_directory(folder, overwrite=True),
    ):
        pass
    held.release()
    with atomic_directory(folder, overwrite=True) as made:
        (made / "new").touch()
    assert os.listdir(folder) == ["new"]
