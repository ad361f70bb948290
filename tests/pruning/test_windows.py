"""Calibration windows: from ids, texts and files; drawn by the seed; capped by what there is, and said so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spp.errors import DataError, SPPWarning
from spp.pruning import prune
from spp.pruning.windows import calibration_windows
from tests.helpers.models import tiny_llama, tiny_tokenizer

TEXT = "".join(f"line {i} says {i * i}.\n" for i in range(300))


def _windows(calibration: Any, tokenizer: Any = None, **options: int) -> torch.Tensor:
    values = {"nsamples": 4, "seqlen": 32, "seed": 0, **options}
    return calibration_windows(calibration, tokenizer or tiny_tokenizer(), **values)


def test_windows_of_a_text_file_are_its_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    windows = _windows(path)
    assert (windows.shape, windows.dtype) == ((4, 32), torch.int64)
    tokenizer = tiny_tokenizer()
    joined = "".join(tokenizer.decode(row) for row in windows)
    assert joined[:200] in TEXT
    assert torch.equal(windows, _windows(str(path)))
    assert not torch.equal(windows, _windows(path, seed=1))
    assert not torch.equal(windows[0], windows[1])


def test_a_text_is_used_whole_before_it_is_short(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    count = len(TEXT) // 32
    with pytest.warns(SPPWarning, match=f"gives {count} calibration windows of 32 tokens, not the 1000"):
        windows = _windows(path, nsamples=1000)
    assert windows.shape == (count, 32)
    with pytest.warns(SPPWarning, match="gives 1 calibration window of 32 tokens, not the 3 asked for"):
        _windows([TEXT[:40]], nsamples=3)


def test_documents_of_a_list_and_of_jsonl_are_the_same(tmp_path: Path) -> None:
    texts = [TEXT[i : i + 70] for i in range(0, 2000, 70)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "url": "x"}) for t in texts) + "\n\n", encoding="utf-8")
    assert torch.equal(_windows(texts), _windows(path))
    (tmp_path / "corpus.json").write_text(json.dumps([{"text": t} for t in texts]))
    assert torch.equal(_windows(texts), _windows(tmp_path / "corpus.json"))
    assert not torch.equal(_windows(texts), _windows(texts, seed=5))


def test_ids_are_taken_as_they_are_or_drawn() -> None:
    ids = torch.arange(60).view(10, 6)
    assert torch.equal(_windows(ids.int(), nsamples=10), ids)
    drawn = _windows(ids, nsamples=3)
    assert drawn.shape == (3, 6)
    assert set(drawn[:, 0].tolist()) <= set(ids[:, 0].tolist())
    assert torch.equal(drawn, _windows(ids, nsamples=3))


def test_a_window_is_no_longer_than_the_models_positions() -> None:
    model = tiny_llama(max_position_embeddings=48)
    report = prune(model, "wanda", "2:4", [TEXT], tokenizer=tiny_tokenizer(), nsamples=3)
    assert (report.windows, report.seqlen) == (3, 48)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "empty"),
        ("  \n \n", "empty"),
        ("short", "too short.*5 tokens.*seqlen=32"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        _windows(path)
    with pytest.raises(DataError, match=match):
        _windows([content])


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ('{"text": "fine"}\n{"text": \n', "line 2"),
        ('{"text": "fine"}\n\n{"txt": "no"}\n', "line 3.*txt"),
        ('["a", "b"]\n', "row 1"),
        ('[{"text": "fine"}, {"a": 1}]', "row 2"),
        ('[{"text": "fine"}', "not JSON"),
        ('{"text": 5}\n', "line 1"),
        ("\n\n", "empty"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, lines: str, match: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=match):
        _windows(path)


def test_other_bad_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        _windows(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="no file"):
        _windows("The text itself, by mistake")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00abc")
    with pytest.raises(DataError, match="UTF-8"):
        _windows(tmp_path / "binary.txt")
    for bad in (torch.ones(5, dtype=torch.int64), torch.ones(2, 3), torch.ones(0, 4, dtype=torch.int64)):
        with pytest.raises(DataError, match="token ids"):
            _windows(bad)
    with pytest.raises(DataError, match="empty"):
        _windows([])
    for bad in ({"text": "a"}, 5, [1, 2]):
        with pytest.raises(DataError, match="pass token ids"):
            _windows(bad)
