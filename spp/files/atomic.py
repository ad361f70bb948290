"""Atomic outputs: a reader, or a run after a kill, finds the old state or the new one, never half of either.

The new content is made in a temporary beside the target, flushed to the disk, and renamed into place:

    target free            .name.spp-tmp-x -> name
    target exists (Linux)  .name.spp-tmp-x <-> name in one step; the temporary, now the old content, is removed
    target exists (else)   .name.spp-tmp-x -> .name.spp-new-x (complete); name -> .name.spp-old-x;
                           .name.spp-new-x -> name; .name.spp-old-x is removed

What exists is replaced if it is recognised as an output (spp.files.recognised), which is decided before the block runs
and again right before the exchange.

Whoever writes holds a lock (flock) on the temporary, so the next writer can tell the leftovers of a killed process from
the work of a live one: it removes the former, and finishes an interrupted exchange.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spp.errors import OutputError, OutputExistsError, arg, is_failure_to_write, output_error
from spp.files.leftovers import make_temporary, prefix, recover_siblings, remove, require_unlocked
from spp.files.recognised import ANY_OUTPUT, FileKind, require_replaceable, require_replaceable_file, shown

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_ATTEMPTS = 20  # writers that may get in between before a rename is given up

_OTHERS_AT_WORK = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)

Judge = Callable[[Path, Sequence[Path]], None]  # of what is there, with the folder that replaces it once it is made


@contextlib.contextmanager
def atomic_directory(
    target: str | os.PathLike[str], *, overwrite: bool = False, copies: Sequence[str | os.PathLike[str]] = ()
) -> Iterator[Path]:
    """Give a temporary directory that becomes `target` when the block ends, and vanishes when it raises.

    Args:
        target: the directory to make; missing parents are made. A symbolic link is followed, and stays.
        overwrite: replace what exists, if it is empty or a recognised output and holds nothing else; otherwise an
            existing target is an error before any work is done.
        copies: folders from which files are copied: one that is the same there is not lost.

    Raises:
        OutputExistsError: the target exists and `overwrite` is False, or somebody made it meanwhile; or it is no output
            of spp or transformers, or holds other things too, which are named.
        OutputError: it cannot be written; the message says why and what to do.

    Example:
        >>> with atomic_directory("out") as folder:                       # doctest: +SKIP
        ...     (folder / "notes.txt").write_text("all or nothing")
    """
    with _atomic(target, overwrite, directory=True, judge=_judge_directory(copies)) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, overwrite: bool = False, kind: FileKind = ANY_OUTPUT
) -> Iterator[Path]:
    """Give the path of an empty temporary file that becomes `path`; otherwise as `atomic_directory`.

    Args:
        path: the file.
        overwrite: replace what exists, if it is empty or of the kind.
        kind: spp.files.recognised knows several; OWN is for files that spp keeps in a folder of its own.
    """
    with _atomic(path, overwrite, directory=False, judge=_judge_file(kind)) as temporary:
        yield temporary


def _judge_directory(copies: Sequence[str | os.PathLike[str]]) -> Judge:
    def judge(path: Path, new: Sequence[Path]) -> None:
        require_unlocked(path)
        require_replaceable(path, (*copies, *new))

    return judge


def _judge_file(kind: FileKind) -> Judge:
    return lambda path, new: require_replaceable_file(path, kind)


@contextlib.contextmanager
def _atomic(target: str | os.PathLike[str], overwrite: bool, *, directory: bool, judge: Judge) -> Iterator[Path]:
    path = Path(os.path.realpath(target))
    try:
        if path.parent.is_dir():
            recover_siblings(path)
        _check_target(path, overwrite, directory, judge)
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
            leftover = _commit(temporary, path, overwrite, judge)
        except OSError as error:
            raise output_error(error, path) from error
        made = []
    except BaseException as error:
        if isinstance(error, OutputError) and str(temporary) in str(error):
            raise _renamed(error, temporary, path) from error
        if is_failure_to_write(error, temporary):
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


def _check_target(path: Path, overwrite: bool, directory: bool, judge: Judge) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not overwrite:
        remedy = f"choose another path, or pass {arg('overwrite', True)}"
        raise OutputExistsError(f"{shown(path)} exists already", remedy=remedy)
    if stat.S_ISLNK(mode):  # which is left of a path without links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if stat.S_ISDIR(mode) != directory:
        kind, wanted = ("file", "directory") if directory else ("directory", "file")
        raise OutputError(f"cannot write the {wanted} {shown(path)}: it is a {kind}; remove it or choose another path")
    judge(path, ())


def check_target(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    size: int = 0,
    copies: Sequence[str | os.PathLike[str]] = (),
    kind: FileKind | None = None,
) -> None:
    """Refuse an output that could not be written, as far as that can be told without writing anything.

    Args:
        target: the directory; or, with a kind, the file.
        overwrite: whether it may exist, as for `atomic_directory`.
        size: bytes that it would take.
        copies: as for `atomic_directory`.
        kind: as for `atomic_file`.

    Raises:
        OutputError: it exists, is not to be replaced, may not be written, or would not fit on its disk.
    """
    judge = _judge_directory(copies) if kind is None else _judge_file(kind)
    path = Path(os.path.realpath(target))
    try:
        _check_target(path, overwrite, kind is None, judge)
        parent = next(folder for folder in path.parents if os.path.lexists(folder))
        if not parent.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if shutil.disk_usage(parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise output_error(error, path) from error


def require_directory(path: Path, who: str) -> None:
    """Refuse a file where a directory is to be.

    Args:
        path: of the directory, which need not exist.
        who: needs it, such as "the run needs", for the message.

    Raises:
        OutputExistsError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise OutputExistsError(f"{path} is a file; {who} a directory: choose another path")


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


def _commit(temporary: Path, path: Path, overwrite: bool, judge: Judge) -> Path | None:
    """Put temporary in path's place; return what is left over to be removed, if anything."""
    for _ in range(_ATTEMPTS):
        if os.path.lexists(path):
            if not overwrite:
                raise OutputExistsError(f"{path} was made by somebody else meanwhile; choose another path")
            judge(path, (temporary,))
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


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
