"""The folder beside an output where the finished blocks of a checkpoint wait until all of it is pruned.

    .NAME.pruning/progress.json                      what the blocks belong to, and what was done to their layers
    .NAME.pruning/model-00002-of-00005.safetensors   a finished block, as it goes into the output

A run that was killed finds its blocks there. The folder vanishes when the output appears. Of several ranks the first
writes and locks; the others know what it knows, and read the finished blocks that they go through again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.certifying.save import certify, make_certificate
from spp.distributed.sums import of_first, place, together
from spp.errors import CheckpointError, OutputError, OutputExistsError
from spp.files import (
    CheckpointReader,
    atomic_directory,
    atomic_file,
    output_error,
    read_json,
    save_tensors,
    write_json,
    write_tensors,
)
from spp.files.carry import carry_files, update_config
from spp.files.hashes import tensor_bytes
from spp.files.header import size_of
from spp.files.leftovers import LOCK_NAME, FolderLock, prefix
from spp.files.reader import INDEX, SINGLE
from spp.files.recognised import OWN, PRUNING
from spp.pruning.report import BlockReport, LayerReport, RegionReport

logger = logging.getLogger(__name__)

_PROGRESS = "progress.json"
_LONGEST_NAME = 255  # bytes that file systems allow
_LARGEST_SINGLE = 5 * 10**9  # bytes of weights that are written as one file

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Work:
    """The folder of finished blocks.

    Args:
        target: the output.
        job: all that decides what a finished block holds; finished blocks of another job are thrown away.
        blocks: how many there are.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], blocks: int) -> None:
        self._target = target
        self._blocks = blocks
        self._folder = work_folder(target)
        self._progress: dict[str, Any] = {"job": dict(job), "blocks": {}}
        self._first = place() == 0
        self._lock: FolderLock | None = None
        try:
            with together():
                if self._first:
                    self._begin()
        except BaseException:
            self.__exit__()
            raise
        self._progress = of_first(self._progress)

    def _begin(self) -> None:
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
        told = f"another run is pruning into {self._target}"
        self._lock = FolderLock(self._folder, told, "let it finish, or choose another path")
        self._resume()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        if self._lock.held and not (self._folder / _PROGRESS).exists():  # nothing is finished
            self._discard()
        self._lock.release()

    def has(self, index: int) -> bool:
        """Whether a block is finished."""
        return str(index) in self._progress["blocks"]

    def reader(self, index: int) -> CheckpointReader:
        """Return a reader of a finished block."""
        return CheckpointReader(self._folder, file=self._shard(index + 1))

    def keep_blocks_of(self, source: Callable[[int], int]) -> None:
        """Start anew unless the finished blocks were made of the weights that `source` gives the checksums of."""
        known = self._progress.get("sources")
        known = known if isinstance(known, dict) else {}
        with together():
            blocks = self._progress["blocks"] if self._first else ()
            changed = [index for index in blocks if known.get(index) != source(int(index))]
            if changed:
                told = "%s holds blocks of a model that has changed since (block %s); starting anew"
                logger.warning(told, self._folder, changed[0])
                self._progress = {"job": self._progress["job"], "blocks": {}}
                with self._writing():
                    self._remove_files()
        self._progress = of_first(self._progress)

    def finish(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        layers: Mapping[str, LayerReport],
        source: int,
        repaired: BlockReport | None = None,
    ) -> None:
        """Write a finished block, then the note that it is finished.

        Args:
            index: of the block. tensors: what goes into the output. layers: what was done to each layer.
            source: a checksum of the block's weights in the model.
            repaired: what its reconstruction did.
        """
        with together(), self._writing():
            if self._first:
                with atomic_file(self._folder / self._shard(index + 1), overwrite=True, kind=OWN) as path:
                    save_tensors(path, tensors)
            self._progress["blocks"][str(index)] = {path: asdict(layer) for path, layer in layers.items()}
            self._progress.setdefault("sources", {})[str(index)] = source
            if repaired is not None:
                regions = [asdict(region) for region in repaired.regions]
                self._progress.setdefault("repaired", {})[str(index)] = regions
            self._note()

    def malformed(self) -> CheckpointError:
        """Return the error of a note that no run wrote."""
        note = self._folder / _PROGRESS
        return CheckpointError(f"{note} is not what an earlier run wrote: remove {self._folder} to start anew")

    def recall(self, name: str) -> Any:
        """Return what an earlier run remembered under a name, or None."""
        return self._progress.get(name)

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON-ready value for a run that goes on here."""
        with together(), self._writing():
            self._progress[name] = value
            self._note()

    def reports(self) -> dict[str, LayerReport]:
        """Return what was done to each layer."""
        return {
            path: LayerReport(**{**values, "shape": tuple(values["shape"])})
            for layers in self._progress["blocks"].values()
            for path, values in layers.items()
        }

    def repaired(self) -> dict[int, BlockReport]:
        """Return what reconstruction did to each block."""
        found: dict[str, Any] = self._progress.get("repaired", {})
        try:
            return {int(i): BlockReport(tuple(RegionReport(**region) for region in of)) for i, of in found.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise self.malformed() from error

    def commit(
        self,
        source: CheckpointReader,
        rest: Layout,
        value: Callable[[str], Tensor],
        *,
        dtype: torch.dtype | None,
        overwrite: bool,
        origin: str,
        base: str | os.PathLike[str] | None = None,
    ) -> None:
        """Make the output of the finished blocks and the rest, certify it, and remove the folder.

        Args:
            source: of the dense checkpoint, whose other files are carried along.
            rest: dtype and shape of every tensor outside the blocks.
            value: gives such a tensor.
            dtype: what the config is to say; None leaves it as it is.
            overwrite: replace what is there.
            origin: path or hub id of the dense model, which the certificate names.
            base: the pruned checkpoint whose zeros the output must have, and which its certificate names.
        """
        with together(), self._writing(), contextlib.ExitStack() as stack:
            if not self._first:
                return
            made = atomic_directory(self._target, overwrite=overwrite, copies=[source.directory])
            directory = stack.enter_context(made)
            carry_files(source.directory, directory, set(source.shards()))
            if dtype is not None:
                update_config(directory, dtype)
            readers = [stack.enter_context(self.reader(index)) for index in range(self._blocks)]
            of = {key: reader for reader in readers for key in reader}
            layout = {**rest, **{key: (reader.dtype(key), reader.shape(key)) for key, reader in of.items()}}
            size = sum(size_of(*entry) for entry in layout.values())

            def produce(key: str) -> Iterator[memoryview]:
                return tensor_bytes(of[key].tensor(key) if key in of else value(key))

            if size <= _LARGEST_SINGLE:
                write_tensors(directory / SINGLE, layout, produce)
            else:
                write_tensors(directory / self._shard(0), rest, produce)
                for index in range(self._blocks):
                    _link(self._folder / self._shard(index + 1), directory / self._shard(index + 1))
                files = [(rest, 0), *((reader.keys(), index) for index, reader in enumerate(readers, start=1))]
                file_of = {key: self._shard(number) for keys, number in files for key in keys}
                write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": file_of})
            with CheckpointReader(directory) as pruned:
                replace(make_certificate(pruned), origin=origin).write(directory)
            if base is not None:
                certify(directory, base)
            stack.close()
            self._done()

    def commit_adapter(self, write: Callable[[Path], None], *, overwrite: bool) -> None:
        """Make an output that `write` fills, a directory of adapters, and remove the folder."""
        with together():
            if self._first:
                with self._writing(), atomic_directory(self._target, overwrite=overwrite) as directory:
                    write(directory)
                self._done()

    def _done(self) -> None:
        (self._folder / _PROGRESS).unlink()  # first: a run that is killed here leaves no note of blocks that are gone
        self._discard()

    def _note(self) -> None:
        if not self._first:
            return
        with atomic_file(self._folder / _PROGRESS, overwrite=True, kind=OWN) as path:
            write_json(path, self._progress)

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._blocks + 1:05d}.safetensors"

    def _resume(self) -> None:
        if not (self._folder / _PROGRESS).exists():
            return
        found = read_json(self._folder / _PROGRESS, "the progress of an earlier run")
        if found.get("job") == self._progress["job"]:
            if not _is_note(found, self._blocks):
                raise self.malformed()
            self._progress = found
            logger.info("continuing after %d finished blocks in %s", len(found["blocks"]), self._folder)
            return
        if not isinstance(found.get("job"), dict) or not isinstance(found.get("blocks"), dict):
            raise self.malformed()
        before = found["job"]
        changed = [name for name, value in self._progress["job"].items() if before.get(name) != value]
        logger.warning(
            "%s holds blocks of another job (other: %s); starting anew", self._folder, ", ".join(sorted(changed))
        )
        with self._writing():
            self._remove_files()

    def _discard(self) -> None:
        """Remove the folder, as far as the system lets us; what somebody else has put there stays."""
        with contextlib.suppress(OSError):
            self._remove_files()
            if self._lock is not None:
                self._lock.release()
            self._folder.rmdir()

    def _remove_files(self) -> None:
        for path in self._folder.iterdir():
            if PRUNING.has_file(path.name) and path.name != LOCK_NAME and not path.is_dir():
                path.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the system refuses into an OutputError that says what is kept."""
        try:
            yield
        except OSError as error:
            cause = error.__cause__ if isinstance(error, OutputError) and error.__cause__ else error
            failed = error if isinstance(error, OutputExistsError) else output_error(cause, self._target)
            count = len(self._progress["blocks"])
            if not count:
                raise failed from error
            said = f"{failed}. {count} finished block{'s are' if count > 1 else ' is'} kept in {self._folder}: "
            result = type(failed)(said + f"the same command continues after {'them' if count > 1 else 'it'}")
            result.errno = failed.errno
            raise result from error


def work_folder(target: Path) -> Path:
    """Return where the finished blocks of an output wait."""
    name = f".{target.name}.pruning"
    return target.parent / (
        name if len(os.fsencode(name)) <= _LONGEST_NAME else f"{prefix(target).removesuffix('.spp-')}.pruning"
    )


def _is_note(found: Mapping[str, Any], blocks: int) -> bool:
    """Whether a note of progress is one that `Work` writes."""
    finished, patterns = found.get("blocks"), found.get("patterns", {})
    if not isinstance(finished, dict) or not finished.keys() <= {str(index) for index in range(blocks)}:
        return False
    if not isinstance(patterns, dict) or not all(isinstance(pattern, str) for pattern in patterns.values()):
        return False
    reports = finished.values()
    return all(isinstance(layers, dict) and all(map(_is_report, layers.values())) for layers in reports)


def _is_report(values: object) -> bool:
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(LayerReport)}:
        return False
    numbers = [values[name] for name in ("sparsity", "sparsity_before", "tokens", "seconds")]
    numbers += [] if values["relative_error"] is None else [values["relative_error"]]
    words, shape = (values["pattern"], values["note"]), values["shape"]
    sizes = isinstance(shape, list) and len(shape) in (2, 3) and all(type(size) is int and size > 0 for size in shape)
    return sizes and all(type(n) in (int, float) for n in numbers) and all(isinstance(word, str) for word in words)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
