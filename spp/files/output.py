"""A file that several threads write, each at its own place; a large one around the system's cache.

A checkpoint of gigabytes that goes through the cache is copied there, drives out what other programs read, and waits
for the disk at the end. Where the system can (O_DIRECT), whole pages go to the disk straight from memory, if they begin
in a page of memory as they do in the file. The rest of a piece, less than a page at either end, is kept and written the
usual way when the others are done; so is everything where the system cannot.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress

import numpy as np

PAGE = 4096  # bytes that a disk writes as one, at most, and the pages of the system's cache
LARGE = 2**29  # bytes of a file from which on it goes around the cache; what is smaller is soon read again
_AT_ONCE = 2**18  # bytes through the cache; with more, the system looks for larger pieces of free memory, and is slower
_MOST_KEPT = 2**26  # bytes of ends of pieces; those of a file of 30 GB

_CANNOT = (errno.EINVAL, errno.ENOTSUP)


class OutputFile:
    """A new file, of which every byte is written once.

    Args:
        path: what is there is written over.
        size: what the file will have.

    Raises:
        OSError: it cannot be made. So do the methods where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by close()
        self._lock = threading.Lock()
        self._direct = -1
        self._ends: list[tuple[int, bytes]] = []
        if size >= LARGE and hasattr(os, "O_DIRECT"):
            with suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)

    def finish(self) -> None:
        """Write what is left."""
        with self._lock:
            ends, self._ends = self._ends, []
        for at, data in sorted(ends):
            self._through(at, memoryview(data))

    def close(self) -> None:
        """Close it, finished or not."""
        self._file.close()
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def put(self, at: int, data: memoryview) -> None:
        """Write some bytes, from byte `at` of the file on."""
        first = min(-at % PAGE, len(data))
        whole = (len(data) - first) // PAGE * PAGE
        if self._direct < 0 or whole < _AT_ONCE or _address(data[first:]) % PAGE:
            self._through(at, data)
            return
        done = first + self._around(at + first, data[first : first + whole])
        if done < first + whole:
            self._through(at + done, data[done : first + whole])
        ends = [(at, bytes(data[:first])), (at + first + whole, bytes(data[first + whole :]))]
        with self._lock:  # a write through the cache would wait for those around it
            self._ends += [end for end in ends if end[1]]
            many = len(self._ends) * PAGE > 2 * _MOST_KEPT
        if many:
            self.finish()

    def _around(self, at: int, data: memoryview) -> int:
        """Write whole pages around the cache; return how many bytes it took: none, where it takes none."""
        done = 0
        while done < len(data):
            try:
                count = os.pwrite(self._direct, data[done:], at + done)
            except OSError as error:
                if error.errno in _CANNOT:
                    break
                raise
            done += count
            if count % PAGE:
                break
        return done

    def _through(self, at: int, data: memoryview) -> None:
        while data:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self._file.fileno(), data[:_AT_ONCE], at)
            else:
                with self._lock:
                    self._file.seek(at)
                    count = self._file.write(data) or 0
            data, at = data[count:], at + count


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)
