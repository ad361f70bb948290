"""The truth that lies are told about, a row of a table of lies, and the tools to tell them with: numpy and json."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spp
from spp.errors import SPPError, SPPWarning
from tests.helpers.checkpoints import shard
from tests.helpers.models import prune_nm_, tiny_llama

SINGLE, INDEX, CERTIFICATE = "model.safetensors", "model.safetensors.index.json", "sparsity.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"  # 32 × 32, 2:4, bfloat16
Q1 = "model.layers.1.self_attn.q_proj.weight"
O0 = "model.layers.0.self_attn.o_proj.weight"
UP1 = "model.layers.1.mlp.up_proj.weight"  # 64 × 32, three quarters of it zero without a pattern
NORM = "model.norm.weight"
NORM0 = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
NAN, INFINITY, DENORMAL, MINUS_ZERO = 0x7FC0, 0x7F80, 0x0001, 0x8000  # bits of bfloat16

Tell = Callable[[Path], None]
Said = type[SPPError] | type[SPPWarning] | None


@dataclass(frozen=True)
class Lie:
    """What is done to a truth, and what has to be said of it.

    Attributes:
        name: in words.
        tell: does it, to a copy of the folder.
        error: what must be raised, or warned of, once; None for what is not promised: then the call must be silent.
        says: a part of the message, the tensor's name above all; or why it is not promised.
    """

    name: str
    tell: Tell
    error: Said
    says: str

    @property
    def passes(self) -> bool:
        """Whether the call does its work all the same."""
        return self.error is None or issubclass(self.error, SPPWarning)

    def must_be_caught(self, folder: Path, call: Callable[[Path], Any]) -> None:
        """Tell it of a folder, then have a call look at that."""
        self.tell(folder)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", SPPWarning)
            if self.error is None or self.passes:
                call(folder)
                said = [str(one.message) for one in warned if issubclass(one.category, SPPWarning)]
                assert len(said) == (0 if self.error is None else 1), said
                assert all(self.says in text for text in said), said
                return
            with pytest.raises(self.error) as caught:
                call(folder)
        assert type(caught.value) is self.error, str(caught.value)
        assert self.says in str(caught.value)


def tiny_model(seed: int = 0) -> Any:
    """A bfloat16 Llama of two layers, 2:4 but for UP1, whose other tensors are all different."""
    model = tiny_llama(hidden_size=32, intermediate_size=64, num_key_value_heads=4, vocab_size=64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        prune_nm_(model)
        up = model.get_parameter(UP1)
        up.normal_(0, 0.3, generator=generator)
        up.view(-1)[up.abs().view(-1).argsort()[: 3 * up.numel() // 4]] = 0.0
    return model.to(torch.bfloat16)


def tiny_adapter(model: Any, **options: Any) -> Any:
    """The model, wrapped, at rank 4 by default, with an adapter that changes every kept weight."""
    spp.wrap(model, **{"r": 4, "seed": 1, **options})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.normal_(0, 0.3, generator=generator)
    return model


@dataclass(frozen=True)
class Made:
    """Folders that are read only: copy one before it is lied about."""

    base: Path
    shards: Path
    other: Path
    adapter: Path
    tuned: Path
    packed: Path

    @classmethod
    def into(cls, folder: Path) -> Made:
        """Make all of them."""
        made = cls(*(folder / name for name in ("base", "shards", "other", "adapter", "tuned", "packed")))
        spp.save_model(tiny_model(), made.base)
        spp.save_model(tiny_model(seed=1), made.other)
        shard(made.base, made.shards, 2)
        spp.save_adapter(tiny_adapter(tiny_model()), made.adapter)
        spp.merge_checkpoint(made.base, made.adapter, made.tuned)
        spp.export_packed(made.base, made.packed)
        return made


class Raw:
    """A safetensors file as its format says, read and written without the library.

    Attributes:
        header: {name: {dtype, shape, data_offsets}}.
        data: the bytes behind it.
    """

    def __init__(self, path: Path) -> None:
        self.path, whole = path, path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        self.header: dict[str, Any] = json.loads(whole[8 : 8 + length])
        self.data = bytearray(whole[8 + length :])

    def bits(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor's entries as unsigned integers of their size, in its shape; writing to them changes `data`."""
        entry = self.header[name]
        size = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I32": 4, "I64": 8}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        return np.frombuffer(memoryview(self.data)[begin:end], f"<u{size}").reshape(entry["shape"])

    def put(self, name: str, dtype: str, array: np.ndarray[Any, Any] | None) -> None:
        """Store an array under a name; None takes the tensor out."""
        tensors = {k: (v["dtype"], self.bits(k).copy()) for k, v in self.header.items() if k != "__metadata__"}
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = dtype, array
        self.header = {"__metadata__": self.header.get("__metadata__", {"format": "pt"})}
        self.data = bytearray()
        for key, (code, values) in tensors.items():
            offsets = [len(self.data), len(self.data) + values.nbytes]
            self.header[key] = {"dtype": code, "shape": list(values.shape), "data_offsets": offsets}
            self.data += values.tobytes()

    def save(self) -> None:
        """Write the file."""
        text = json.dumps(self.header).encode()
        self.path.write_bytes(struct.pack("<Q", len(text)) + text + self.data)


def bits(name: str, change: Callable[[np.ndarray[Any, Any]], None], file: str = SINGLE) -> Tell:
    """Change a tensor's entries, given as integers, in place."""

    def tell(folder: Path) -> None:
        raw = Raw(folder / file)
        change(raw.bits(name))
        raw.save()

    return tell


def kept(at: int, value: int | None = None, flip: int = 0) -> Callable[[np.ndarray[Any, Any]], None]:
    """Replace the `at`-th kept weight, or flip bits of it."""

    def change(entries: np.ndarray[Any, Any]) -> None:
        place = tuple(np.argwhere(entries & 0x7FFF)[at])
        entries[place] = entries[place] ^ flip if value is None else value

    return change


def zero(at: int, value: int) -> Callable[[np.ndarray[Any, Any]], None]:
    """Replace the `at`-th zero."""

    def change(entries: np.ndarray[Any, Any]) -> None:
        entries[tuple(np.argwhere((entries & 0x7FFF) == 0)[at])] = value

    return change


def move_in_group(entries: np.ndarray[Any, Any]) -> None:
    """Exchange a kept weight with a zero of the same group of four: as many zeros, the same pattern."""
    group = entries[3, 8:12]
    first, last = np.flatnonzero(group)[0], np.flatnonzero(group == 0)[0]
    group[[first, last]] = group[[last, first]]


def exchange(one: str, other: str, part: str = "data_offsets", file: str = SINGLE) -> Tell:
    """Exchange a part of the header's entries of two tensors: where they lie, by default."""

    def tell(folder: Path) -> None:
        raw = Raw(folder / file)
        first, second = raw.header[one], raw.header[other]
        first[part], second[part] = second[part], first[part]
        raw.save()

    return tell


def relabel(name: str, file: str = SINGLE, **fields: Any) -> Tell:
    """Have the header say something else of a tensor."""

    def tell(folder: Path) -> None:
        raw = Raw(folder / file)
        raw.header[name].update(fields)
        raw.save()

    return tell


def rename(name: str, new: str, file: str = SINGLE) -> Tell:
    """Give a tensor another name."""

    def tell(folder: Path) -> None:
        raw = Raw(folder / file)
        raw.header[new] = raw.header.pop(name)
        raw.save()

    return tell


def put(name: str, dtype: str, array: np.ndarray[Any, Any] | None, file: str = SINGLE) -> Tell:
    """Store another tensor under a name, or none."""

    def tell(folder: Path) -> None:
        raw = Raw(folder / file)
        raw.put(name, dtype, array)
        raw.save()

    return tell


def widened(folder: Path) -> None:
    """Convert everything to float32, value for value."""
    raw = Raw(folder / SINGLE)
    for name in [k for k in raw.header if k != "__metadata__"]:
        raw.put(name, "F32", raw.bits(name).astype(np.uint32) << 16)
    raw.save()


def quantized(*layers: int) -> Tell:
    """Store the projections of some layers as GPTQ does."""

    def tell(folder: Path) -> None:
        raw = Raw(folder / SINGLE)
        for name in [k for k in raw.header if k.endswith("_proj.weight") and int(k.split(".")[2]) in layers]:
            raw.put(name, "", None)
            for part, dtype, of in (("qweight", "I32", np.uint32), ("scales", "BF16", np.uint16)):
                raw.put(name.replace("weight", part), dtype, np.ones((4, 32), of))
            raw.put(name.replace("weight", "g_idx"), "I32", np.zeros(32, np.uint32))
        raw.save()

    return tell


def coded(name: str) -> Tell:
    """Store a projection as bitsandbytes does: codes under the weight's own name."""

    def tell(folder: Path) -> None:
        raw = Raw(folder / SINGLE)
        raw.put(name, "U8", np.ones((512, 1), np.uint8))
        raw.put(f"{name}.absmax", "F32", np.ones(16, np.uint32))
        raw.save()

    return tell


def emptied(folder: Path) -> None:
    """Leave no tensor in the file."""
    raw = Raw(folder / SINGLE)
    raw.header, raw.data = {}, bytearray()
    raw.save()


def shortened(file: str = SINGLE) -> Tell:
    """Cut the end off a file."""

    def tell(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:-1])

    return tell


def edit(change: Callable[[dict[str, Any]], Any], file: str = CERTIFICATE) -> Tell:
    """Change a JSON file."""

    def tell(folder: Path) -> None:
        path = folder / file
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return tell


def then(*tells: Tell) -> Tell:
    """Tell several."""

    def tell(folder: Path) -> None:
        for one in tells:
            one(folder)

    return tell


def copied(source: Path, into: Path) -> Path:
    """Copy a folder, so that it may be lied about."""
    return Path(shutil.copytree(source, into))
