"""Write a checkpoint anew, shard by shard, by a few threads: pieces of tensors in memory, never the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spp.checkpoint.carrying import carry_files, update_config
from spp.checkpoint.pipeline import Job, Sink, run
from spp.checkpoint.rewrite_jobs import job_of
from spp.checkpoint.rewriting import Rewriting
from spp.files import atomic_directory, check_target, write_json
from spp.files.reader import INDEX
from spp.files.writer import TensorFile


@contextmanager
def output(
    rewriting: Rewriting, out_dir: str | os.PathLike[str], *, overwrite: bool, dry_run: bool
) -> Iterator[Path | None]:
    """Give the directory to write into, as `atomic_directory`; for a dry run None, if it could be written."""
    copies = [rewriting.reader.directory]
    if dry_run:
        check_target(out_dir, overwrite=overwrite, size=rewriting.size(), copies=copies)
        yield None
        return
    with atomic_directory(out_dir, overwrite=overwrite, copies=copies) as directory:
        yield directory


def write_shards(rewriting: Rewriting, directory: Path | None, task: str, *, card: bool = True) -> None:
    """Write all shards, what lies beside them, and the index into a directory.

    Args:
        directory: None to make and check everything, and write nothing.
        task: what a bar shows.
        card: whether the model card goes along.
    """
    _write_tensors(rewriting, directory, task)
    reader = rewriting.reader
    carry_files(reader.directory, directory, set(reader.shards()), card=card)
    if directory is not None:
        _write_index(rewriting, directory)
        if rewriting.dtype is not None:
            update_config(directory, rewriting.dtype)


def _write_tensors(rewriting: Rewriting, directory: Path | None, task: str) -> None:
    """Make every tensor, and write it into the file of the name that the base has it in, unless there is no directory.

    A file is closed when its last tensor is done, while threads are at the next one already.
    """
    reader = rewriting.reader
    left: dict[Job, tuple[ExitStack, list[int]]] = {}  # {job: (its file, how many of its tensors are not done)}

    def jobs() -> Iterator[Job]:
        for name, keys in reader.shards().items():
            layout = {key: (rewriting.stored(key), reader.shape(key)) for key in keys}
            file, names = None, sorted(layout)
            own = ExitStack()
            if directory is not None:
                file = own.enter_context(TensorFile(directory / name, layout))
                names = file.names
            files.push(own)
            count = [len(names)]
            for key in names:
                job = job_of(rewriting, key, Sink(file, key))
                left[job] = own, count
                yield job

    def done(job: Job) -> None:
        bar.update()
        own, count = left.pop(job)
        count[0] -= 1
        if not count[0]:
            own.close()

    with ExitStack() as files, tqdm(total=len(reader.keys()), desc=task, unit="tensor", disable=None) as bar:
        run(jobs(), done, waiting=1)


def _write_index(rewriting: Rewriting, directory: Path) -> None:
    reader = rewriting.reader
    if reader.index is None:
        return
    if rewriting.dtype is None:
        shutil.copyfile(reader.directory / INDEX, directory / INDEX)
        return
    metadata: Any = reader.index.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": rewriting.size()}
    write_json(directory / INDEX, {**reader.index, "metadata": metadata})
