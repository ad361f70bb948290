"""Temporaries beside an output: made, locked while their writer lives, and tidied up after a writer that was killed.

`.name.spp-tmp-x` is being written, `.name.spp-new-x` is complete, `.name.spp-old-x` is what it replaces.

A folder in which one process works for long, such as a run's, holds `.lock` for that time (FolderLock). Locks are the
system's (flock): it takes them away from a process that ends, however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import stat
import sys
import time
from pathlib import Path

from spp.errors import OutputError, output_error

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_LARGEST_NOTE = 1 << 12  # bytes of who holds a lock
_TRIES, _WAIT = 4, 0.05  # how often a lock is tried for, and the seconds between
_held: set[int] = set()  # handles of locks, which a forked child must not keep: a lock lasts as long as any of them
_LONGEST_NAME = 150  # bytes of the target's name that fit, with what is added, into a file name


def recover(target: str | os.PathLike[str]) -> None:
    """Remove what killed writers of `target` left beside it, and finish an exchange that one of them had begun.

    Leftovers of live writers stay. Nothing is raised: on a disk that is read-only there is nothing to recover.
    """
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        recover_siblings(Path(os.path.realpath(target)))


def make_temporary(path: Path, directory: bool) -> tuple[Path, int]:
    """Make a temporary beside path and lock it; a cleaner that came in between makes us try again."""
    while True:
        temporary = path.with_name(f"{prefix(path)}tmp-{secrets.token_hex(6)}")
        if directory:
            temporary.mkdir()
            try:
                handle = os.open(temporary, os.O_RDONLY)
            except FileNotFoundError:
                continue
        else:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if lock(handle) is not False and _same_file(handle, temporary):
            return temporary, handle
        os.close(handle)


def prefix(path: Path) -> str:
    """Return how the names of the temporaries of an output begin."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.spp-"


def lock(handle: int, *, shared: bool = False) -> bool | None:
    """Lock without waiting: True, False when another process holds it, None when the system has no such locks.

    A shared lock is one that several may hold, and nobody alone; one that is held already becomes it, or ceases to be.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class FolderLock:
    """A folder in which this process alone works, until `release`; a lock of a process that ended is none.

    A forked child has no part in it. Where the file system has no locks, a line in the log says so, and nothing keeps a
    second process out.

    Args:
        folder: it exists.
        told: that it is locked, for the message to whoever finds it so. remedy: what to do about that.

    Raises:
        OutputError: another process, which the message names, or another lock of this one, holds it; or the lock cannot
            be made.
    """

    def __init__(self, folder: Path, told: str, remedy: str) -> None:
        self._path, self._pid = folder / LOCK_NAME, os.getpid()
        tries = _TRIES
        try:
            while True:
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
                found = lock(handle)
                if found is not False and _same_file(handle, self._path):
                    break
                who = _who(handle)
                os.close(handle)
                if found is False:  # if it is no lock but `require_unlocked`, it is gone at once
                    tries -= 1
                    if not tries:
                        raise OutputError(f"{told}{who}", remedy=remedy)
                    time.sleep(_WAIT)
        except OSError as error:
            raise output_error(error, folder) from error
        if found is None:
            logger.warning(
                "the file system of %s has no locks: see to it that no other process writes into %s", folder, folder
            )
        _held.add(handle)
        self._handle: int | None = handle
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": self._pid, "host": socket.gethostname()}).encode(), 0)

    @property
    def held(self) -> bool:
        """Whether it has not been released."""
        return self._handle is not None

    def release(self) -> None:
        """Let other processes in; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is None or os.getpid() != self._pid:
            return
        _held.discard(handle)
        with contextlib.suppress(OSError):
            if _same_file(handle, self._path):
                os.unlink(self._path)
        os.close(handle)


def require_unlocked(folder: Path) -> None:
    """Refuse a folder in which a process is at work (FolderLock).

    Raises:
        OutputError: the message names the process, as far as it is known.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder / LOCK_NAME, os.O_RDWR)
        except OSError:
            return
        stack.callback(os.close, handle)
        if lock(handle, shared=True) is False:
            raise OutputError(
                f"another process is at work in {folder}{_who(handle)}; let it finish, or choose another path"
            )


def _who(handle: int) -> str:
    """Return who holds a lock, for a message, as far as that is known."""
    try:
        note = json.loads(os.pread(handle, _LARGEST_NOTE, 0))
        pid, host = int(note["pid"]), str(note["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    this = " (this one)" if (pid, host) == (os.getpid(), socket.gethostname()) else ""
    return f": process {pid}{this} on {host}"


def _let_go_in_child() -> None:
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def recover_siblings(path: Path) -> None:
    """`recover` for a path without symbolic links; what the system refuses is an OSError.

    Beside the target are temporaries that are unfinished (`tmp`), complete (`new`) or set aside (`old`). What is done:

        a writer lives   target    complete   set aside   done
        yes              any       any        any         remove the dead unfinished: it may be between its renames
        no               there     any        any         remove all
        no               missing   some       any         move a complete one in, remove the others
        no               missing   none       some        move one back that was set aside, remove the others
        no               missing   none       none        remove all
    """
    start = prefix(path)
    found = [Path(entry.path) for entry in os.scandir(path.parent) if entry.name.startswith(start)]
    aside = [name for name in found if name.name.startswith(f"{start}old-")]  # nobody locks these
    with contextlib.ExitStack() as claims:
        dead = [name for name in found if name not in aside and _claim(name, claims)]
        complete = [name for name in dead if name.name.startswith(f"{start}new-")]
        removed = [*aside, *dead]
        if len(removed) < len(found):  # a writer lives
            removed = [name for name in dead if name not in complete]
        elif os.path.lexists(path):
            pass
        elif complete:
            os.rename(complete[0], path)
            removed.remove(complete[0])
        elif aside:
            os.rename(aside[0], path)
            removed.remove(aside[0])
        for name in removed:
            remove(name)


def _claim(name: Path, claims: contextlib.ExitStack) -> bool:
    """Lock a dead process's temporary until `claims` ends; False if somebody lives who uses it, or may."""
    try:
        mode = os.lstat(name).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return False
        handle = os.open(name, os.O_RDONLY)
    except OSError:
        return False
    claims.callback(os.close, handle)
    return lock(handle) is True and _same_file(handle, name)


def remove(path: Path) -> None:
    """Remove a file or a directory with what is in it, as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
