"""A run's folder: one process at a time (deepinv/deepinv#525: two trainings wrote into one folder)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spp.errors import OutputError, OutputExistsError
from spp.files.leftovers import LOCK_NAME, FolderLock
from spp.training import TuneResult
from spp.training import tuning as module
from spp.training.run_directory import RunDirectory
from tests.training.helpers import bytes_of, config, run_tune

_HOLDER = """
import sys, time
from pathlib import Path
from spp.files.leftovers import FolderLock
held = FolderLock(Path(sys.argv[1]), "told", "remedy")
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its method: all begin here."""
    options = {"steps": 2, "lr": 0.1}
    real, refused = module._run, []

    def meanwhile(*arguments: object) -> TuneResult:
        before = bytes_of(tmp_path / "run")
        for option in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError) as raised:
                run_tune(config(text, tmp_path / "run", **options, **option))
            refused.append(str(raised.value))
        assert bytes_of(tmp_path / "run") == before
        return real(*arguments)

    monkeypatch.setattr(module, "_run", meanwhile)
    run_tune(config(text, tmp_path / "run", **options))
    assert "holds an earlier run" in refused[0]
    for message in refused[1:]:
        assert f"another process is at work in {tmp_path / 'run'}: process {os.getpid()} (this one) on" in message
        assert message.endswith("let it finish, or stop it, or choose another output_dir")
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_who_begins_second_is_refused_though_there_was_no_folder_when_he_came(text: Path, tmp_path: Path) -> None:
    c = config(text, tmp_path / "run")
    with RunDirectory(c) as first, RunDirectory(c) as second:
        first.begin({})
        with pytest.raises(OutputError, match="another process is at work"):
            second.begin({})
        assert sorted(os.listdir(tmp_path / "run")) == [LOCK_NAME, "checkpoints", "config.json"]
    with RunDirectory(config(text, tmp_path / "run2")) as late:
        with RunDirectory(config(text, tmp_path / "run2")) as early:
            early.begin({})
        with pytest.raises(OutputExistsError, match="holds an earlier run"):  # a whole one, meanwhile
            late.begin({})


def test_a_run_that_was_killed_as_it_began_is_in_nobodys_way(text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).write_text('{"pid": 1, "host": "gone"}')
    (tmp_path / "run" / ".config.json.spp-tmp-0123456789ab").write_text('{"format":')  # half of its first file
    with RunDirectory(config(text, tmp_path / "run")) as run:
        run.begin({})
    with RunDirectory(config(text, tmp_path / "run", resume=True)) as run:  # the same process goes on with it
        run.begin({})
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.json"]


def test_other_ranks_than_the_first_do_not_lock(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    held = FolderLock(tmp_path / "run", "told", "remedy")  # the first rank
    monkeypatch.setenv("RANK", "1")
    with RunDirectory(config(text, tmp_path / "run")) as run:
        run.begin({})
    assert held.held and (tmp_path / "run" / LOCK_NAME).exists()
    held.release()


@pytest.mark.slow
def test_another_process_is_named_and_its_death_frees_the_folder(text: Path, tmp_path: Path) -> None:
    result = run_tune(config(text, tmp_path / "run", steps=2, lr=0.1))
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(result.run_dir)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    again = config(text, tmp_path / "run", steps=2, lr=0.1, overwrite=True)
    with pytest.raises(OutputError, match=f"process {holder.pid} on"):
        run_tune(again)
    holder.kill()
    holder.communicate()
    run_tune(again)
    assert not (tmp_path / "run" / LOCK_NAME).exists()
