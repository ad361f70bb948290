"""Calibration data by path and by id: data sets on the disk, token ids in files, and what is refused unread."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spp.configs.pruning import DataSet, check_source
from spp.errors import DataError, DependencyError, SPPWarning
from spp.pruning import prune
from spp.pruning.windows import calibration_windows, check_calibration, needs_tokenizer, read_source_rows
from tests.helpers.models import tiny_llama, tiny_tokenizer

TEXTS = [f"document {i} says that {i} times {i} is {i * i}." for i in range(60)]


def _windows(calibration: Any, **options: Any) -> torch.Tensor:
    values = {"nsamples": 4, "seqlen": 32, "seed": 0, **options}
    return calibration_windows(calibration, tiny_tokenizer(), **values)


def _text(windows: torch.Tensor) -> str:
    return tiny_tokenizer().decode(windows.flatten(), skip_special_tokens=True)


def documents(source: str, seed: int) -> Iterator[str]:
    return (example.text for example in read_source_rows(source, seed))


@pytest.fixture(autouse=True)
def no_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `datasets` caches belongs to the test."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["parquet", "jsonl", "saved", "saved with splits"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of TEXTS in a folder, in each of the forms that `datasets` loads."""
    from datasets import Dataset, DatasetDict, config

    # After each stream of parquet files `datasets` waits 5 s for Arrow's threads.
    monkeypatch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    path = tmp_path / "set"
    rows = Dataset.from_dict({"text": TEXTS, "title": [f"title {i} of them all" for i in range(len(TEXTS))]})
    if request.param == "saved":
        rows.save_to_disk(path)
    elif request.param == "saved with splits":
        DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(path)
    else:
        path.mkdir()
        write = rows.to_parquet if request.param == "parquet" else rows.to_json
        write(path / f"train-00000-of-00001.{request.param}")
    return path


@pytest.mark.sampled(2)
def test_a_folder_is_a_data_set(folder: Path) -> None:
    files = sorted(folder.rglob("*"))
    windows = _windows(folder)
    assert windows.shape == (4, 32)
    found = [text for text in TEXTS if text in _text(windows)]
    assert len(found) >= 2 and found != TEXTS[: len(found)]  # whole documents, drawn
    assert torch.equal(windows, _windows(str(folder)))
    assert not torch.equal(windows, _windows(folder, seed=1))
    titles = _text(_windows(f"{folder}:::title"))
    assert "of them all" in titles and "says" not in titles
    for field in ("nothing", "text2"):
        with pytest.raises(DataError, match=f"row 1: expected text in the field {field}; the row has text, title"):
            _windows(f"{folder}::train:{field}")
    with pytest.raises(DataError, match=r"nowhere"):
        _windows(f"{folder}::nowhere")
    assert sorted(folder.rglob("*")) == files  # nothing is written there


def test_every_document_of_a_data_set_is_there_once(folder: Path) -> None:
    drawn = list(documents(str(folder), 3))
    assert sorted(drawn) == sorted(TEXTS) and drawn != TEXTS
    assert drawn == list(documents(f"{folder}::train:text", 3))


def test_a_split_of_a_saved_data_set(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": TEXTS})
    DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "set")
    assert sorted(documents(f"{tmp_path / 'set'}::test", 0)) == sorted(TEXTS[:5])
    with pytest.raises(DataError, match="no split 'nowhere'; it has train, test"):
        next(documents(f"{tmp_path / 'set'}::nowhere", 0))
    with pytest.raises(DataError, match="no config; found 'en'"):
        next(documents(f"{tmp_path / 'set'}:en", 0))


def test_a_hub_id_is_read_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Rows(list[Any]):
        def shuffle(self, seed: int, buffer_size: int) -> Rows:
            asked.append((seed, buffer_size))
            return self

    def load_dataset(*arguments: Any, **options: Any) -> Rows:
        asked.append((arguments, options))
        return Rows({"text": text} for text in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "document 0 says" in _text(_windows("allenai/c4:en:validation", seed=7))
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "streaming": True}), (7, 10_000)]


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"allenai/c4.*spp\[train\]"):
        _windows("allenai/c4:en")


def test_a_data_set_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nobody/nothing is no file here.*data set \(config 'x', split 'train'\)"):
        _windows("nobody/nothing:x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty cannot be loaded as a data set"):
        _windows(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("allenai/c4", DataSet("allenai/c4")),
        ("allenai/c4:en", DataSet("allenai/c4", "en")),
        ("a/b::test", DataSet("a/b", None, "test")),
        ("a/b-1.5:c:d:e", DataSet("a/b-1.5", "c", "d", "e")),
        ("a/b:c:d:e:f", None),
        ("a", None),
        ("a/b.csv", None),
        ("/a/b", None),
        ("../b", None),
        ("some words/and more", None),
    ],
)
def test_names_of_data_sets(text: str, expected: DataSet | None) -> None:
    assert DataSet.parse(text) == expected


@pytest.mark.parametrize("name", ["rows.xls", "rows.jsonl.gz", "ids.npy", "page.HTML"])
def test_files_that_are_not_understood(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,label\na,b\n")
    with pytest.raises(DataError, match=r"not understood; known: \.txt.*\.jsonl.*\.safetensors.*CONFIG"):
        check_calibration(tmp_path / name)


def test_files_of_token_ids(tmp_path: Path) -> None:
    ids = torch.arange(60).view(10, 6)
    torch.save(ids.int(), tmp_path / "ids.pt")
    torch.save({"input_ids": ids, "attention_mask": torch.ones(10, 6)}, tmp_path / "two.pt")
    save_file({"anything": ids}, tmp_path / "ids.safetensors")
    save_file({"input_ids": ids, "labels": ids + 1}, tmp_path / "two.safetensors")
    for name in ("ids.pt", "two.pt", "ids.safetensors", "two.safetensors"):
        windows = calibration_windows(str(tmp_path / name), None, nsamples=10, seqlen=99, seed=0)
        assert torch.equal(windows, ids) and windows.dtype == torch.int64
        assert torch.equal(_windows(tmp_path / name, nsamples=3), _windows(ids, nsamples=3))
        assert not needs_tokenizer(tmp_path / name)
    assert needs_tokenizer(tmp_path / "ids.txt") and not needs_tokenizer(ids)


def test_a_model_is_pruned_with_a_file_of_ids_as_with_the_ids(tmp_path: Path) -> None:
    ids = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path / "ids.pt")
    one, other = tiny_llama(), tiny_llama()
    prune(one, "wanda", "2:4", ids)
    report = prune(other, "wanda", "2:4", tmp_path / "ids.pt")
    assert (report.windows, report.seqlen) == (5, 24)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    torch.save(torch.full((3, 5), 256), tmp_path / "ids.pt")
    with pytest.raises(DataError, match=r"ids\.pt, row 1: token id 256 is beyond the model's 256 embeddings"):
        prune(other, "wanda", "2:4", tmp_path / "ids.pt")
    # It computes its positions, so that it takes more of them than it was made for.
    torch.save(torch.randint(3, 96, (1, 513)), tmp_path / "ids.pt")
    with pytest.warns(SPPWarning, match="513, but the model was made for 512 positions"):
        assert prune(other, "wanda", "2:4", tmp_path / "ids.pt").seqlen == 513


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_bad_files_of_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ids.pt"
    bad = [
        (_Code(), "without running code"),
        ({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, "holds the tensors a, b; expected one"),
        ([1, 2], "holds a list; expected one"),
        (torch.ones(5, dtype=torch.int64), r"ids.pt is a \(5,\) int64 tensor; expected token ids"),
        (torch.ones(2, 3), r"ids.pt is a \(2, 3\) float32 tensor; expected token ids"),
    ]
    for value, match in bad:
        torch.save(value, path)
        with pytest.raises(DataError, match=match):
            _windows(path)
    assert capsys.readouterr().out == ""
    for name in ("ids.pt", "ids.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(DataError, match=name):
            _windows(tmp_path / name)


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "", " \n"]))
    with pytest.warns(SPPWarning, match="not the 1000"):
        windows, expected = _windows(path, nsamples=1000), _windows(TEXTS, nsamples=1000)
    assert windows.shape == expected.shape  # in another order, with nothing added
    with pytest.raises(DataError, match="empty"):
        _windows(["", " ", "\n"])


def test_a_missing_file_is_no_hub_id() -> None:
    for name in ("missing.txt", "data/missing.txt", "data/missing.CSV", "./data/missing", "~/corpus", "corpus"):
        with pytest.raises(DataError, match="is no file"):
            check_source(name)
