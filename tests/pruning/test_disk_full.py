"""Streaming pruning onto a disk that is full, and beside another run: what is finished stays."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spp.pruning.loop as loop
import spp.pruning.work as work
from spp.certifying.verify import verify
from spp.errors import OutputError, OutputExistsError
from spp.pruning.disk import prune_checkpoint
from tests.helpers.models import tiny_llama


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk on which two blocks fit, but not three; needs the right to mount."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def _grow(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_keeps_what_is_finished(source: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = disk / "out"
    with pytest.raises(OutputError, match=r"disk is full.* 2 finished blocks are kept in .*\.out\.pruning"):
        prune_checkpoint(source, out, "wanda", "2:4", _ids())
    shards = ["model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"]
    assert _names(disk / ".out.pruning") == [*shards, "progress.json"]
    _grow(disk, "700k")
    with pytest.raises(OutputError, match=r"disk is full.* 3 finished blocks are kept"):
        prune_checkpoint(source, out, "wanda", "2:4", _ids())  # the blocks fit, the output beside them does not
    assert _names(disk) == [".out.pruning"]
    _grow(disk, "4m")
    monkeypatch.setattr(loop, "prune_layer", None)
    report = prune_checkpoint(source, out, "wanda", "2:4", _ids())
    assert len(report.layers) == 21
    assert _names(disk) == ["out"]
    verify(out)


def test_a_disk_that_is_full_at_once_is_left_as_it_was(source: Path, disk: Path) -> None:
    _grow(disk, "100k")
    with pytest.raises(OutputError, match="disk is full") as raised:
        prune_checkpoint(source, disk / "out", "magnitude", "2:4")
    assert "finished" not in str(raised.value) and raised.value.errno == errno.ENOSPC
    assert _names(disk) == []


def test_a_second_run_into_the_same_place_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = work.save_tensors, []

    def meanwhile(path: Path, tensors: Any) -> None:
        with pytest.raises(OutputError, match="another run is pruning into") as raised:
            prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
        refused.append(raised.value)
        real(path, tensors)

    monkeypatch.setattr(work, "save_tensors", meanwhile)
    prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    assert len(refused) == 3
    assert _names(tmp_path) == ["model", "out"]


def test_an_output_that_somebody_else_made_meanwhile(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.save_tensors

    def meanwhile(path: Path, tensors: Any) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        real(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(OutputExistsError, match=r"exists already.* 3 finished blocks"):
        patch.setattr(work, "save_tensors", meanwhile)
        prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    monkeypatch.setattr(loop, "prune_layer", None)
    prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4", overwrite=True)
    assert _names(tmp_path) == ["model", "out"]


def test_progress_that_cannot_be_read_is_another_jobs(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / ".out.pruning"
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps({"job": {"method": "wanda"}, "blocks": {"0": {}}}))
    (folder / "model-00002-of-00004.safetensors").write_bytes(b"nonsense")
    prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    assert "another job (other: dtype, dtypes, method, patterns" in caplog.text
    verify(tmp_path / "out")
    assert _names(tmp_path) == ["model", "out"]


def test_a_file_system_without_hard_links(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(work, "_LARGEST_SINGLE", 0)
    monkeypatch.setattr(os, "link", refuse)
    prune_checkpoint(source, tmp_path / "out", "magnitude", "2:4")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 4
    verify(tmp_path / "out")
