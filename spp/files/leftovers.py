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
