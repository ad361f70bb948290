"""The reader hands out what was written, and meets every kind of broken or hostile file with CheckpointError."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spp.errors import CheckpointError, OutputError
from spp.files import CheckpointReader, read_json, save_tensors, write_json, write_tensors
from spp.files.reader import INDEX, SINGLE
from tests.merging.fuzzing import EDITS, edited

TENSORS = {
    "b": torch.arange(15).reshape(3, 5).bfloat16(),
    "a": torch.linspace(-1, 1, 7),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "bool": torch.tensor([True, False, True]),
    "half": torch.tensor([1.5, -0.0]).half(),
    "double": torch.tensor([[1e300]], dtype=torch.float64),
    "int8": torch.arange(-2, 3, dtype=torch.int8),
    "int16": torch.arange(3, dtype=torch.int16),
    "int32": torch.arange(3, dtype=torch.int32),
    "uint8": torch.arange(3, dtype=torch.uint8),
    "uint16": torch.arange(3).to(torch.uint16),
    "uint32": torch.arange(3).to(torch.uint32),
    "uint64": torch.arange(3).to(torch.uint64),
    "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
    "small": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "smaller": torch.tensor([1.0, -2.0]).to(torch.float8_e5m2),
    "ключ": torch.ones(2, 3).t(),
}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(*bits))


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with a header of one's own; `header` is an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {key: reader.tensor(key).clone() for key in reader}


def write_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}": torch.full((2, 3), float(i)) for i in range(4)}
    names = {f"layer.{i}": f"model-0000{i % 2 + 1}-of-00002.safetensors" for i in range(4)}
    for name in set(names.values()):
        save_tensors(folder / name, {k: t for k, t in tensors.items() if names[k] == name})
    write_json(folder / INDEX, {"metadata": {"total_size": 96}, "weight_map": names})
    return tensors


def test_the_comparison_can_fail() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2)) and not same_bits(torch.zeros(1), torch.zeros(1).int())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save_tensors(tmp_path / SINGLE, TENSORS)
    with CheckpointReader(tmp_path) as reader:
        assert reader.keys() == sorted(TENSORS) == list(reader) and "a" in reader and "x" not in reader
        for key, tensor in TENSORS.items():
            assert (reader.shape(key), reader.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
            assert same_bits(reader.tensor(key), tensor)
            assert bytes(reader.raw(key)) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert reader.file_of(key) == SINGLE
        assert set(reader.shards()[SINGLE]) == set(TENSORS)
        for ask in (reader.shape, reader.dtype, reader.file_of, reader.raw, reader.tensor):
            with pytest.raises(CheckpointError, match="no tensor 'x'"):
                ask("x")
        kept = reader.tensor("a")
    assert same_bits(kept, TENSORS["a"])  # a tensor outlives its reader
    kept += 1
    assert same_bits(read_all(tmp_path)["a"], TENSORS["a"])  # writing to it does not reach the file


def test_files_are_those_of_the_reference_implementation_byte_for_byte(tmp_path: Path) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in TENSORS.items()}
    save_tensors(tmp_path / "ours", TENSORS)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    save_tensors(tmp_path / "again", dict(reversed(TENSORS.items())))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "again").read_bytes()
    assert oct((tmp_path / "ours").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    data = b"\x01" + struct.pack("<2f", 1.5, -2.5)
    (tmp_path / SINGLE).write_bytes(safetensors_bytes({"f": entry([2], 1, 9), "b": entry([1], 0, 1, "U8")}, data))
    assert read_all(tmp_path)["f"].tolist() == [1.5, -2.5]


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    found = read_all(tmp_path)
    assert found.keys() == tensors.keys() and all(same_bits(found[k], tensors[k]) for k in tensors)
    with CheckpointReader(tmp_path) as reader:
        assert reader.shards() == {
            "model-00001-of-00002.safetensors": ["layer.0", "layer.2"],
            "model-00002-of-00002.safetensors": ["layer.1", "layer.3"],
        }
        assert reader.index is not None and reader.index["metadata"] == {"total_size": 96}
    with CheckpointReader(tmp_path, file="model-00002-of-00002.safetensors") as reader:
        assert reader.keys() == ["layer.1", "layer.3"]


GOOD = entry([2], 0, 8)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "header beyond the end": (safetensors_bytes({"a": GOOD}, b"", 10_000), "claims a header of 10000 bytes"),
    "header of 2**63": (safetensors_bytes({"a": GOOD}, b"\0" * 8, 2**63), "claims a header of 9223372036854775808"),
    "header of 2**64 - 1": (safetensors_bytes({"a": GOOD}, b"\0" * 8, 2**64 - 1), "claims a header"),
    "no JSON": (safetensors_bytes(b"{"), "not valid JSON"),
    "no UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "nested without end": (safetensors_bytes(b'{"a":' * 20_000), "not valid JSON"),
    "an endless number": (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON|exactly dtype"),
    "a list": (safetensors_bytes([GOOD]), "JSON list"),
    "duplicate keys": (
        safetensors_bytes(f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}'.encode(), b"\0" * 8),
        "'a' occurs twice",
    ),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"n": 1}}), "must map text to text"),
    "entry is no object": (safetensors_bytes({"a": [1]}), "exactly dtype, shape and data_offsets"),
    "entry lacks a field": (safetensors_bytes({"a": {"dtype": "F32", "shape": []}}), "exactly dtype"),
    "unknown dtype": (safetensors_bytes({"a": entry([2], 0, 8, "F31")}, b"\0" * 8), "'F31'; known are"),
    "dtype of another size": (safetensors_bytes({"a": entry([2], 0, 8, "F16")}, b"\0" * 8), "takes 4 bytes"),
    "negative shape": (safetensors_bytes({"a": entry([-1, -2], 0, 8)}, b"\0" * 8), "no possible shape"),
    "shape of text": (safetensors_bytes({"a": entry(["2"], 0, 8)}, b"\0" * 8), "no possible shape"),
    "shape of floats": (safetensors_bytes({"a": entry([2.0], 0, 8)}, b"\0" * 8), "no possible shape"),
    "shape of bools": (safetensors_bytes({"a": entry([True], 0, 4)}, b"\0" * 4), "no possible shape"),
    "shape that overflows": (safetensors_bytes({"a": entry([2**62, 4], 0, 0)}), "no possible shape"),
    "empty shape that overflows": (safetensors_bytes({"a": entry([0, 2**62, 2**62], 0, 0)}), "no possible shape"),
    "too many dimensions": (safetensors_bytes({"a": entry([1] * 65, 0, 4)}, b"\0" * 4), "no possible shape"),
    "offsets backwards": (safetensors_bytes({"a": entry([2], 8, 0)}, b"\0" * 8), "have -8"),
    "offsets of one": (
        safetensors_bytes({"a": {**GOOD, "data_offsets": [0]}}, b"\0" * 8),
        "no possible data_offsets",
    ),
    "offsets beyond the end": (safetensors_bytes({"a": GOOD, "b": entry([2], 8, 16)}, b"\0" * 8), "truncated"),
    "a byte short": (safetensors_bytes({"a": GOOD}, b"\0" * 7), "truncated"),
    "a byte more": (safetensors_bytes({"a": GOOD}, b"\0" * 9), "bytes follow the last tensor"),
    "overlapping": (safetensors_bytes({"a": GOOD, "b": entry([2], 4, 12)}, b"\0" * 12), "'b' overlaps 'a'"),
    "the same place": (safetensors_bytes({"a": GOOD, "b": GOOD}, b"\0" * 8), "'b' overlaps 'a'"),
    "a gap": (safetensors_bytes({"a": GOOD, "b": entry([2], 12, 20)}, b"\0" * 20), "leaves a gap after 'a'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert str(tmp_path / SINGLE) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def _set(**names: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].update({k.replace("_", "."): v for k, v in names.items()})
        (folder / INDEX).write_text(json.dumps(index))

    return change


def _link(to: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shard = folder / "model-00001-of-00002.safetensors"
        shard.rename(folder.parent / "outside.safetensors")
        shard.symlink_to(to.format(folder=folder))
        (folder / ".git").mkdir()  # a clone, whose links are somebody else's

    return change


def _replace(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


INDEX_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "above": (_set(layer_0="../outside.safetensors"), "no plain file name"),
    "absolute": (_set(layer_0="/etc/passwd"), "no plain file name"),
    "below": (_set(layer_0="sub/model.safetensors"), "no plain file name"),
    "backslash": (_set(layer_0="..\\outside.safetensors"), "no plain file name"),
    "dots": (_set(layer_0=".."), "no plain file name"),
    "nothing": (_set(layer_0=""), "no plain file name"),
    "nul": (_set(layer_0="a\0.safetensors"), "no plain file name"),
    "pickle": (_set(layer_0="pytorch_model.bin"), "no safetensors file"),
    "a number": (_set(layer_0=3), "must map the names"),
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "is missing"),
    "missing tensor": (_set(layer_9="model-00001-of-00002.safetensors"), r"do not hold: layer\.9"),
    "tensor in another shard": (_set(layer_0="model-00002-of-00002.safetensors"), r"do not hold: layer\.0"),
    "link out, relative": (_link("../outside.safetensors"), "symbolic link"),
    "link out, absolute": (_link("{folder}/../outside.safetensors"), "symbolic link"),
    "link in a circle": (_link("model-00001-of-00002.safetensors"), "missing|cannot be read|symbolic link"),
    "a folder": (_link("."), "symbolic link|regular file"),
    "no JSON": (_replace(INDEX, b"{"), "not valid JSON"),
    "a list": (_replace(INDEX, b"[]"), "JSON list"),
    "no map": (_replace(INDEX, b"{}"), "weight_map must map"),
    "an empty map": (_replace(INDEX, b'{"weight_map": {}}'), "weight_map must map"),
    "a key twice": (_replace(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), "occurs twice"),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_an_index_that_lies(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_shards(folder)
    assert len(read_all(folder)) == 4
    change, message = INDEX_FAULTS[name]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder)


def test_a_tensor_in_two_shards_is_refused_and_one_that_the_index_forgot_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    save_tensors(shard, {"layer.0": torch.ones(1), "layer.2": torch.ones(1), "forgotten": torch.ones(1)})
    assert "forgotten" in read_all(tmp_path)
    save_tensors(shard, {"layer.0": torch.ones(1), "layer.2": torch.ones(1), "layer.1": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"'layer\.1' is in model-00001-of-00002\.safetensors too"):
        CheckpointReader(tmp_path)


def test_links_inside_the_folder_and_into_the_hub_cache_are_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_tensors(blobs / "abcd", {"a": torch.ones(1)})
    (snapshot / SINGLE).symlink_to("../../blobs/abcd")
    assert list(read_all(snapshot)) == ["a"]
    (tmp_path / "link").symlink_to(snapshot)
    assert list(read_all(tmp_path / "link")) == ["a"]
    save_tensors(snapshot / "real", {"b": torch.ones(1)})
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("real")
    assert list(read_all(snapshot)) == ["b"]
    (tmp_path / "models--c--d" / "blobs").mkdir(parents=True)
    save_tensors(tmp_path / "models--c--d" / "blobs" / "abcd", {"a": torch.ones(1)})
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../../models--c--d/blobs/abcd")  # another model's blobs
    with pytest.raises(CheckpointError, match="symbolic link"):
        CheckpointReader(snapshot)


def test_what_is_no_checkpoint_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is no directory"):
        CheckpointReader(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"neither .* it holds notes\.txt"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickled checkpoints are not read"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        CheckpointReader(tmp_path, file="adapter_model.safetensors")
    for name in ("../a.safetensors", "/a.safetensors"):
        with pytest.raises(CheckpointError, match="no plain file name"):
            CheckpointReader(tmp_path, file=name)
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointReader(tmp_path, file="pipe.safetensors")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="float8_e4m3fnuz"):
        save_tensors(tmp_path / SINGLE, {"a": torch.zeros(2).to(torch.float8_e4m3fnuz)})
    with pytest.raises(OutputError, match="there is a folder"):
        save_tensors(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(AssertionError, match="a: 4 bytes"):
        write_tensors(tmp_path / SINGLE, {"a": (torch.float32, (2,))}, lambda name: [memoryview(b"1234")])
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "no" / "where.json", {})


def test_json_is_stable_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, "é"], "a": None})
    assert path.read_bytes() == '{\n  "a": null,\n  "b": [\n    1,\n    "é"\n  ]\n}\n'.encode()
    assert read_json(path, "it") == {"a": None, "b": [1, "é"]}
    for data in (b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="the notes"):
            read_json(path, "the notes")
    for bad in (tmp_path / "none.json", tmp_path):
        with pytest.raises(CheckpointError, match="the notes"):
            read_json(bad, "the notes")


# Fuzzing: a valid file with anything done to it is either read in full or met with CheckpointError.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
SIZES = st.integers(-2, 20) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64]) | JSON
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "U8", "F8_E4M3", "C64", "F4"]) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRIES | JSON, max_size=3) | JSON


def fuzz(folder: Path, count: int) -> None:
    save_tensors(folder / SINGLE, {k: TENSORS[k] for k in ("a", "b", "bool", "empty")})
    good = (folder / SINGLE).read_bytes()
    maps = st.dictionaries(st.text(max_size=4), st.sampled_from(["m.safetensors", "..", "/", SINGLE]) | JSON) | JSON
    files = st.one_of(
        EDITS.map(lambda edits: (SINGLE, edited(good, edits))),
        st.tuples(HEADERS, st.binary(max_size=32)).map(lambda p: (SINGLE, safetensors_bytes(*p))),
        st.binary(max_size=64).map(lambda data: (SINGLE, data)),
        st.fixed_dictionaries({"weight_map": maps}).map(lambda v: (INDEX, json.dumps(v).encode())),
        JSON.map(lambda v: (INDEX, json.dumps(v).encode())),
    )

    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(files)
    def check(file: tuple[str, bytes]) -> None:
        for name in (SINGLE, INDEX):
            (folder / name).unlink(missing_ok=True)
        save_tensors(folder / "m.safetensors", {"a": TENSORS["a"]})
        (folder / file[0]).write_bytes(file[1])
        try:
            with CheckpointReader(folder) as reader:
                for key in reader:
                    assert tuple(reader.tensor(key).shape) == reader.shape(key)
                    assert len(reader.raw(key)) == reader.tensor(key).nbytes
        except CheckpointError:
            pass

    check()


@pytest.mark.slow
def test_fuzz(tmp_path: Path) -> None:
    fuzz(tmp_path, 300)


@pytest.mark.stress
def test_fuzz_at_length(tmp_path: Path) -> None:
    fuzz(tmp_path, 10_000)
