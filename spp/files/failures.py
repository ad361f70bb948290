"""The system's error for an output that cannot be written, as an OutputError with a remedy."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from spp.errors import OutputError

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


def output_error(error: BaseException, target: str | os.PathLike[str]) -> OutputError:
    """Return the OutputError, with a remedy, for a failure to write `target`."""
    if isinstance(error, OutputError):
        return error
    number = errno_of(error)
    result = OutputError(f"cannot write {os.fspath(target)}: {_REMEDIES.get(number or 0) or error}")
    result.errno = number
    return result


def is_failure_to_write(error: BaseException, temporary: Path) -> bool:
    """Whether an error inside the block of an output says that `temporary` cannot be written."""
    if isinstance(error, OutputError) or not isinstance(error, Exception):
        return False
    number = errno_of(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return True
    name = getattr(error, "filename", None)
    return number is not None and isinstance(name, str) and Path(name).is_relative_to(temporary)


def errno_of(error: BaseException) -> int | None:
    """Return the system's number of an error, also where a library has made another error of it."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))  # how libraries written in Rust say it
    return int(match[1]) if match else None
