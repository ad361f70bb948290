"""An output is there whole or not at all: after errors, kills, full disks and other writers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spp.errors import OutputError, OutputExistsError
from spp.files import (
    atomic,
    atomic_directory,
    atomic_file,
    leftovers,
    output_error,
    recover,
    save_tensors,
)
from tests.helpers.forks import side_by_side

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.iterdir()) if p.is_file()}


def fill(folder: Path, word: str) -> None:
    """Write what makes a folder a checkpoint, as the rule of what is replaced has it."""
    (folder / "config.json").write_text(json.dumps({"model_type": word}))


def word(folder: Path) -> str:
    (text,) = contents(folder).values()
    return str(json.loads(text)["model_type"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def remount_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        assert folder.parent == target.parent
        assert not target.exists()
    assert contents(target) == {"a": "1"}
    assert os.listdir(target.parent) == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_directory(tmp_path / "made" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        raise KeyError("inside")
    assert os.listdir(tmp_path) == []


def test_an_error_leaves_the_old_state(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name, error in (("old", None), ("new", KeyboardInterrupt)):
        try:
            with atomic_directory(target, overwrite=True) as folder:
                fill(folder, name)
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
    assert word(target) == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("folder", "file", "dangling"):
        target = tmp_path / name
        {"folder": target.mkdir, "file": target.touch, "dangling": lambda t=target: t.symlink_to("file")}[name]()
        for make in (atomic_directory, atomic_file):
            with pytest.raises(OutputExistsError, match="overwrite=True") as caught, make(target):
                pytest.fail("the block must not run")
            assert isinstance(caught.value, FileExistsError)
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_the_whole(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    for name in ("old", "new"):
        with atomic_directory(target, overwrite=True) as folder:
            fill(folder, name)
            (folder / f"{'pytorch_' * (name == 'new')}model.bin").touch()
    assert sorted(contents(target)) == ["config.json", "pytorch_model.bin"]
    assert json.loads(contents(target)["config.json"]) == {"model_type": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link", overwrite=True) as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"a": "1"}


def test_a_directory_does_not_replace_a_file_nor_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="it is a file"), atomic_directory(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(OutputError, match="it is a directory"), atomic_file(tmp_path / "folder", overwrite=True):
        pass
    with pytest.raises(OutputError, match="a part of the path is a file"), atomic_directory(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "precious"


def test_the_current_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", tmp_path):
        with pytest.raises(OutputError, match="current directory"), atomic_directory(target, overwrite=True):
            pass


def test_a_long_name_works_and_a_name_that_is_too_long_says_so(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / ("ä" * 120)) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(OutputError, match="name is too long"), atomic_directory(tmp_path / ("a" * 300)):
        pass
    assert os.listdir(tmp_path) == ["ä" * 120]


def test_files_get_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "private").touch(mode=0o600)  # as safetensors' own writer makes files
            (folder / "script").touch(mode=0o755)
            (folder / "script").chmod(0o755)
        with atomic_file(tmp_path / "file") as path:
            path.write_text("1")
    finally:
        os.umask(old)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in [*(tmp_path / "out").iterdir(), *tmp_path.iterdir()]}
    assert modes == {"private": "0o640", "script": "0o755", "out": "0o750", "file": "0o640"}


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission is denied"),
        (errno.ENOTDIR, "is a file, not a folder"),
    ],
)
@pytest.mark.parametrize("where", ["mkdir", "fsync", "rename"])
def test_what_the_system_refuses_comes_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, remedy: str
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, where, refuse)
    with pytest.raises(OutputError, match=remedy) as caught, atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    monkeypatch.undo()
    assert caught.value.errno == number and str(tmp_path / "out") in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_errors_of_the_block_that_mean_a_full_disk_are_told(tmp_path: Path) -> None:
    class RustError(Exception):
        pass

    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, RustError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(OutputError, match="disk is full") as caught, atomic_directory(tmp_path / "out"):
            raise error
        assert caught.value.__cause__ is error
    unread = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")  # reading is another matter
    with pytest.raises(PermissionError, match="somewhere"), atomic_directory(tmp_path / "out"):
        raise unread
    with (
        pytest.raises(OutputError, match="permission is denied"),
        atomic_directory(tmp_path / "out") as folder,
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "a"))
    assert os.listdir(tmp_path) == []


def test_the_output_is_named_and_not_its_temporary_folder(tmp_path: Path) -> None:
    message = f"cannot write {tmp_path / 'out' / 'a'}: the disk is full: free some space or write elsewhere"
    with pytest.raises(OutputError) as caught, atomic_directory(tmp_path / "out") as folder:
        raise output_error(OSError(errno.ENOSPC, "No space left on device"), folder / "a")
    assert str(caught.value) == message and caught.value.errno == errno.ENOSPC
    with pytest.raises(OutputExistsError, match="elsewhere"), atomic_directory(tmp_path / "out"):
        raise OutputExistsError("elsewhere exists")  # another output's


def test_output_error_is_idempotent() -> None:
    error = output_error(OSError(errno.EROFS, "x"), "out")
    assert output_error(error, "elsewhere") is error


def test_a_full_disk(small_disk: Path) -> None:
    import torch

    with atomic_directory(small_disk / "out") as folder:
        fill(folder, "old")
    with (
        pytest.raises(OutputError, match="disk is full"),
        atomic_directory(small_disk / "out", overwrite=True) as folder,
    ):
        save_tensors(folder / "big.safetensors", {"w": torch.ones(2**20)})
    assert os.listdir(small_disk) == ["out"] and word(small_disk / "out") == "old"


def test_a_read_only_disk(small_disk: Path) -> None:
    (small_disk / "old").mkdir()
    remount_read_only(small_disk)
    for target in (small_disk / "out", small_disk / "not" / "there"):
        with pytest.raises(OutputError, match="read-only"), atomic_directory(target):
            pass
    with pytest.raises(OutputError, match="read-only"), atomic_directory(small_disk / "old", overwrite=True):
        pass
    with pytest.raises(OutputError, match="read-only"), atomic_file(small_disk / "file"):
        pass
    recover(small_disk / "out")


SCENARIOS = ("fresh", "exchange", "file", "aside")  # the last one changes its process


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    assert min(run_kills(tmp_path, step=4)) >= 2


@pytest.mark.stress
def test_a_hundred_kills(tmp_path: Path) -> None:
    kills = 0
    while kills < 100:
        folder = tmp_path / str(kills)
        folder.mkdir()
        kills += sum(run_kills(folder, step=1))


def run_kills(folder: Path, step: int) -> list[int]:
    command = [sys.executable, str(ROOT / "tests/files/kills.py"), str(folder), ",".join(SCENARIOS), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [int(kills) for kills in done.stdout.split()]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / ".out.spp-tmp-dead").mkdir()
    (tmp_path / ".out.spp-tmp-dead" / "a").write_text("half")
    (tmp_path / ".out.spp-tmp-file").write_text("half")
    (tmp_path / ".out2.spp-tmp-dead").mkdir()  # of another output
    with atomic_directory(target, overwrite=True) as living:
        assert not (tmp_path / ".out.spp-tmp-dead").exists()
        recover(target)
        assert living.is_dir()
        with atomic_directory(target, overwrite=True) as other:
            fill(other, "first")
        assert living.is_dir()
        fill(living, "second")
    assert word(target) == "second"
    assert sorted(os.listdir(tmp_path)) == [".out2.spp-tmp-dead", "out"]


@pytest.mark.parametrize(
    ("left", "after"),
    [
        ({"new": "2", "out": "1"}, "1"),  # killed before the old one was put aside
        ({"new": "2", "old": "1"}, "2"),  # … between the renames: finished
        ({"old": "1", "out": "2"}, "2"),  # … before the old one was removed
        ({"old": "1"}, "1"),  # rolled back
        ({"tmp": "3", "new": "2", "old": "1"}, "2"),  # … and a writer that was killed before it was done
    ],
)
def test_an_interrupted_exchange_is_finished_or_rolled_back(tmp_path: Path, left: dict[str, str], after: str) -> None:
    for kind, text in left.items():
        folder = tmp_path / ("out" if kind == "out" else f".out.spp-{kind}-1234")
        folder.mkdir()
        (folder / "a").write_text(text)
    recover(tmp_path / "out")
    assert contents(tmp_path / "out") == {"a": after}
    assert os.listdir(tmp_path) == ["out"]


def test_a_live_exchange_is_left_alone(tmp_path: Path) -> None:
    for kind in ("new", "old", "tmp"):
        (tmp_path / f".out.spp-{kind}-1234").mkdir()
    handle = os.open(tmp_path / ".out.spp-new-1234", os.O_RDONLY)
    assert leftovers.lock(handle)
    recover(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.spp-new-1234", ".out.spp-old-1234"]  # the dead one's is removed
    os.close(handle)


def test_without_overwrite_the_second_writer_loses(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputExistsError, match="meanwhile"), atomic_directory(target) as folder:
        (folder / "a").write_text("slow")
        with atomic_directory(target) as other:
            (other / "a").write_text("fast")
    assert contents(target) == {"a": "fast"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_writers_side_by_side(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(10):
                with atomic_directory(tmp_path / "out", overwrite=True) as folder:
                    fill(folder, name)
                    for size in "abc":
                        (folder / f"{size}.tiktoken").write_text(json.dumps({"model_type": name}))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(word,)) for word in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(contents(tmp_path / "out").values())) == 1
    recover(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_processes_side_by_side(tmp_path: Path) -> None:
    code = (
        "from spp.files import atomic_directory\n"
        "def work(target, word):\n"
        "    for _ in range(30):\n"
        "        with atomic_directory(target, overwrite=True) as folder:\n"
        "            for name in ('config.json', 'vocab.json', 'merges.txt'):\n"
        "                (folder / name).write_text('{\"model_type\": \"' + word + '\"}')\n"
    )
    side_by_side(code, tmp_path / "out", "one", "two")
    assert len(set(contents(tmp_path / "out").values())) == 1
    recover(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_cleaner_that_comes_first_makes_the_writer_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = leftovers.lock, []

    def slow(handle: int) -> bool | None:
        calls.append(handle)
        if len(calls) == 1:
            (stray,) = tmp_path.iterdir()
            stray.rmdir()
        return real(handle)

    monkeypatch.setattr(leftovers, "lock", slow)
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert len(calls) == 2 and contents(tmp_path / "out") == {"a": "1"}


def test_writers_that_never_stop_end_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(one: Path, other: Path) -> bool:
        raise FileNotFoundError(errno.ENOENT, "gone")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(atomic, "_exchange", gone)
    with pytest.raises(OutputError, match="let only one write"), atomic_directory(tmp_path / "out", overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]
