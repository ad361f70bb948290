"""Models, outputs, runs and data under every name that a file system allows, and folders that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from spp.data import reading
from spp.kernels.native import compiler
from tests.cli.conftest import Outcome

Call = Callable[..., Outcome]
NAMES = {
    "spaces": " a  b ",
    "a newline": "a\nb",
    "other scripts": "möd 模型 🦙",
    "a dash": "-x",
    "an option": "--overwrite",
    "percents": "100%s %(x)d",
    "patterns": "[ab]*?{x}",
    "markup": "[bold]x[dim]",
    "a shell": "q'\"`$HOME`\\n;&|#",
    "a colon": "a:0.5",
    "a home": "~x",
    "a control sequence": "a\tb\x1b[31mred",
    "255 bytes": "n" * 255,
    "255 bytes of UTF-8": "é" * 127 + "x",
    "a weight's": "..x.safetensors",
}


def all_succeed(spp: Call, *calls: tuple[object, ...]) -> None:
    for arguments in calls:
        outcome = spp(*arguments)
        assert outcome.code == 0, (arguments, outcome.err)


def places(folder: Path, name: str, *kinds: str) -> dict[str, Path]:
    """A place of the name for each kind, alone in its folder."""
    found = {kind: folder / kind / name for kind in kinds}
    for path in found.values():
        path.parent.mkdir()
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_every_legal_character(
    spp: Call, dense: Path, pruned: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = places(tmp_path, NAMES[name], "model", "pruned", "adapter", "merged", "packed")
    shutil.copytree(dense, place["model"])
    shutil.copytree(adapter, place["adapter"])
    all_succeed(
        spp,
        ("prune", place["model"], place["pruned"], "--method", "magnitude"),
        ("merge", place["pruned"], place["adapter"], place["merged"]),
        ("merge", place["pruned"], place["adapter"], place["merged"], "--overwrite"),
        ("verify", place["pruned"], place["merged"]),
        ("certify", place["merged"], "--base", place["pruned"], "--overwrite"),
        ("inspect", place["adapter"]),
        ("export", place["pruned"], place["packed"], "--packed"),
    )
    monkeypatch.chdir(place["merged"].parent)
    all_succeed(spp, ("merge", "--overwrite", "--", place["pruned"], place["adapter"], NAMES[name]))
    all_succeed(spp, ("verify", "--", NAMES[name]))
    for path in place.values():
        assert os.listdir(path.parent) == [NAMES[name]]  # nothing is left beside it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a newline", "patterns", "255 bytes"])
def test_a_run_and_data_of_such_a_name(spp: Call, pruned: Path, text: Path, tmp_path: Path, name: str) -> None:
    place = places(tmp_path, NAMES[name], "model", "run", "data")
    shutil.copytree(pruned, place["model"])
    shutil.copy(text, place["data"])
    options = ("--steps", 2, "--lr", 0.1, "--block-length", 32, "--window", 32, "--r", 2, "--data-format", "text")
    tune = ("tune", place["model"], place["run"], "--data", place["data"], *options)
    measure = ("eval", place["model"], "--text", place["data"], "--window", 32, "--max-windows", 1)
    all_succeed(spp, tune, (*tune, "--resume"), (*tune, "--overwrite"))
    all_succeed(spp, (*measure, "--adapter", place["run"] / "adapter"))


def test_a_long_name_of_an_output_has_a_folder_of_finished_blocks(tmp_path: Path) -> None:
    from spp.pruning.work import work_folder

    for length in (1, 246, 247, 255):
        folder = work_folder(tmp_path / ("n" * length))
        folder.mkdir()
        assert not folder.name.startswith(".n.spp-")
    assert work_folder(tmp_path / ("n" * 255)) != work_folder(tmp_path / ("n" * 254 + "m"))


@pytest.mark.parametrize("seed", [None, 1])
def test_a_data_set_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "data set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(5)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere")
    found = [row["text"] for _, row in reading.read_dataset_rows(str(folder), seed=seed)]
    assert sorted(found) == [f"row {i}" for i in range(5)]


def test_no_place_for_compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or no folder at all that can be written: the other kernels do the work."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("SPP_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkstemp", full)
    source = next(one for one in vars(compiler).values() if isinstance(one, compiler.Source))
    with pytest.raises(compiler.Refused, match=r"cannot be written|no C compiler|lacks|are for Linux"):
        compiler._compiled(source)
    monkeypatch.setenv("SPP_CACHE", "/proc/nowhere")
    monkeypatch.setattr(compiler, "_temporary", full)
    with pytest.raises(compiler.Refused, match="cannot be written, nor can any folder for temporary files"):
        compiler._folder()
