"""Files beyond what a small number counts: 4 GiB and more in a tensor, more shards than a process may open files.

Shards by the hundred run into the limit of open files (huggingface/datasets#6877).
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spp.errors import CheckpointError
from spp.files import CheckpointReader, save_tensors, write_json
from spp.files.header import build_header
from spp.files.reader import INDEX, SINGLE
from spp.files.writer import TensorFile
from tests.helpers.forks import in_threads

OPEN_FILES = 256
SHARDS = 300


def shards(folder: Path, count: int) -> Path:
    """A checkpoint of small shards."""
    folder.mkdir()
    names = [f"model-{index:05}-of-{count:05}.safetensors" for index in range(count)]
    for index, name in enumerate(names):
        save_tensors(folder / name, {f"t{index}": torch.full((3,), float(index))})
    write_json(folder / INDEX, {"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}})
    return folder


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """As after `ulimit -n`; what is open already counts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + OPEN_FILES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="nobody tells what is open")
def test_more_shards_than_files_that_may_be_open(tmp_path: Path, few_open_files: None) -> None:
    with CheckpointReader(shards(tmp_path / "model", SHARDS)) as reader:
        mapped = {key: reader.tensor(key) for key in reader}  # all in use at once
        loaded: dict[str, torch.Tensor] = {}

        def load(index: int) -> None:
            for key in reader.keys()[index::3]:
                loaded[key] = reader.load(key)

        in_threads(load, 3)
        raw = {key: bytes(reader.raw(key)) for key in reader}
        assert len(reader._files) <= reader._most and len(reader._maps) <= reader._most
    for index in range(SHARDS):
        value = torch.full((3,), float(index))
        assert torch.equal(mapped[f"t{index}"], value) and torch.equal(loaded[f"t{index}"], value)
        assert raw[f"t{index}"] == value.numpy().tobytes()


def test_a_shard_that_is_replaced_while_it_is_closed_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spp.files.reader.most_open", lambda: 1)
    with CheckpointReader(shards(tmp_path / "model", 3)) as reader:
        assert reader.load("t0")[0] == 0
        other = tmp_path / "model" / "other"
        save_tensors(other, {"t1": torch.full((3,), 7.0)})
        os.replace(other, tmp_path / "model" / reader.file_of("t1"))
        for read in (reader.load, reader.tensor):
            with pytest.raises(CheckpointError, match="was replaced while it was read"):
                read("t1")
        assert reader.load("t2")[0] == 2


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Path]:
    """A folder whose file system keeps holes."""
    (folder := tmp_path / "large").mkdir()
    with (folder / "hole").open("wb") as file:
        file.truncate(2**33)
    if os.stat(folder / "hole").st_blocks * 512 > 2**20:
        pytest.skip("a hole takes disk here")
    (folder / "hole").unlink()
    yield folder
    shutil.rmtree(folder)


def test_a_tensor_of_more_than_4_gib_is_read_in_parts(sparse: Path) -> None:
    rows, cols = 2**17 + 3, 2**14 + 1  # 2**31 elements and some, 4 GiB of bf16
    layout = {"big": (torch.bfloat16, (rows, cols)), "after": (torch.float32, (3,))}
    head = build_header(layout)
    size = rows * cols * 2
    ends = {0: b"\x80\x3f", 2**32 - 1: b"\x01\x02\x03", size - 2: b"\x40\x40"}
    with (sparse / SINGLE).open("wb") as file:
        file.write(head)
        for at, data in ends.items():
            file.seek(len(head) + at)
            file.write(data)
        file.write(torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
    with CheckpointReader(sparse) as reader:
        assert reader.shape("big") == (rows, cols) and reader.load("after").tolist() == [1.0, 2.0, 3.0]
        for at, data in ends.items():
            found = bytearray(len(data))
            reader.read("big", at, memoryview(found))
            assert found == data, at
        mapped = reader.tensor("big")
        assert mapped[0, 0] == 1 and mapped[-1, -1] == 3 and mapped[rows // 2].count_nonzero() == 0
        assert bytes(reader.raw("big")[2**32 - 1 : 2**32 + 2]) == ends[2**32 - 1]
        del mapped
    os.truncate(sparse / SINGLE, len(head) + size + 11)
    with pytest.raises(CheckpointError, match="is truncated"):
        CheckpointReader(sparse)


def test_a_tensor_of_more_than_4_gib_is_written_in_parts(sparse: Path) -> None:
    layout = {"after": (torch.uint8, (5,)), "big": (torch.float32, (2**16, 2**14 + 1))}
    size = 4 * 2**16 * (2**14 + 1)
    ends = {0: b"\x01", 2**32 - 2: b"\x01\x02\x03\x04", size - 1: b"\x09"}
    with TensorFile(sparse / SINGLE, layout) as file:
        for at, data in ends.items():
            file.write("big", at, memoryview(data))
        file.write("after", 0, memoryview(b"after"))
        file._written["big"] = size  # the hole counts
    with CheckpointReader(sparse) as reader:
        assert bytes(reader.raw("after")) == b"after"
        for at, data in ends.items():
            found = bytearray(len(data))
            reader.read("big", at, memoryview(found))
            assert found == data, at
