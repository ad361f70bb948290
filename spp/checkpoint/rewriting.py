"""Write a checkpoint anew with some of its weights changed: one tensor at a time in memory, never the model.

    for each shard of the base: for each tensor: read → change and check, or copy → write → hash; then the certificate

What is not changed is copied byte for byte, or converted where another dtype is asked for.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spp.certificate import CERTIFICATE_NAME, TensorRecord, certify_tensor
from spp.checkpoint.sources import input_axes
from spp.errors import ConfigError, NonFiniteError
from spp.files import CheckpointReader, dtype_name, read_json, write_json, write_tensors
from spp.files.hashes import tensor_bytes
from spp.files.header import size_of
from spp.files.reader import INDEX, require_inside
from spp.merge import DTYPES
from spp.patterns import all_finite
from spp.rules import rescue_
from spp.targets import is_projection_key

logger = logging.getLogger(__name__)

_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_NOT_CARRIED = (CERTIFICATE_NAME, "adapter_config.json", INDEX)  # the index is written apart
_LARGEST_CARRIED = 256 * 2**20  # bytes of a file beside the weights; the largest tokenizers have a tenth


class Rewriting(ABC):
    """A checkpoint that is written anew, and what its certificate will say.

    Args:
        reader: of the checkpoint.
        dtype: of all floating tensors of the output; None keeps each one's own.
        certified: keys of tensors that are among the certificate's besides the projections.

    Attributes:
        tensors, other: of the certificate, of what has been written.
    """

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype | None, certified: Collection[str]) -> None:
        self.reader = reader
        self.dtype = dtype
        self.certified = frozenset(certified)
        self.axes = input_axes(reader)
        self.tensors: dict[str, TensorRecord] = {}
        self.other: dict[str, int] = {}

    @abstractmethod
    def changed(self, key: str, weight: Tensor | None) -> Tensor | None:
        """Return the tensor to write in place of one, in the dtype of the output; None where it stays.

        Args:
            weight: what is there, of a tensor that the certificate describes; None for any other.
        """

    def write(self, directory: Path, task: str) -> None:
        """Write all shards, what lies beside them, and the index into a directory; a bar shows the task."""
        shards = self.reader.shards()
        with tqdm(total=len(self.reader.keys()), desc=task, unit="tensor", disable=None) as bar:
            for name, keys in shards.items():
                layout = {key: (self.stored(key), self.reader.shape(key)) for key in keys}
                write_tensors(directory / name, layout, lambda key: self._produce(key, bar))
        carry_files(self.reader.directory, directory, set(shards))
        self._write_index(directory)
        if self.dtype is not None:
            update_config(directory, self.dtype)

    def stored(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor of the output has."""
        found = self.reader.dtype(key)
        return self.dtype if self.dtype is not None and found in DTYPES else found

    def _produce(self, key: str, bar: Any) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of the output, and keep the certificate's record of it."""
        bar.update()
        if key not in self.certified and not is_projection_key(key, len(self.reader.shape(key))):
            yield from self._produce_other(key)
            return
        weight = self.reader.tensor(key)
        if not all_finite(weight):
            raise NonFiniteError(f"{key} of {self.reader.directory} holds NaN or infinity; mend the base first")
        result = self.changed(key, weight)
        if result is None:
            result = weight
            if self.stored(key) != weight.dtype:
                result = weight.to(self.stored(key))
                rescue_(result, weight)
        if not all_finite(result):
            raise NonFiniteError(f"{key} overflows in {result.dtype}; merge to a wider dtype")
        self.tensors[key] = certify_tensor(result, self.axes[key])
        yield from tensor_bytes(result)

    def _produce_other(self, key: str) -> Iterator[memoryview]:
        result = self.changed(key, None)
        if result is None and self.stored(key) == self.reader.dtype(key):
            pieces: list[memoryview] = [self.reader.raw(key)]
        else:
            if result is None:
                before = self.reader.tensor(key)
                result = before.to(self.stored(key))
                if all_finite(before) and not all_finite(result):
                    raise NonFiniteError(f"{key} overflows in {result.dtype}; merge to a wider dtype")
            pieces = list(tensor_bytes(result))
        self.other[key] = 0
        for piece in pieces:
            self.other[key] = zlib.crc32(piece, self.other[key])
        yield from pieces

    def _write_index(self, directory: Path) -> None:
        reader = self.reader
        if reader.index is None:
            return
        if self.dtype is None:
            shutil.copyfile(reader.directory / INDEX, directory / INDEX)
            return
        metadata = reader.index.get("metadata")
        sizes = (size_of(self.stored(key), reader.shape(key)) for key in reader)
        metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": sum(sizes)}
        write_json(directory / INDEX, {**reader.index, "metadata": metadata})


def refuse_overlap(out: Path, source: Path, what: str) -> None:
    """Raise a ConfigError where the output is, contains or lies inside a source."""
    out, source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if out.is_relative_to(source) or source.is_relative_to(out):
        where = "is" if out == source else "lies inside" if out.is_relative_to(source) else "contains"
        raise ConfigError(f"the output {out} {where} {what} {source}; choose a path outside it")


def carry_files(base: Path, directory: Path, shards: set[str]) -> None:
    """Copy what lies beside the weights: config, tokenizer, generation config, chat templates, remote code, …"""
    for folder, subfolders, names in os.walk(base):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = Path(folder).relative_to(base)
        for name in sorted(names):
            source = Path(folder, name)
            if name.startswith(".") or name in shards or name in _NOT_CARRIED or name.endswith(_WEIGHT_ENDINGS):
                continue
            require_inside(source, base)
            status = source.stat()
            if not stat.S_ISREG(status.st_mode):
                continue
            if status.st_size > _LARGEST_CARRIED:
                logger.warning("%s has %d bytes and is not carried along", source, status.st_size)
                continue
            (directory / here).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, directory / here / name)


def update_config(directory: Path, dtype: torch.dtype) -> None:
    """Have a checkpoint's config.json say which dtype its weights have."""
    path = directory / "config.json"
    if path.exists():
        config = read_json(path, "config.json")
        _set_dtype(config, dtype_name(dtype))
        config.setdefault("dtype", dtype_name(dtype))
        write_json(path, config)


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict):
            _set_dtype(value, name)
