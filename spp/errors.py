"""Every exception and warning that spp raises.

    SPPError
    ├── ConfigError (ValueError)          an option that makes no sense: r, scaling, dropout, …
    │   └── PatternError                  a sparsity pattern that makes no sense, or does not fit a shape
    ├── TargetError (ValueError)          no module, or the wrong one, is meant by target_modules
    ├── WrapError (RuntimeError)          wrapped twice, not wrapped, still wrapped
    ├── NonFiniteError (ValueError)       NaN or infinity in a base weight, an adapter, an activation or a result
    ├── MaskError (ValueError)            a zero pattern is not the one that it must be
    ├── AdapterError (ValueError)         an adapter does not fit its model
    ├── CheckpointError (ValueError)      a file is missing, truncated, corrupt, unsafe or from a newer version
    │   └── StreamingError                its weights cannot be taken from the disk part by part
    ├── OutputError (OSError)             a path cannot be written: read-only, disk full
    │   └── OutputExistsError (FileExistsError)
    ├── HubError (ConnectionError)        the hub cannot be reached, or refuses
    ├── DataError (ValueError)            training, calibration or evaluation data is empty or malformed
    ├── GradientError (RuntimeError)      a derivative that does not exist here was asked for
    ├── RankError (RuntimeError)          another rank of several failed, or was lost
    └── DependencyError (ImportError)     an optional package is missing; the message names the extra
    SPPWarning (UserWarning)

The second base class is the built-in one that a caller who knows nothing of spp would catch.

A message names arguments by `arg` and functions by `call`. Python shows them as Python writes them, `overwrite=True`
and `spp.certify(dir)`; the command line renders the same message with its own spelling, `--overwrite` and
`spp certify DIRECTORY` (spp.cli.spelling).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_OPEN, _NEXT, _CLOSE = "\x0e", "\x1f", "\x0f"  # around a mention and between its parts: no message holds these
_MENTION = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True)
class Mention:
    """An argument, or a call of a function of the package root, that a message names.

    Attributes:
        function: the function that is called, such as "certify"; empty for an argument alone.
        places: the positional arguments of the call, as Python writes them.
        options: (name, repr of the value) of each keyword argument; None as value names the argument alone, and an
            empty one leaves the value open.
    """

    function: str
    places: str
    options: tuple[tuple[str, str | None], ...]

    def python(self) -> str:
        """Return it as Python writes it."""
        options = [name if value is None else f"{name}={value}" for name, value in self.options]
        if not self.function:
            return options[0]
        inside = ", ".join(filter(None, (self.places, *options)))
        return f"spp.{self.function}({inside})" if inside else f"spp.{self.function}"

    def marked(self) -> str:
        """Return it as a part of a message."""
        options = [part for name, value in self.options for part in (name, "" if value is None else f"={value}")]
        return f"{_OPEN}{_NEXT.join((self.function, self.places, *options))}{_CLOSE}"


def arg(name: str, *value: object) -> str:
    """Return an argument as messages name it.

    Args:
        name: of the argument.
        value: nothing, `...` for an open value, or the value.

    Example:
        >>> str(ConfigError(f"{arg('lr')} is 0; pass {arg('lr', 0.01)} or more, and {arg('steps', ...)}"))
        'lr is 0; pass lr=0.01 or more, and steps='
    """
    told = None if not value else "" if value[0] is ... else repr(value[0])
    return Mention("", "", ((name, told),)).marked()


def call(function: str, places: str = "", **options: object) -> str:
    """Return a call of a function of the package root as messages name it.

    Args:
        function: its name.
        places: its positional arguments, as Python writes them; without any arguments the function alone is named.
        options: its keyword arguments.

    Example:
        >>> str(SPPError(f"{call('certify', 'dir', deep=True)} writes them"))
        'spp.certify(dir, deep=True) writes them'
    """
    return Mention(function, places, tuple((name, repr(value)) for name, value in options.items())).marked()


def render(marked: str, say: Callable[[Mention], str] = Mention.python) -> str:
    """Return a message with its mentions as `say` spells them; by default as Python does."""

    def said(match: re.Match[str]) -> str:
        function, places, *parts = match[1].split(_NEXT)
        values = [value[1:] if value else None for value in parts[1::2]]
        return say(Mention(function, places, tuple(zip(parts[::2], values, strict=True))))

    return _MENTION.sub(said, marked)


class Marked:
    """An exception or warning whose message may name arguments and calls.

    Args:
        message: with `arg` and `call`.
        option: the name of the argument that is at fault; None takes the one that the message begins with.
        remedy: what to do about it; it ends the message.

    Attributes:
        marked: the whole message before it is rendered.
        option: the name of the argument at fault, as in Python; None where there is none.
        remedy: what to do about it, as Python spells it; None where the message says all.
        marked_remedy: the same before it is rendered.
    """

    def __init__(self, message: object = "", *, option: str | None = None, remedy: str | None = None) -> None:
        self.marked = str(message) if remedy is None else f"{message}; {remedy}"
        first = _MENTION.match(self.marked)
        self.option = option or (first[1].split(_NEXT)[2] if first and first[1].startswith(_NEXT) else None)
        self.remedy = None if remedy is None else render(remedy)
        self.marked_remedy = remedy
        super().__init__(render(self.marked))  # type: ignore[call-arg]  # of the exception beside this class


class SPPError(Marked, Exception):
    """Base class of everything that spp raises on purpose; `option` and `remedy` as in Marked."""


class ConfigError(SPPError, ValueError):
    """An option has a value that makes no sense."""


class PatternError(ConfigError):
    """A sparsity pattern is malformed or does not fit a weight's shape."""


class TargetError(SPPError, ValueError):
    """The target modules cannot be found, or cannot be adapted."""


class WrapError(SPPError, RuntimeError):
    """A model is in the wrong state: wrapped already, not wrapped, or still wrapped."""


class NonFiniteError(SPPError, ValueError):
    """NaN or infinity where a finite number is needed."""


class MaskError(SPPError, ValueError):
    """The zero pattern of a weight is not the one that it must be."""


class AdapterError(SPPError, ValueError):
    """An adapter does not fit the model that it is loaded onto."""


class CheckpointError(SPPError, ValueError):
    """A file that is read is missing, truncated, corrupt, unsafe or of an unknown version."""


class StreamingError(CheckpointError):
    """A checkpoint stores its weights otherwise than its model has them, so parts of it cannot be loaded alone."""


class OutputError(SPPError, OSError):
    """A path cannot be written."""


class OutputExistsError(OutputError, FileExistsError):
    """The output exists already and overwriting was not asked for."""


class HubError(SPPError, ConnectionError):
    """The Hugging Face hub cannot be reached, or refuses what it is asked."""


class DataError(SPPError, ValueError):
    """Training, calibration or evaluation data is empty or malformed."""


class GradientError(SPPError, RuntimeError):
    """A derivative was asked for that the fast path does not have."""


class RankError(SPPError, RuntimeError):
    """Another rank of several has failed, or was lost; the message is that rank's."""


class DependencyError(SPPError, ImportError):
    """An optional package is missing."""


class SPPWarning(Marked, UserWarning):
    """Something is allowed, but probably not what was meant."""


def some_of(names: Iterable[str], most: int = 8) -> str:
    """Return names for a message, sorted: all of them, or the first `most` and an ellipsis."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


# ---- The system's error for an output that cannot be written, as an OutputError with a remedy.

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
