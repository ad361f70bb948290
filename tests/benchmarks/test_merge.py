"""The merge benchmark makes its own checkpoint, merges and copies it in turns, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import spp
from benchmarks import merge
from benchmarks.merge import cached_share
from spp.errors import ConfigError


@pytest.mark.slow
def test_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    run = ["--shape", "tiny", "--rank", "4", "--rounds", "2", "--warmup", "0", "--directory", str(tmp_path)]
    merge.main([*run, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == [merge.COPY, merge.MERGE, merge.CRC, merge.VERIFY]
    assert [row["reference"] for row in rows] == [merge.COPY, merge.COPY, merge.CRC, merge.CRC]
    for yardstick in rows[::2]:
        assert yardstick["this_to_reference_wall"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert rows[1]["peak_bytes"] >= rows[1]["rest_bytes"] > 0
    assert rows[1]["memory_bound_bytes"] == 3 * 64 * 256 * 2 + 300_000_000  # the embedding is the largest
    for row in rows:
        assert row["checkpoint_bytes"] > 50_000
        assert row["cache"] in ("warm", "partly warm", "unknown")
        assert {"device", "dtype", "threads", "versions", "shards", "blocks", "rank", "cached_share"} <= set(row)
    printed = capsys.readouterr().out
    assert "cp -r + fsync" in printed and "zlib.crc32" in printed and "cache" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]  # nothing stays behind


def test_the_checkpoint_is_pruned_and_merges_with_every_mask(tmp_path: Path) -> None:
    options = merge.parse(["--shape", "tiny", "--rank", "4", "--blocks", "1", "--pattern", "1:4"])
    size = merge.make_checkpoint(options, tmp_path)
    report = spp.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(report.layers) == 7
    assert report.sparsity_report.pattern == "1:4"
    assert spp.verify(tmp_path / "base", tmp_path / "out").sparsity == 0.75
    assert size == sum(p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors")) - _headers(tmp_path)


def _headers(directory: Path) -> int:
    lengths = [int.from_bytes(p.read_bytes()[:8], "little") for p in (directory / "base").glob("*.safetensors")]
    return sum(8 + length for length in lengths)


def test_the_share_of_files_in_the_cache_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    (tmp_path / "empty").touch()
    share = cached_share([path, tmp_path / "empty"])
    assert share is None or share == 1.0  # written just now
    assert cached_share([]) is None


def test_every_byte_is_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(2500))
    seen: list[int] = []
    monkeypatch.setattr(merge, "_PIECE", 1000)
    monkeypatch.setattr(merge.zlib, "crc32", lambda piece: seen.append(len(piece)))
    merge.checksum(tmp_path)
    assert sorted(seen) == [500, 500, 1000, 1000, 1000, 1000]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="--shards is 0"):
        merge.parse(["--shards", "0"])
    with pytest.raises(ConfigError, match="--directory is nowhere, which is no folder"):
        merge.parse(["--directory", "nowhere"])
