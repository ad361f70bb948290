"""Writing the checkpoints of a run, and which of them are whole.

A marker file, written last, lists every other file and its size.

transformers writes checkpoint-N in place, so a kill leaves half a folder that looks like a whole one. Here a folder
counts only with its marker, and only while every file that the marker lists is there at its full size.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from spp.errors import CheckpointError, SPPWarning
from spp.files import output_error, read_json, recover, write_json
from spp.files.leftovers import make_temporary
from spp.files.recognised import STEP, foreign, shown
from spp.wrapping.adapter_files import CONFIG_NAME, WEIGHTS_NAME

MARKER_NAME = "spp_complete.json"
_PROBES, _PROBE = 4, 2**20  # writes, and bytes of each: one to a disk that is nearly full is cut short first
_FOLDER = re.compile(r"checkpoint-(\d+)")


def replace_files(write: Callable[[Path], None], directory: str | Path) -> None:
    """Write an adapter into a directory that holds other things too, in place of one that is there.

    All files are made whole beside the old ones, and then renamed. A kill leaves the old adapter, the new one, or,
    where their configs differ, weights without a config, which are refused: never half a file, never a mixture.

    Args:
        write: writes adapter_config.json, and the files that it describes, into a folder.
        directory: is made where it is missing.

    Raises:
        NonFiniteError: the adapter holds NaN or infinity.
        OutputError: the directory cannot be written.
    """
    directory = Path(directory)
    weights, config = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        recover(weights)  # what a killed process left
        folder, lock = make_temporary(weights, directory=True)
        try:
            write(folder)
            names = sorted(file.name for file in folder.iterdir() if file.name != CONFIG_NAME)
            for name in (*names, CONFIG_NAME):
                _sync(folder / name)
            if config.exists() and config.read_bytes() != (folder / CONFIG_NAME).read_bytes():
                config.unlink()
            for name in names:
                os.replace(folder / name, directory / name)
            os.replace(folder / CONFIG_NAME, config)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise output_error(error, directory) from error


def mark_complete(directory: str | Path, step: int) -> None:
    """Write the marker of a checkpoint, after everything else in it has reached the disk.

    Args:
        directory: the checkpoint.
        step: optimizer steps done.
    """
    directory = Path(directory)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MARKER_NAME)
    for file in files:
        _sync(file)
    sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}
    write_json(directory / MARKER_NAME, {"step": step, "files": sizes})


def why_not_written(directory: str | Path) -> OSError | None:
    """Return what the system says to a file of a few megabytes there, for writers that do not tell; None if it fits."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            for _ in range(_PROBES):
                file.write(bytes(_PROBE))
    except OSError as error:
        return error
    return None


def unmark(directory: str | Path) -> None:
    """Remove the marker, before the checkpoint is written anew or deleted."""
    (Path(directory) / MARKER_NAME).unlink(missing_ok=True)


def why_incomplete(directory: str | Path) -> str | None:
    """Return what is wrong with a checkpoint, or None for a whole one."""
    directory = Path(directory)
    if not directory.is_dir():
        return "there is no such directory"
    if not (directory / MARKER_NAME).is_file():
        return f"{MARKER_NAME} is missing: writing it was cut off, or no trainer of spp wrote it"
    try:
        files = read_json(directory / MARKER_NAME, "checkpoint marker").get("files")
    except CheckpointError as error:
        return str(error)
    if not isinstance(files, dict) or not files:
        return f"{MARKER_NAME} lists no files"
    for name, size in sorted(files.items()):
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def require_complete(directory: str | Path) -> Path:
    """Return the path of a checkpoint that is whole.

    Raises:
        CheckpointError: it is not; the message says what is missing and which one of the run is whole.
    """
    problem = why_incomplete(directory)
    if problem is None:
        return Path(directory)
    whole = last_complete(Path(directory).parent, warn=False)
    remedy = f"the last whole one there is {whole}" if whole else "there is no whole one beside it: start anew"
    raise CheckpointError(f"{directory} cannot be resumed from: {problem}; {remedy}")


def last_complete(run: str | Path, *, warn: bool = True) -> Path | None:
    """Return the whole checkpoint of the most steps in a run directory, or None.

    Args:
        run: holds folders checkpoint-N.
        warn: warn of each later one that is skipped because it is not whole.
    """
    for _, directory in sorted(_folders(run), reverse=True):
        problem = why_incomplete(directory)
        if problem is None:
            return directory
        if warn:
            warnings.warn(f"skipping {directory}: {problem}", SPPWarning, stacklevel=3)
    return None


def rotate(run: str | Path, limit: int | None, best: str | Path | None = None) -> list[Path]:
    """Delete the oldest whole checkpoints beyond `limit` and return them.

    The last whole one and the best are never deleted, nor is any folder without a marker: who knows whose it is. One
    that holds what no trainer writes (spp.files.recognised) stays too, with a warning, and counts no longer.

    Args:
        run: holds folders checkpoint-N.
        limit: how many to keep; None keeps all.
        best: a checkpoint to keep in any case.
    """
    if limit is None or limit <= 0:
        return []
    whole = [directory for _, directory in sorted(_folders(run)) if why_incomplete(directory) is None]
    kept = {whole[-1]} if whole else set()
    if best is not None:
        kept |= {directory for directory in whole if directory.resolve() == Path(best).resolve()}
    deleted: list[Path] = []
    left = len(whole)
    for directory in whole:
        if left <= max(limit, len(kept)):
            break
        if directory in kept:
            continue
        left -= 1
        reason = _why_kept(directory)
        if reason is not None:
            warnings.warn(f"{directory} is not deleted, though it is old: {reason}", SPPWarning, stacklevel=2)
            continue
        unmark(directory)  # first: a kill in the middle of rmtree must not leave a marked half
        shutil.rmtree(directory)
        deleted.append(directory)
    return deleted


def _why_kept(directory: Path) -> str | None:
    """Return what would be lost with a checkpoint, or why nobody knows; None if it may go."""
    try:
        found = next(foreign(directory, STEP), None)
    except OSError as error:
        return str(error)
    return None if found is None else f"{shown(found)} in it is nothing that a trainer writes; move that away"


def _folders(run: str | Path) -> list[tuple[int, Path]]:
    run = Path(run)
    if not run.is_dir():
        return []
    matches = [(_FOLDER.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()]
    return [(int(match.group(1)), path) for match, path in matches if match]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
