"""Temporaries beside an output: made, locked while their writer lives, and tidied up after a writer that was killed.

`.name.spp-tmp-x` is being written, `.name.spp-new-x` is complete, `.name.spp-old-x` is what it replaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_LONGEST_NAME = 150  # bytes of the target's name that fit, with what is added, into a file name


def recover(target: str | os.PathLike[str]) -> None:
    """Remove what killed writers of `target` left beside it, and finish an exchange that one of them had begun.

    Leftovers of live writers stay. Nothing is raised: on a disk that is read-only there is nothing to recover.
    """
    with contextlib.suppress(OSError):
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


def lock(handle: int) -> bool | None:
    """Lock without waiting: True, False when another process holds it, None when the system has no such locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def recover_siblings(path: Path) -> None:
    """`recover` for a path without symbolic links; what the system refuses is an OSError."""
    start = prefix(path)
    found = [entry.path for entry in os.scandir(path.parent) if entry.name.startswith(start)]
    dead: dict[str, int] = {}
    try:
        alive = False
        for name in found:
            if f"{start}old-" in name:
                continue
            handle = _claim(name)
            if handle is None:
                alive = True
            else:
                dead[name] = handle
        complete = [n for n in dead if f"{start}new-" in n]
        aside = [n for n in found if f"{start}old-" in n]
        if alive:  # a live writer may be between its renames: leave what belongs to an exchange alone
            aside = complete = []
        elif not os.path.lexists(path) and (complete or aside):
            os.rename((complete or aside)[0], path)
        for name in [*aside, *dead]:
            if name in complete or f"{start}new-" not in name:
                remove(Path(name))
    finally:
        for handle in dead.values():
            os.close(handle)


def _claim(name: str) -> int | None:
    """Return a locked handle of a dead process's temporary, None if somebody lives who uses it, or may."""
    try:
        if not stat.S_ISREG(os.lstat(name).st_mode) and not stat.S_ISDIR(os.lstat(name).st_mode):
            return None
        handle = os.open(name, os.O_RDONLY)
    except OSError:
        return None
    if lock(handle) is True and _same_file(handle, Path(name)):
        return handle
    os.close(handle)
    return None


def remove(path: Path) -> None:
    """Remove a file or a directory with what is in it, as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
