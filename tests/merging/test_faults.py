"""Bad disks, bad files and other writers around a merge and a verification: our own errors, and nothing half done."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import spp
from spp.certifying.verify import verify
from spp.errors import AdapterError, CheckpointError, OutputError, SPPError, SPPWarning
from spp.files import read_json, save_tensors, write_json, writer
from spp.merging.disk import merge_checkpoint
from tests.files.test_atomic import remount_read_only, small_disk  # noqa: F401  a fixture
from tests.helpers.checkpoints import Q0, contents, make_sources, shard, tensors_of, wrapped_model
from tests.helpers.forks import side_by_side
from tests.merging.kills import WORKS

INDEX = "model.safetensors.index.json"
FIRST, LAST = (f"model-{i:05}-of-00003.safetensors" for i in (1, 3))


@pytest.fixture(params=["through the cache", "around it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How files are written."""
    if request.param == "around it":
        monkeypatch.setattr(writer, "LARGE", 0)
        monkeypatch.setattr(writer, "_AT_ONCE", writer.PAGE)
    return str(request.param)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("made") / "sources", "packed", "state")


def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(path: Path, text: str, data: bytes, length: int | None = None) -> None:
    encoded = text.encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


def _length(base: Path) -> None:
    header, data = header_of(base / LAST)
    put_header(base / LAST, json.dumps(header), data, 2**63)


def _twice(base: Path) -> None:
    header, data = header_of(base / LAST)
    name, entry = next(item for item in header.items() if item[0] != "__metadata__")
    text = json.dumps(header)
    put_header(base / LAST, f"{text[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}", data)


def _entries(change: Callable[[dict[str, dict[str, list[int]]]], None]) -> Callable[[Path], None]:
    def apply(base: Path) -> None:
        header, data = header_of(base / LAST)
        change({name: entry for name, entry in header.items() if name != "__metadata__"})  # type: ignore[misc]
        put_header(base / LAST, json.dumps(header), data)

    return apply


def _overlap(entries: dict[str, dict[str, list[int]]]) -> None:
    one, two = sorted(entries.values(), key=lambda entry: entry["data_offsets"])[:2]
    length = two["data_offsets"][1] - two["data_offsets"][0]
    two["data_offsets"] = [one["data_offsets"][0], one["data_offsets"][0] + length]


def _other_dtype(entries: dict[str, dict[str, list[int]]]) -> None:
    for entry in entries.values():
        entry["dtype"] = "F16"  # type: ignore[assignment]


def _point(name: str) -> Callable[[Path], None]:
    def apply(base: Path) -> None:
        (base.parent / "outside.safetensors").write_bytes((base / FIRST).read_bytes())
        index = read_json(base / INDEX, "index")
        index["weight_map"] = {k: name.format(base=base) if v == FIRST else v for k, v in index["weight_map"].items()}
        write_json(base / INDEX, index)

    return apply


def _link(base: Path) -> None:
    (base / FIRST).rename(base.parent / "outside.safetensors")
    (base / FIRST).symlink_to(base.parent / "outside.safetensors")
    (base / ".git").mkdir()  # a clone, whose links are somebody else's


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda base: (base / LAST).unlink(), "is missing"),
    "a shard is cut": (lambda base: os.truncate(base / LAST, 9000), "truncated"),
    "a shard is empty": (lambda base: os.truncate(base / LAST, 0), "truncated"),
    "a header of 2**63 bytes": (_length, "claims a header of 9223372036854775808"),
    "a key twice": (_twice, "occurs twice"),
    "tensors that overlap": (_entries(_overlap), "overlaps|leaves a gap"),
    "a dtype of another size": (_entries(_other_dtype), "takes .* bytes"),
    "the index leads out": (_point("../outside.safetensors"), "no plain file name"),
    "the index leads out by an absolute path": (_point("{base}/../outside.safetensors"), "no plain file name"),
    "a link leads out": (_link, "symbolic link"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_base(base: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    pieces = shard(base, tmp_path / "shards", 3)
    change, message = FAULTS[name]
    change(pieces)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoint(pieces, adapter, tmp_path / "out")
    calls: list[Callable[[], object]] = [lambda: verify(pieces), lambda: verify(base, pieces)]
    calls += [lambda: verify(pieces, base), lambda: spp.export_packed(pieces, tmp_path / "out")]
    calls += [lambda: spp.sparsity(pieces), lambda: spp.load_packed(pieces)]
    for call in calls:
        with pytest.raises(CheckpointError, match=message):
            call()
    assert sorted(os.listdir(tmp_path)) == before


def test_whole_numbers_where_weights_should_be(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = tensors_of(base)
    save_tensors(base / "model.safetensors", {**tensors, Q0: (tensors[Q0] * 100).to(torch.int32)})
    path = Q0.removesuffix(".weight")
    said = rf"base: the zeros of 1 of its 14 projections .*: 1 stored as weight \(int32\): {path}\. It is quantized or"
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoint(base, adapter, tmp_path / "out")
    with pytest.raises(SPPError, match=Q0):
        verify(base)
    head = tensors["lm_head.weight"]  # no projection by its name: the adapter's own check finds it
    save_tensors(base / "model.safetensors", {**tensors, "lm_head.weight": (head * 100).to(torch.int32)})
    with pytest.warns(SPPWarning, match="dense"):
        of_head = wrapped_model(target_modules=["lm_head"])
    spp.save_adapter(of_head, tmp_path / "of_head")
    said = r"lm_head: lm_head\.weight is int32 \(\d+, \d+\); expected a floating-point matrix"
    with pytest.raises(AdapterError, match=said):
        merge_checkpoint(base, tmp_path / "of_head", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapters_file_that_is_a_link_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    merge_checkpoint(base, adapter, tmp_path / "of-links")
    (adapter / ".git").mkdir()
    with pytest.raises(CheckpointError, match="symbolic link"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_every_flipped_bit_is_caught_by_the_certificate(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoint(base, adapter, out)
    path = out / "model.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    for number, at in enumerate(range(8 + length, len(good), len(good) // 25)):
        data = bytearray(good)
        data[at] ^= 1 << number % 8
        path.write_bytes(data)
        with pytest.raises(SPPError):
            verify(out)
    path.write_bytes(good)
    verify(out)


# The place to write to.


def test_a_full_disk(base: Path, adapter: Path, small_disk: Path, way: str) -> None:  # noqa: F811
    (small_disk / "old").mkdir()
    (small_disk / "old" / "config.json").write_text('{"model_type": "old"}')
    (small_disk / "fill").write_bytes(bytes(600_000))
    for target in ("out", "old"):
        with pytest.raises(OutputError, match="disk is full"):
            merge_checkpoint(base, adapter, small_disk / target, overwrite=True)
        assert sorted(os.listdir(small_disk)) == ["fill", "old"]
        assert contents(small_disk / "old") == {"config.json": b'{"model_type": "old"}'}
    (small_disk / "fill").unlink()
    merge_checkpoint(base, adapter, small_disk / "old", overwrite=True)
    assert verify(small_disk / "old").pattern == "2:4"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("work", ["merge", "save", "export packed", "export dense", "convert"])
def test_a_file_larger_than_allowed(sources: Path, tmp_path: Path, work: str) -> None:
    out = tmp_path / "out"
    WORKS[work].old(sources, out)
    before = contents(out)
    with largest_file(20_000), pytest.raises(OutputError, match="ulimit -f"):
        WORKS[work].run(sources, out)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_larger_than_allowed_around_the_cache(base: Path, adapter: Path, tmp_path: Path, way: str) -> None:
    with largest_file(100_000), pytest.raises(OutputError, match="ulimit -f"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_disk_that_cannot_be_written(base: Path, adapter: Path, small_disk: Path) -> None:  # noqa: F811
    remount_read_only(small_disk)
    for dry_run in (False, True):
        if dry_run and os.access(small_disk, os.W_OK):
            continue  # the system does not tell
        with pytest.raises(OutputError, match=r"read-only|permission"):
            merge_checkpoint(base, adapter, small_disk / "out", dry_run=dry_run)


def test_a_folder_that_may_not_be_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    for dry_run in (False, True):
        with pytest.raises(OutputError, match="permission is denied"):
            merge_checkpoint(base, adapter, folder / "out", dry_run=dry_run)


@pytest.mark.slow
def test_processes_that_write_the_same_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    second, out = spp.save_adapter(wrapped_model(scale=0.2), tmp_path / "second"), tmp_path / "out"

    code = (
        "import spp, torch\n"
        "torch.set_num_threads(2)\n"
        "def work(target, adapter):\n"
        f"    for _ in range(6): spp.merge_checkpoint({str(base)!r}, adapter, target, overwrite=True)\n"
    )
    side_by_side(code, out, adapter, second)
    states = []
    for number, one in enumerate((adapter, second)):
        merge_checkpoint(base, one, tmp_path / str(number))
        states.append(contents(tmp_path / str(number)))
    assert contents(out) in states and verify(base, out) == verify(out)
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "adapter", "base", "out", "second"]
