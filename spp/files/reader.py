"""CheckpointReader: a directory of safetensors files, every claim of which is checked before a tensor is handed out."""

from __future__ import annotations

import mmap
import os
import stat
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spp.errors import CheckpointError
from spp.files.formats import other_weights, pickled
from spp.files.header import TensorEntry, read_header
from spp.files.jsonio import read_json
from spp.files.leftovers import recover
from spp.files.places import check_link
from spp.masks.patterns import as_array

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PIECE = 1 << 20  # bytes that are read at a time
_with_descriptor: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # maps that are in use and keep a file open
_USUAL_LIMIT = 512  # files that a process may open, where the system does not say


def most_open() -> int:
    """Return how many files a reader keeps open, and how many mapped: an eighth of what the process may open."""
    limit = _USUAL_LIMIT
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(max(limit, 64), 2**16) // 8 if limit > 0 else _USUAL_LIMIT  # a negative one is no limit


class CheckpointReader:
    """Read tensors of model.safetensors or of the shards of its index; several threads may.

    Args:
        directory: the folder; of its links spp.files.places.check_link says which are read.
        file: read this one safetensors file of the folder instead, such as "adapter_model.safetensors".

    Raises:
        CheckpointError: a file is missing, truncated, malformed, or a link that is not read.

    Example:
        >>> with CheckpointReader("checkpoint") as reader:                 # doctest: +SKIP
        ...     weight = reader.tensor("model.layers.0.mlp.up_proj.weight")
    """

    def __init__(self, directory: str | os.PathLike[str], *, file: str | None = None) -> None:
        self.directory = Path(directory)
        self._most = most_open()
        self._identity: dict[str, tuple[int, ...]] = {}  # of every file
        self._files: dict[str, BinaryIO] = {}  # those that are open, the one used last at the end
        self._users: dict[str, int] = {}  # of those that are being read
        weakref.finalize(self, _close_all, self._files)  # of a reader that lives as long as what it is read for
        self._maps: dict[str, mmap.mmap] = {}  # of the files of which tensors were asked for, likewise
        self._lock = threading.Lock()
        self._entries: dict[str, TensorEntry] = {}
        self._file_of: dict[str, str] = {}
        self.index: dict[str, object] | None = None
        if not self.directory.exists():
            recover(self.directory)
        if not self.directory.is_dir():
            state = "is no directory" if self.directory.exists() else "does not exist"
            raise CheckpointError(f"the checkpoint {self.directory} {state}")
        try:
            self._open(file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def close(self) -> None:
        """Let go of the files; tensors that were handed out stay valid."""
        self._maps.clear()  # the system unmaps a file when its last tensor goes
        _close_all(self._files)

    def keys(self) -> list[str]:
        """Return the sorted names of all tensors."""
        return sorted(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._entry(key).dtype

    def config(self) -> dict[str, Any]:
        """Return what config.json says; {} where there is none."""
        path = self.directory / "config.json"
        return read_json(path, "the model's config") if path.exists() else {}

    def file_of(self, key: str) -> str:
        """Return the name of the file that holds a tensor."""
        self._entry(key)
        return self._file_of[key]

    def shards(self) -> dict[str, list[str]]:
        """Return file name -> its tensors in the order in which they lie; files sorted."""
        shards: dict[str, list[str]] = {name: [] for name in sorted(self._identity)}
        for key, name in self._file_of.items():
            shards[name].append(key)
        return shards

    def raw(self, key: str) -> memoryview:
        """Return a tensor's bytes as they are on the disk, not copied, read-only."""
        entry = self._entry(key)
        return memoryview(self._map(self._file_of[key]))[entry.begin : entry.end].toreadonly()

    def pieces(self, key: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order, each piece valid until the next."""
        entry = self._entry(key)
        buffer = memoryview(bytearray(min(_PIECE, entry.end - entry.begin)))
        for start in range(0, entry.end - entry.begin, _PIECE):
            part = buffer[: entry.end - entry.begin - start]
            self.read(key, start, part)
            yield part

    def lies_in_file(self, key: str) -> bool:
        """Whether a tensor's bytes are those of its file, so that `read` reads them."""
        return key in self._entries

    def tensor(self, key: str) -> Tensor:
        """Return a tensor on the CPU, mapped from the file; writing to it changes this process's copy only.

        Where tensors of very many files are in use already, it is in memory of its own.
        """
        entry = self._entry(key)
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if self._file_of[key] not in self._maps and len(_with_descriptor) >= 4 * self._most:
            return self.load(key)  # tensors of so many files are in use that half of what may be open is
        view = memoryview(self._map(self._file_of[key]))[entry.begin : entry.end]
        buffer = bytearray(view) if entry.begin % entry.dtype.itemsize else view
        return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)

    def load(self, key: str) -> Tensor:
        """Return a tensor in memory of its own."""
        entry = self._entry(key)
        loaded = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if loaded.numel():
            self.read(key, 0, as_array(loaded.view(-1).view(torch.uint8)).data)
        return loaded

    def read(self, key: str, start: int, out: memoryview) -> None:
        """Read some bytes of a tensor, from byte `start` on, into `out`; nothing is mapped.

        Raises:
            CheckpointError: the file can no longer be read, or has become shorter.
        """
        with self.reading(key) as (file, at):
            at += start
            while out:
                count = os.preadv(file, [out], at) if hasattr(os, "preadv") else self._copy(key, at, out)
                if not count:
                    raise EOFError
                out, at = out[count:], at + count

    @contextmanager
    def reading(self, key: str) -> Iterator[tuple[int, int]]:
        """Give the descriptor of a tensor's file, and where the tensor begins in it, to whoever reads it himself.

        Raises:
            CheckpointError: instead of an OSError or an EOFError of the block.
        """
        begin, name = self._entry(key).begin, self._file_of[key]
        try:
            with self._opened(name) as file:
                yield file.fileno(), begin
        except EOFError:
            raise CheckpointError(f"{self.directory / name} has become shorter while it was read") from None
        except OSError as error:
            raise CheckpointError(f"{self.directory / name} cannot be read: {error.strerror}") from error

    def release(self, key: str) -> None:
        """Give the memory back in which a mapped tensor lies; who looks at it again reads it from the file again."""
        entry = self._entry(key)
        mapped = self._maps.get(self._file_of[key])
        start = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = entry.end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if mapped is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, start, length)

    def _copy(self, key: str, at: int, out: memoryview) -> int:
        """Do what preadv does where the system has no such call."""
        data = memoryview(self._map(self._file_of[key]))[at : at + len(out)]
        out[: len(data)] = data
        return len(data)

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """Give a file, which stays open until it is one of the last that were used of too many."""
        with self._lock:
            file = self._files.pop(name, None) or self._open_file(name)
            self._files[name] = file
            self._users[name] = self._users.get(name, 0) + 1
            for other in list(self._files) if len(self._files) > self._most else ():
                if other not in self._users and len(self._files) > self._most:
                    self._files.pop(other).close()
        try:
            yield file
        finally:
            with self._lock:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]

    def _open_file(self, name: str) -> BinaryIO:
        """Open a file, which has to be the one that it was before."""
        path = self.directory / name
        file = path.open("rb")
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size)
        if self._identity.setdefault(name, identity) != identity:
            file.close()
            raise CheckpointError(f"{path} was replaced while it was read: give the command again")
        return file

    def _map(self, name: str) -> mmap.mmap:
        with self._lock:
            found = self._maps.pop(name, None)
        if found is None:
            try:
                with self._opened(name) as file:
                    found = _mapped(file)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.directory / name} cannot be mapped: {error}") from error
        with self._lock:
            found = self._maps.setdefault(name, found)
            while len(self._maps) > self._most:
                self._maps.pop(next(iter(self._maps)))  # the system unmaps it when its last tensor goes
        return found

    def _entry(self, key: str) -> TensorEntry:
        entry = self._entries.get(key)
        if entry is None:
            raise CheckpointError(f"{self.directory} has no tensor {key!r}")
        return entry

    def _open(self, file: str | None) -> None:
        if file is not None:
            self._check(file)
        elif os.path.lexists(self.directory / SINGLE):
            self._check(SINGLE)
        elif os.path.lexists(self.directory / INDEX):
            self._open_index()
        else:
            raise CheckpointError(self._nothing_found())

    def _open_index(self) -> None:
        path = self.directory / INDEX
        check_link(path, self.directory)
        self.index = read_json(path, "the index of shards")
        wanted = self.index.get("weight_map")
        if not isinstance(wanted, dict) or not wanted or not all(isinstance(v, str) for v in wanted.values()):
            raise CheckpointError(f"{path}: weight_map must map the names of tensors to the names of files")
        for name in sorted(set(wanted.values())):
            self._check(name)
        missing = sorted(k for k, name in wanted.items() if self._file_of.get(k) != name)
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            listing = ", ".join(f"{k} ({wanted[k]})" for k in missing[:5])
            raise CheckpointError(f"{path} names tensors that their files do not hold: {listing}{more}")

    def _check(self, name: str) -> None:
        """Open a file of the folder, once its name and its header have been found good."""
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or os.path.isabs(name):
            raise CheckpointError(
                f"{self.directory}: {name!r} is no plain file name; files outside the folder are not read"
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{self.directory}: {name!r} is no safetensors file")
        path = self.directory / name
        check_link(path, self.directory)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            with self._opened(name) as file:
                entries = read_header(file, path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        twice = sorted(key for key in entries if key in self._entries)
        if twice:
            raise CheckpointError(f"{path}: the tensor {twice[0]!r} is in {self._file_of[twice[0]]} too")
        self._entries.update(entries)
        self._file_of.update(dict.fromkeys(entries, name))

    def _nothing_found(self) -> str:
        known = pickled(self.directory) or other_weights(self.directory)
        if known is not None:
            return known
        names = sorted(p.name for p in self.directory.iterdir())
        listing = ", ".join(names[:10]) or "nothing"
        return f"{self.directory} has neither {SINGLE} nor {INDEX}; it holds {listing}"


def _mapped(file: BinaryIO) -> mmap.mmap:
    if sys.version_info >= (3, 13):  # without a descriptor of its own
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY, trackfd=False)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _with_descriptor.add(mapped)
    return mapped


def _close_all(files: dict[str, BinaryIO]) -> None:
    for file in files.values():
        file.close()
