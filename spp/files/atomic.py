"""Atomic outputs: a reader, or a run after a kill, finds the old state or the new one, never half of either.

The new content is made in a temporary beside the target, flushed to the disk, and renamed into place:

    target free            .name.spp-tmp-x -> name
    target exists (Linux)  .name.spp-tmp-x <-> name in one step; the temporary, now the old content, is removed
    target exists (else)   .name.spp-tmp-x -> .name.spp-new-x (complete); name -> .name.spp-old-x;
                           .name.spp-new-x -> name; .name.spp-old-x is removed

Whoever writes holds a lock (flock) on the temporary, so the next writer can tell the leftovers of a killed process from
the work of a live one: it removes the former, and finishes an interrupted exchange.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from spp.errors import OutputError, OutputExistsError, arg
from spp.files.leftovers import make_temporary, prefix, recover_siblings, remove

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_ATTEMPTS = 20  # writers that may get in between before a rename is given up

_OTHERS_AT_WORK = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up: free some space or write elsewhere",
    errno.EFBIG: "a file would be larger than the system allows: raise the limit (ulimit -f) or write elsewhere",
    errno.EIO: "the disk reports an error: check it, or write elsewhere",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "permission is denied: change the permissions of the folder or write elsewhere",
    errno.EPERM: "the operation is not permitted: change the permissions of the folder or write elsewhere",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "there is a folder of that name: choose another path",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EBUSY: "it is in use, or the root of a mounted disk: choose a path inside it",
    errno.ELOOP: "its symbolic links go round in a circle",
}


_MARKS = ("config.json", "adapter_config.json", "sparsity.json")  # one of them is in every directory that is replaced


def output_error(error: BaseException, target: str | os.PathLike[str]) -> OutputError:
    """Return the OutputError, with a remedy, that stands for a failure to write `target`."""
    if isinstance(error, OutputError):
        return error
    number = _errno_of(error)
    result = OutputError(f"cannot write {os.fspath(target)}: {_REMEDIES.get(number or 0) or error}")
    result.errno = number
    return result


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary directory that becomes `target` when the block ends, and vanishes when it raises.

    Args:
        target: the directory to make; missing parents are made. A symbolic link is followed.
        overwrite: replace what exists; otherwise an existing target is an error before any work is done.

    Raises:
        OutputExistsError: the target exists and `overwrite` is False, or somebody made it meanwhile.
        OutputError: it cannot be written; the message says why and what to do.

    Example:
        >>> with atomic_directory("out") as folder:                       # doctest: +SKIP
        ...     (folder / "notes.txt").write_text("all or nothing")
    """
    with _atomic(target, overwrite, directory=True) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give the path of an empty temporary file that becomes `path`; otherwise as `atomic_directory`."""
    with _atomic(path, overwrite, directory=False) as temporary:
        yield temporary


@contextlib.contextmanager
def _atomic(target: str | os.PathLike[str], overwrite: bool, *, directory: bool) -> Iterator[Path]:
    path = Path(os.path.realpath(target))
    try:
        if path.parent.is_dir():
            recover_siblings(path)
        _check_target(path, overwrite, directory)
        made = _make_parents(path.parent)
        try:
            temporary, lock = make_temporary(path, directory)
        except BaseException:
            _remove_empty(made)
            raise
    except OSError as error:
        raise output_error(error, path) from error
    leftover: Path | None = temporary
    try:
        yield temporary
        try:
            _flush(temporary)
            leftover = _commit(temporary, path, overwrite)
        except OSError as error:
            raise output_error(error, path) from error
        made = []
    except BaseException as error:
        if isinstance(error, OutputError) and str(temporary) in str(error):
            raise _renamed(error, temporary, path) from error
        if _is_failure_to_write(error, temporary):
            raise output_error(error, path) from error
        raise
    finally:
        if leftover is not None:
            remove(leftover)
        os.close(lock)
        _remove_empty(made)


def _renamed(error: OutputError, temporary: Path, path: Path) -> OutputError:
    """Return the error with the name that was asked for, of which the temporary one says nothing to a user."""
    result = type(error)(str(error).replace(str(temporary), str(path)))
    result.errno = error.errno
    return result


def _check_target(path: Path, overwrite: bool, directory: bool) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not overwrite:
        remedy = f"choose another path, or pass {arg('overwrite', True)}"
        raise OutputExistsError(f"{path} exists already", remedy=remedy)
    if stat.S_ISDIR(mode) != directory:
        kind, wanted = ("file", "directory") if directory else ("directory", "file")
        raise OutputError(f"cannot write the {wanted} {path}: it is a {kind}; remove it or choose another path")
    if directory and Path.cwd().is_relative_to(path):
        raise OutputError(f"cannot replace {path}: it is, or contains, the current directory; choose another path")


def check_target(target: str | os.PathLike[str], *, overwrite: bool = False, size: int = 0) -> None:
    """Refuse a directory that could not be written, as far as that can be told without writing anything.

    Args:
        target: the directory; overwrite: whether it may exist.
        size: bytes that it would take.

    Raises:
        OutputError: it exists, may not be written, or would not fit on its disk.
    """
    path = Path(os.path.realpath(target))
    try:
        _check_target(path, overwrite, True)
        parent = next(folder for folder in path.parents if os.path.lexists(folder))
        if not parent.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if shutil.disk_usage(parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise output_error(error, path) from error


def require_replaceable(target: str | os.PathLike[str]) -> None:
    """Refuse to replace a directory that holds folders and is no checkpoint: a home or a project would be lost.

    Raises:
        OutputExistsError: the directory is like that; a folder in it is named.
    """
    path = Path(target)
    entries = sorted(os.scandir(path), key=lambda entry: entry.name) if path.is_dir() else []
    folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    ours = any(entry.name in _MARKS or entry.name.endswith(".safetensors") for entry in entries)
    if folders and not ours:
        raise OutputExistsError(
            f"{path} holds the folder {folders[0]} and is neither a checkpoint nor an adapter, so it is not replaced: "
            f"choose another path"
        )


def require_directory(path: Path, who: str) -> None:
    """Refuse a file where a directory is to be.

    Args:
        path: of the directory, which need not exist.
        who: needs it, such as "the run needs", for the message.

    Raises:
        OutputExistsError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise OutputExistsError(f"{path} is a file; {who} a directory: choose another output_dir")


def _make_parents(parent: Path) -> list[Path]:
    """Make what is missing of `parent`; return what was made, innermost first."""
    made: list[Path] = []
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.insert(0, folder)
    return made


def _flush(temporary: Path) -> None:
    """Give files that a library made private the mode that the umask asks for, and bring everything to the disk."""
    default = stat.S_IMODE(temporary.stat().st_mode) & 0o666
    for folder, _, names in os.walk(temporary):
        for name in names:
            _flush_file(Path(folder, name), default)
        _sync(Path(folder))
    if temporary.is_file():
        _flush_file(temporary, default)


def _flush_file(path: Path, default: int) -> None:
    status = path.lstat()
    if stat.S_ISREG(status.st_mode):
        if stat.S_IMODE(status.st_mode) == 0o600 != default:
            path.chmod(default)
        _sync(path)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not flush folders
            raise
    finally:
        os.close(handle)


def _commit(temporary: Path, path: Path, overwrite: bool) -> Path | None:
    """Put temporary in path's place; return what is left over to be removed, if anything."""
    for _ in range(_ATTEMPTS):
        if os.path.lexists(path):
            if not overwrite:
                raise OutputExistsError(f"{path} was made by somebody else meanwhile; choose another path")
            try:
                left = _replace(temporary, path)
            except OSError as error:
                if error.errno not in _OTHERS_AT_WORK or not temporary.exists():
                    raise
                continue  # whoever had the place left it, or somebody else took it
        else:
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno not in _OTHERS_AT_WORK or not path.exists():
                    raise
                continue  # somebody took the place
            left = None
        _sync(path.parent)
        return left
    raise OutputError(f"cannot write {path}: other processes keep replacing it; let only one write there")


def _replace(temporary: Path, path: Path) -> Path | None:
    if temporary.is_file():
        os.replace(temporary, path)
        return None
    if _exchange(temporary, path):
        return temporary
    token = temporary.name.rsplit("-", 1)[-1]
    complete = path.with_name(f"{prefix(path)}new-{token}")
    aside = path.with_name(f"{prefix(path)}old-{token}")
    os.rename(temporary, complete)
    try:
        os.rename(path, aside)
        try:
            os.rename(complete, path)
        except BaseException:
            try:
                os.rename(aside, path)
            except OSError:  # somebody took the place: what we put aside is the state before theirs
                if path.exists():
                    remove(aside)
            raise
    except BaseException:
        os.rename(complete, temporary)
        raise
    return aside


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if renameat2(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _is_failure_to_write(error: BaseException, temporary: Path) -> bool:
    if isinstance(error, OutputError) or not isinstance(error, Exception):
        return False
    number = _errno_of(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return True
    name = getattr(error, "filename", None)
    return number is not None and isinstance(name, str) and Path(name).is_relative_to(temporary)


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))  # how libraries written in Rust say it
    return int(match[1]) if match else None


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
