"""The merge benchmark makes its own checkpoint, merges and copies it in turns, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import spp
from spp.bench import merge
from spp.errors import ConfigError


def test_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    run = ["--shape", "tiny", "--rank", "4", "--rounds", "2", "--warmup", "0", "--directory", str(tmp_path)]
    merge.main([*run, "--out", str(out)])
    merged, copied = json.loads(out.read_text())["rows"]
    assert [merged["contender"], copied["contender"]] == [merge.MERGE, merge.COPY]
    assert merged["this_to_reference_wall"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert merged["peak_bytes"] >= merged["rest_bytes"] > 0
    for row in (merged, copied):
        assert row["checkpoint_bytes"] > 50_000
        assert row["cache"] == "warm"
        assert {"device", "dtype", "threads", "versions", "shards", "blocks", "rank"} <= set(row)
    assert "cp -r + fsync" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]  # nothing stays behind


def test_the_checkpoint_is_pruned_and_merges_with_every_mask(tmp_path: Path) -> None:
    options = merge.parse(["--shape", "tiny", "--rank", "4", "--blocks", "1", "--pattern", "1:4"], "bench")
    size = merge.make_checkpoint(options, tmp_path)
    report = spp.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(report.layers) == 7
    assert report.sparsity_report.pattern == "1:4"
    assert spp.verify(tmp_path / "base", tmp_path / "out").sparsity == 0.75
    assert size == sum(p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors")) - _headers(tmp_path)


def _headers(directory: Path) -> int:
    lengths = [int.from_bytes(p.read_bytes()[:8], "little") for p in (directory / "base").glob("*.safetensors")]
    return sum(8 + length for length in lengths)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="--shards is 0"):
        merge.parse(["--shards", "0"], "bench")
    with pytest.raises(ConfigError, match="--directory is nowhere, which is no folder"):
        merge.parse(["--directory", "nowhere"], "bench")
