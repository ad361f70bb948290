"""The format of packed checkpoints on disk: its bytes, what decodes from them, and every way of being malformed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spp.errors import CheckpointError
from spp.files import CheckpointReader, save_tensors, write_json
from spp.files.hashes import tensor_bytes
from spp.files.writer import TensorFile
from spp.masks.patterns import detect_pattern
from spp.weights.packed.disk import SUFFIXES, DenseReader, Descriptor, is_packed, is_packed_directory
from spp.weights.packed.layout import pack_tensor
from spp.weights.packed.matrix import PackedWeight
from tests.helpers.tolerances import assert_same_bits

PAIRS = torch.tensor([[1.0, 0, 0, -2, 0, 3, 4, 0], [0, 0, 0.5, 6, 7, 0, 0, 0]])  # 2:4; the last group keeps one
ANY = torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 0, 5, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 6]])


def pack(key: str, weight: Tensor, input_axis: int = -1) -> dict[str, Tensor]:
    """What is stored for a tensor."""
    axis = input_axis % weight.dim()
    kept = int(torch.count_nonzero(weight))
    found = Descriptor.of(weight.shape, axis, detect_pattern(weight, axis), kept, weight.element_size())
    packed = PackedWeight(found.layout, *pack_tensor(found.matrix(weight), found.layout, kept))
    parts = {key + suffix: part for suffix, part in zip(SUFFIXES, packed.tensors(), strict=False)}
    assert {"": (torch.int64, (5 + weight.dim(),))} | {
        name.removeprefix(key): (part.dtype, tuple(part.shape)) for name, part in parts.items()
    } == found.stored(kept, weight.dtype)
    return {key: found.tensor(), **parts}


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    return folder


def test_version_1_byte_for_byte(tmp_path: Path) -> None:
    """Written out by hand, so that no later version can lose the way to read it."""
    header = {
        "__metadata__": {"format": "pt"},
        "any": {"dtype": "I64", "shape": [7], "data_offsets": [0, 56]},
        "pairs": {"dtype": "I64", "shape": [7], "data_offsets": [56, 112]},
        "pairs_values": {"dtype": "F32", "shape": [2, 4], "data_offsets": [112, 144]},
        "any_starts": {"dtype": "I32", "shape": [2, 1], "data_offsets": [144, 152]},
        "any_values": {"dtype": "F16", "shape": [5], "data_offsets": [152, 162]},
        "any_codes": {"dtype": "U8", "shape": [2, 2], "data_offsets": [162, 166]},
        "pairs_codes": {"dtype": "U8", "shape": [2, 1], "data_offsets": [166, 168]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<7q", 1, 1, 0, 0, 0, 2, 10)  # version, input axis, any pattern, the shape
    data += struct.pack("<7q", 1, 1, 2, 4, 0, 2, 8)  # 2:4 with a mask
    data += struct.pack("<8f", 1, -2, 3, 4, 0.5, 6, 7, 0)  # the last group keeps one weight and is filled up
    data += struct.pack("<2i", 0, 4)
    data += np.array([1, 2, 3, 5, 6], np.float16).tobytes()
    data += bytes([0b11100000, 0b10000000, 0b00000000, 0b01000000])
    data += bytes([0b10010110, 0b00111100])
    expected = struct.pack("<Q", len(text)) + text + data

    tensors = {**pack("any", ANY.half()), **pack("pairs", PAIRS)}
    save(tmp_path / "ours", tensors)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == expected
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with TensorFile(tmp_path / "reversed", layout) as file:
        for name, t in reversed(tensors.items()):
            file.write_all(name, tensor_bytes(t))
    assert (tmp_path / "reversed").read_bytes() == expected
    with DenseReader(tmp_path / "ours") as reader:
        assert reader.keys() == ["any", "pairs"] and reader.shards() == {"model.safetensors": ["any", "pairs"]}
        assert_same_bits(reader.tensor("pairs"), PAIRS, "pairs")
        assert_same_bits(reader.tensor("any"), ANY.half(), "any")
        assert bytes(reader.raw("any")) == ANY.half().numpy().tobytes()


WEIGHTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "2:4": (lambda t: t * torch.tensor([1.0, 0, 0, 1]).repeat(t.shape[-1] // 4), -1),
    "2:8": (lambda t: t * torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0]).repeat(t.shape[-1] // 8), -1),
    "2:16": (lambda t: t * torch.tensor([0.0] * 14 + [1, 1]).repeat(t.shape[-1] // 16), -1),
    "1:4 of (in, out)": (lambda t: t * torch.tensor([0.0, 1, 0, 0]).repeat(t.shape[-2] // 4)[:, None], -2),
    "any": (lambda t: t * (t > 0.3), -1),
    "all zero": (lambda t: t * 0, -1),
}


@pytest.mark.parametrize("shape", [(48, 32), (3, 16, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_stored_comes_back(tmp_path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    prune, axis = WEIGHTS[name]
    weight = prune(torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype) + 0.0
    folder = save(tmp_path / "it", {**pack("w", weight, axis), "other": torch.arange(3)})
    with DenseReader(folder) as reader, CheckpointReader(folder) as stored:
        assert is_packed(stored) and not is_packed(reader)
        assert reader.keys() == ["other", "w"] and list(reader) == reader.keys()
        assert "w" in reader and "w_codes" not in reader and "w_codes" in stored
        assert (reader.shape("w"), reader.dtype("w")) == (shape, dtype)
        assert_same_bits(reader.tensor("w"), weight, name)
        assert bytes(reader.raw("w")) == weight.view(torch.uint8).numpy().tobytes()
        assert b"".join(map(bytes, reader.pieces("w"))) == bytes(reader.raw("w"))
        assert bytes(reader.raw("other")) == b"".join(reader.pieces("other")) == bytes(stored.raw("other"))
        expected = sum(len(stored.raw(key)) for key in stored if key != "other")
        assert reader.stored_bytes("w") == expected and reader.stored_bytes("other") == 24
        assert reader.packed["w"].input_axis == axis % len(shape)


def test_a_plain_checkpoint_is_read_as_it_is(tmp_path: Path) -> None:
    folder = save(tmp_path / "it", {"w": PAIRS, "w_values": PAIRS, "v_codes": PAIRS})
    with DenseReader(folder) as reader:
        assert reader.packed == {} and reader.keys() == ["v_codes", "w", "w_values"]
        assert_same_bits(reader.tensor("w"), PAIRS, "w")


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (3, 0, 8), (3, 8, 0), (0, 4, 8)], ids=str)
@pytest.mark.parametrize("axis", [-1, -2])
def test_nothing_is_packed_too(tmp_path: Path, shape: tuple[int, ...], axis: int) -> None:
    with DenseReader(save(tmp_path / "it", pack("w", torch.empty(shape), axis))) as reader:
        assert reader.tensor("w").shape == shape
        assert bytes(reader.raw("w")) == b"" == b"".join(reader.pieces("w"))


@pytest.mark.parametrize("shape", [(2**40, 5, 0), (2**20, 2**20, 0), (2**50, 0), (2**40, 0, 8), (0, 2**40, 8)], ids=str)
@pytest.mark.parametrize(("kept", "group"), [(0, 0), (2, 4)])
def test_endless_rows_of_nothing_take_no_time(tmp_path: Path, shape: tuple[int, ...], kept: int, group: int) -> None:
    axis, numbers = len(shape) - 1, (kept, group, 0, *shape)
    layout = Descriptor.read((1, axis, *numbers), "it").layout
    tensors = {
        "w": torch.tensor([1, axis, *numbers]),
        "w_values": torch.empty((layout.rows, layout.row_values) if group else (0,)),
        "w_codes": torch.empty(layout.rows, layout.row_bytes, dtype=torch.uint8),
    }
    if not group:
        tensors["w_starts"] = torch.empty(layout.rows, layout.stretches, dtype=torch.int32)
    with DenseReader(save(tmp_path / "it", tensors)) as reader:
        assert reader.tensor("w").shape == shape and bytes(reader.raw("w")) == b"" == b"".join(reader.pieces("w"))
    if not group:
        tensors["w_values"] = torch.ones(3)
        with DenseReader(save(tmp_path / "it", tensors)) as reader, pytest.raises(CheckpointError, match="3 values of"):
            reader.tensor("w")


def put(name: str, value: Any) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


def number(index: int, value: int, of: str = "pairs") -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[of][index] = value

    return change


def flip(name: str, index: int, by: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] ^= by

    return change


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "a newer version": (number(0, 2), r"format_version 2; this spp .* reads up to 1: install a newer spp"),
    "no version": (number(0, 0), "no descriptor of a packed tensor"),
    "a negative version": (number(0, -1), "no descriptor of a packed tensor"),
    "another input axis": (number(1, 2), "input axis 2"),
    "a negative input axis": (number(1, -1), "input axis -1"),
    "a pattern that is not stored": (number(2, 3), "no layout of 3:4"),
    "a group that does not divide": (number(3, 32), "no layout of 2:32"),
    "a long group": (put("pairs", torch.tensor([1, 1, 2, 16, 0, 2, 16])), r"no layout of 2:16 for \[2, 16\]"),
    "indices": (number(4, 8), "codes of width 8 are indices within groups.*never released and are not read"),
    "a negative width": (number(4, -1), "codes of width -1.*never released"),
    "indices of any pattern": (number(4, 1, "any"), "any: codes of width 1.*never released"),
    "an endless group": (number(3, 2**62), "no layout"),
    "a negative dimension": (number(5, -2), "no possible shape"),
    "an endless dimension": (number(5, 2**62), r"no possible shape|pairs_"),
    "more rows than there are": (number(5, 2**40), r"pairs_values is float32 \(2, 4\), expected"),
    "no shape": (put("pairs", torch.tensor([1, 1, 2, 4, 0])), "no possible shape"),
    "one dimension": (put("pairs", torch.tensor([1, 0, 2, 4, 0, 16])), "no possible shape"),
    "nothing": (put("pairs", torch.empty(0, dtype=torch.int64)), "no descriptor"),
    "a version alone": (put("pairs", torch.tensor([1])), "no possible shape"),
    "a long descriptor": (put("pairs", torch.ones(9, dtype=torch.int64)), "expected the descriptor"),
    "another dtype": (put("pairs", torch.ones(7)), r"is float32 \(7,\).*expected the descriptor"),
    "the dense tensor": (put("pairs", PAIRS), r"is float32 \(2, 8\).*expected the descriptor"),
    "integer values": (put("pairs_values", torch.ones(2, 4, dtype=torch.int32)), "pairs_values is int32"),
    "fewer values": (put("pairs_values", torch.ones(2, 3)), r"pairs_values is float32 \(2, 3\)"),
    "codes of another dtype": (put("pairs_codes", torch.ones(2, 1)), r"pairs_codes is float32"),
    "codes of another shape": (put("any_codes", torch.zeros(4, 1, dtype=torch.uint8)), r"any_codes is uint8 \(4, 1\)"),
    "starts that are missing": (lambda tensors: tensors.pop("any_starts"), "any_starts is missing"),
    "wide starts": (put("any_starts", torch.zeros(2, 1, dtype=torch.int64)), "any_starts is int64"),
    "a part of a part": (
        lambda t: t.update({**pack("pairs_codes", PAIRS), "pairs_codes": t["pairs"]}),
        r"pairs_codes is int64 \(7,\), expected uint8",
    ),
}
LATER: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "a group of three": (flip("pairs_codes", 0, 0b01000000), "1 groups of 4 do not have 2 values"),
    "a value without a place": (flip("any_codes", 0, 0b10000000), "the mask keeps 4 weights, but there are 5"),
    "wrong starts": (flip("any_starts", 1, 1), "starts are not where the mask says"),
    "a bit behind the end": (flip("any_codes", 3, 1), "bits are set behind the end of a row"),
}


def good() -> dict[str, Tensor]:
    return {**pack("any", ANY), **pack("pairs", PAIRS)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_malformed_checkpoint_is_not_opened(tmp_path: Path, name: str) -> None:
    change, message = FAULTS[name]
    tensors = good()
    change(tensors)
    folder = save(tmp_path / "it", tensors)
    with pytest.raises(CheckpointError, match=message):
        DenseReader(folder)


@pytest.mark.parametrize("name", LATER)
def test_places_that_are_wrong_are_met_when_they_are_read(tmp_path: Path, name: str) -> None:
    change, message = LATER[name]
    tensors = good()
    with DenseReader(save(tmp_path / "good", tensors)) as reader:
        for key in reader:
            reader.tensor(key)
    change(tensors)
    with DenseReader(save(tmp_path / "it", tensors)) as reader:
        key = "pairs" if "group of three" in name else "any"
        for read in (reader.tensor, reader.raw, reader.packed_weight):
            with pytest.raises(CheckpointError, match=f"model.safetensors: {key}: .*{message}"):
                read(key)


def test_what_was_stored_with_indices_is_refused(tmp_path: Path) -> None:
    """1:4 of 2 × 8, two bits a value: the form that N:M with few values once had."""
    tensors = {
        "w": torch.tensor([1, 1, 1, 4, 2, 2, 8]),
        "w_values": torch.ones(2, 2),
        "w_codes": torch.tensor([[0b01_11_0000]] * 2, dtype=torch.uint8),
    }
    with pytest.raises(CheckpointError, match=r"model.safetensors: w: codes of width 2 .*pack the dense checkpoint"):
        DenseReader(save(tmp_path / "it", tensors))


def test_the_config_says_a_newer_version_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "it", good())
    assert not is_packed_directory(folder)
    for version, message in ((2, "install a newer spp"), ("1", "which is none"), (None, "which is none")):
        write_json(
            folder / "config.json", {"quantization_config": {"quant_method": "spp_packed", "format_version": version}}
        )
        assert is_packed_directory(folder)
        with pytest.raises(CheckpointError, match=message):
            DenseReader(folder)
    write_json(folder / "config.json", {"quantization_config": {"quant_method": "gptq"}})
    with DenseReader(folder) as reader:
        assert set(reader.packed) == {"any", "pairs"}
    assert not is_packed_directory(folder)
