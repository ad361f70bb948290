"""Files that threads write in pieces: every byte at its place, around the cache or through it, and errors come out."""

from __future__ import annotations

import errno
import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from spp.errors import CheckpointError, OutputError
from spp.files import CheckpointReader, save_tensors, writer
from spp.files.writer import PAGE, OutputFile, TensorFile


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file goes around the cache, in pieces of a page or more."""
    monkeypatch.setattr(writer, "LARGE", 0)
    monkeypatch.setattr(writer, "_AT_ONCE", PAGE)


def placed(data: bytes, place: int) -> memoryview:
    """The bytes in memory, beginning at a place within a page."""
    whole = np.empty(len(data) + 2 * PAGE, np.uint8)
    start = -whole.ctypes.data % PAGE + place
    whole[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return whole[start : start + len(data)].data


def fill(path: Path, data: bytes, seed: int, *, aligned: bool = True) -> list[str]:
    """Write data in random pieces in a random order; return how each call of pwrite went."""
    draw, ways = random.Random(seed), []
    cuts = sorted({0, len(data), *(draw.randrange(len(data) + 1) for _ in range(12))})
    pieces = list(pairwise(cuts))
    draw.shuffle(pieces)
    file = OutputFile(path, len(data))
    real = os.pwrite
    try:
        for begin, end in pieces:
            file.put(begin, placed(data[begin:end], begin % PAGE if aligned else 8))
        file.finish()
        ways.append("around" if file._direct >= 0 else "through")
    finally:
        file.close()
    assert os.pwrite is real
    return ways


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, 5 * PAGE + 17, 700_001])
@pytest.mark.parametrize("aligned", [True, False])
def test_every_byte_at_its_place(tmp_path: Path, large: None, size: int, aligned: bool) -> None:
    for seed in range(4):
        data = random.Random(seed).randbytes(size)
        fill(tmp_path / "file", data, seed, aligned=aligned)
        assert (tmp_path / "file").read_bytes() == data


def test_ends_of_pieces_that_become_many_are_written_on_the_way(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MOST_KEPT", 2 * PAGE)
    data = random.Random(0).randbytes(60 * PAGE)
    file = OutputFile(tmp_path / "file", len(data))
    kept = []
    for begin in range(0, len(data), 3 * PAGE - 1000):
        piece = data[begin : begin + 3 * PAGE - 1000]
        file.put(begin, placed(piece, begin % PAGE))
        kept.append(len(file._ends))
    assert max(kept) <= 5
    file.finish()
    file.close()
    assert (tmp_path / "file").read_bytes() == data


def test_small_files_go_through_the_cache(tmp_path: Path) -> None:
    assert fill(tmp_path / "file", bytes(10 * PAGE), 0) == ["through"]


def test_whole_pages_go_around_the_cache_from_where_they_lie(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(0).randbytes(3 * PAGE + 100)
    file = OutputFile(tmp_path / "file", len(data))
    if file._direct < 0:
        pytest.skip("no O_DIRECT here")
    sizes: dict[int, list[int]] = {}
    real = os.pwrite

    def pwrite(handle: int, data: memoryview, at: int) -> int:
        sizes.setdefault(handle, []).append(len(data))
        return real(handle, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    direct = file._direct
    file.put(0, placed(data[:10], 0))
    file.put(10, placed(data[10:], 10))  # from the middle of the first page into the last
    file.finish()
    file.close()
    assert (tmp_path / "file").read_bytes() == data
    assert sizes.pop(direct) == [2 * PAGE] and sum(sum(found) for found in sizes.values()) == PAGE + 100


@pytest.mark.parametrize(("taken", "number"), [(0, errno.EINVAL), (PAGE, errno.EINVAL), (PAGE - 512, 0)])
def test_what_the_system_does_not_take_around_goes_through(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, taken: int, number: int
) -> None:
    data = random.Random(0).randbytes(4 * PAGE + 5)
    file = OutputFile(tmp_path / "file", len(data))
    real, calls = os.pwrite, []
    file._direct = os.dup(file._file.fileno()) if file._direct < 0 else file._direct
    direct = file._direct

    def pwrite(handle: int, data: memoryview, at: int) -> int:
        if handle != direct:
            return real(handle, data, at)
        calls.append(len(data))
        if number and len(calls) > (taken > 0):
            raise OSError(number, "refused")
        return real(file._file.fileno(), data[:taken], at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    file.put(0, placed(data, 0))
    file.finish()
    file.close()
    assert calls and (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("around", [True, False])
def test_a_full_disk_is_an_error(tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, around: bool) -> None:
    file = TensorFile(tmp_path / "file", {"a": (torch.uint8, (4 * PAGE,))})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        file.write("a", 0, placed(bytes(4 * PAGE), file.place("a", 0) if around else 3))
    file.__exit__(OutputError, None, None)


def test_threads_write_a_safetensors_file_together(tmp_path: Path, large: None) -> None:
    tensors = {f"t{i}": torch.arange(i * 900, dtype=torch.int32) * 7 for i in range(9)}
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with TensorFile(tmp_path / "model.safetensors", layout) as file:
        pieces = []
        for name, t in tensors.items():
            data = t.numpy().tobytes()
            pieces += [(name, at, data[at : at + 5000]) for at in range(0, len(data), 5000)]

        def work(mine: int) -> None:
            for name, at, data in pieces[mine::3]:
                file.write(name, at, placed(data, file.place(name, at)))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    save_tensors(tmp_path / "expected.safetensors", tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_file_that_lacks_bytes_or_gets_too_many_is_a_mistake_of_ours(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (4,))}
    with pytest.raises(AssertionError, match="a: 8 bytes"), TensorFile(tmp_path / "file", layout) as file:
        file.write("a", 0, memoryview(bytes(8)))
    with pytest.raises(AssertionError, match="a: byte 20"), TensorFile(tmp_path / "file", layout) as file:
        file.write("a", 4, memoryview(bytes(16)))


def test_pieces_are_read_without_a_mapping(tmp_path: Path) -> None:
    t = torch.arange(5000, dtype=torch.int16)
    save_tensors(tmp_path / "model.safetensors", {"t": t, "none": torch.empty(0, 3)})
    with CheckpointReader(tmp_path) as reader:
        out = bytearray(1000)
        reader.read("t", 4000, memoryview(out))
        assert bytes(out) == t.numpy().tobytes()[4000:5000]
        assert torch.equal(reader.load("t"), t) and reader.load("none").shape == (0, 3)
        assert not reader._maps
        os.truncate(tmp_path / "model.safetensors", 6000)
        with pytest.raises(CheckpointError, match="has become shorter"):
            reader.load("t")


def test_the_memory_of_a_mapped_tensor_is_given_back_and_its_values_stay(tmp_path: Path) -> None:
    t = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    save_tensors(tmp_path / "model.safetensors", {"t": t, "small": torch.ones(2)})

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text().split("model.safetensors", 1)[1]
        return int(next(line for line in text.splitlines() if line.startswith("Rss:")).split()[1])

    with CheckpointReader(tmp_path) as reader:
        reader.release("t")  # nothing is mapped yet
        mapped, small = reader.tensor("t"), reader.tensor("small")
        assert torch.equal(mapped, t)
        if Path("/proc/self/smaps").exists():
            before = resident()
            reader.release("t")
            assert resident() < before / 10
        reader.release("t")
        reader.release("small")
        assert torch.equal(mapped, t) and torch.equal(small, torch.ones(2))
