"""Shared by the commands: printing tables and paths, or JSON; warnings on one line, progress, choice of a device."""

from __future__ import annotations

import atexit
import codecs
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from spp.cli.spelling import Spellings, spoken
from spp.configs.checks import finite
from spp.errors import ConfigError, Marked, OutputExistsError, SPPError, SPPWarning, StreamingError, arg

if TYPE_CHECKING:
    from spp.files.recognised import FileKind
    from spp.files.tables import Table

_FOR_DEVELOPERS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)  # nothing that a user can mend
_spellings: Spellings | None = {}  # of the command that runs


def speak_of(spellings: Spellings | None) -> None:
    """Set how messages of the library spell arguments: as the command that runs does."""
    global _spellings
    _spellings = spellings


def said(message: object) -> str:
    """Return a message, or an exception of the library, in the words of the command that runs."""
    return spoken(message, _spellings)


def say(text: str = "") -> None:
    """Print a line of results; with --json they are in the answer."""
    if not in_json():
        print(text, flush=True)


def note(text: str) -> None:
    """Print a line about progress or a problem, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Print a table: drawn on a terminal that is wide enough, else in plain aligned columns."""
    if in_json():
        return None
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    text = table.text()
    width = max(map(len, text.splitlines())) + 2 * len(table.columns)
    if not sys.stdout.isatty() or width > Console().width:
        return say(text)
    drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(table.columns):
        drawn.add_column(escape(column), justify="right" if table.numeric(i) else "left")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    Console().print(drawn)


def wrote(path: Path | str) -> None:
    """Say where an output is."""
    say(f"wrote {path}")
    if _answer is not None:
        _answer.wrote.append(str(path))


# ---- With --json: no tables, and one object on one line, which is the last that is printed.


class _Answer:
    """The answer of a command.

    Attributes:
        values: its report, and of a failure the error; None before there is either.
        wrote: the paths of its outputs.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] | None = None
        self.wrote: list[str] = []


_answer: _Answer | None = None  # of the command that runs; None without --json


def in_json() -> bool:
    """Whether the command that runs is to answer in JSON."""
    return _answer is not None


def speak_json(wanted: bool) -> None:
    """Set whether the command that runs is to answer in JSON; nothing is answered yet."""
    global _answer
    _answer = _Answer() if wanted else None


def answer(values: Mapping[str, Any]) -> None:
    """Add to what the command answers with --json."""
    if _answer is not None:
        _answer.values = {**(_answer.values or {}), **values}


@contextmanager
def collecting() -> Iterator[dict[str, Any]]:
    """Yield a dict that has, at the end, the object that a command within would print with --json."""
    global _answer
    values: dict[str, Any] = {}
    inner = _Answer()
    before, _answer = _answer, inner
    try:
        with redirect_stdout(sys.stderr):
            yield values
        values.update(json.loads(json_line({**(inner.values or {}), "wrote": inner.wrote})))
    finally:
        _answer = before
        if before is not None:
            before.wrote += inner.wrote


def fail(error: BaseException) -> None:
    """Answer, with --json, that the command failed: "error", "type", and "option" and "remedy" where they are known."""
    if _answer is None or "error" in (_answer.values or {}):
        return
    answer({"error": told(error), "type": type(error).__name__})
    if isinstance(error, Marked):
        known = (_spellings or {}).get(error.option or "")
        if known is not None:
            answer({"option": known.on})
        if error.marked_remedy:
            answer({"remedy": said(SPPError(error.marked_remedy))})
    typed: Any = getattr(error, "param", None)  # of a mistake in what was typed
    if typed is not None:
        placed = typed.param_type_name == "argument"
        answer({"option": typed.metavar or typed.name.upper() if placed else max(typed.opts, key=len)})
    elif unknown := getattr(error, "option_name", None):
        answer({"option": unknown})


def told(error: BaseException) -> str:
    """Return the message of an error as the program prints it."""
    if isinstance(error, KeyboardInterrupt):
        return said(error) or "interrupted"
    if isinstance(error, OSError) and not isinstance(error, SPPError):  # of a path that no check came to
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror or error}"
    typed = getattr(error, "format_message", None)
    return str(typed()) if typed is not None else said(error) or type(error).__name__


@contextmanager
def answering(wanted: bool) -> Iterator[None]:
    """Run a command; with --json an error becomes its answer, and what libraries print goes to standard error."""
    speak_json(wanted)
    if not wanted:
        yield
        return
    try:
        with redirect_stdout(sys.stderr):
            yield
    except BaseException as error:
        fail(error)
        raise
    answer({})


def print_answer() -> None:
    """Print the answer, if there is one, as the last that this process prints; of several processes, the first does."""
    if _answer is None or _answer.values is None or os.environ.get("RANK", "0") != "0":
        return
    line = json_line({**_answer.values, "wrote": _answer.wrote})
    if sys.stderr is not None:
        sys.stderr.flush()
    print(line, flush=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.end()


def json_line(values: Mapping[str, Any]) -> str:
    """Return an object as one line of JSON in ASCII, with null for what JSON has no number for.

    Args:
        values: JSON-ready values; of numbers that are not finite see spp.configs.checks.finite.

    Example:
        >>> json_line({"loss": {"dense": 2.5, "pruned": float("inf")}})
        '{"loss": {"dense": 2.5, "pruned": null}, "non_finite": {"/loss/pruned": "Infinity"}}'
    """
    return json.dumps(finite(values), allow_nan=False, default=str)


@contextmanager
def streaming(output: Path, instead: str) -> Iterator[None]:
    """Say how it goes on where a command that streams block by block cannot, or is interrupted: a context manager.

    Args:
        output: what the command makes.
        instead: what it does where the model cannot be streamed; that error ends here.
    """
    from spp.pruning.work import work_folder

    try:
        yield
    except StreamingError as error:
        note(f"{said(error)}: {instead}")
    except KeyboardInterrupt:
        folder = work_folder(Path(os.path.realpath(output)))
        if folder.exists():
            note(f"interrupted; what is finished is kept in {folder}: the same command goes on behind it")
        raise


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say on standard error that something long begins, and how long it took."""
    note(f"{text} …")
    start = time.perf_counter()
    from spp.files.tables import time_text  # after the line: it may be the first to load torch

    try:
        yield
    except KeyboardInterrupt:  # typer turns it into exit code 130 and says nothing
        note(f"{text}: interrupted after {time_text(time.perf_counter() - start)}")
        raise
    note(f"{text}: {time_text(time.perf_counter() - start)}")


@contextmanager
def log() -> Iterator[None]:
    """Print what the library logs on standard error, without breaking a progress bar."""
    logger, handler = logging.getLogger("spp"), _Log()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        from tqdm import tqdm

        level = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(level + record.getMessage(), file=sys.stderr)


def quiet_libraries() -> None:
    """Keep transformers' progress bars out of pipes and logs."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def quiet_imports() -> None:
    """Leave out what other libraries log while they are imported: kernels that this machine has no use for."""
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def show_warnings_on_one_line() -> None:
    """Print spp's own warnings as `warning: …`, without file and source line, and no deprecations among libraries."""
    before = warnings.showwarning

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, SPPWarning):
            note(f"warning: {said(message)}")
        elif not issubclass(category, _FOR_DEVELOPERS):
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = showwarning
    # Changes nothing but that what an earlier command of this process was told is not taken for said.
    warnings.filterwarnings("default", category=SPPWarning, append=True)


def pick_device(device: str) -> str:
    """Return the device that `auto`, `cpu` or `cuda` means.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{arg('device')} is cuda, but this torch ({torch.__version__}) finds no CUDA device")
    return device


def check_directory(path: Path, overwrite: bool, sources: Iterable[tuple[str, object]]) -> None:
    """Refuse a directory to write that exists, before any model is looked for.

    Whether it may be replaced is decided by the function that writes it, which knows what goes into it.

    Args:
        path: the directory.
        overwrite: whether it may exist.
        sources: what is read, such as "the base", and its directory or hub id: no option lets one be replaced.

    Raises:
        ConfigError: it exists, and is, contains or lies inside a source.
        OutputExistsError: it exists and is not to be replaced, or is a file.
    """
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; choose the name of a directory")
    if path.exists() and not overwrite:
        from spp.files.carry import refuse_overlap

        for what, source in sources:
            if Path(str(source)).is_dir():
                refuse_overlap(path, Path(str(source)), what)
        remedy = f"choose another output, or replace it with {arg('overwrite', True)}"
        raise OutputExistsError(f"{path} exists", remedy=remedy)


def check_file(path: Path, overwrite: bool, kind: FileKind) -> None:
    """Refuse a file to write that exists, or is not of the kind that replaces it; who writes it checks again.

    Raises:
        OutputExistsError: it exists and is not to be replaced, or is a directory.
        OutputError: it could not be written.
    """
    from spp.files import check_target

    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory; choose the name of a file")
    if path.exists() and not overwrite:
        remedy = f"choose another file, or replace it with {arg('overwrite', True)}"
        raise OutputExistsError(f"{path} exists", remedy=remedy)
    check_target(path, overwrite=overwrite, kind=kind)


# ---- Standard output and error, which no letter, closed pipe or missing terminal makes fail.

_PLAIN = {
    "…": "...",
    "×": "x",
    "–": "-",
    "—": "-",
    "−": "-",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "α": "alpha",
    "β": "beta",
}
_LETTERS = "spp.letters"  # the way in which letters are replaced that an encoding lacks


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Return what is printed for letters that an encoding lacks, and where they end."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    plain = (_PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in letters)
    return "".join(plain), error.end


codecs.register_error(_LETTERS, _replaced)


class _Stream:
    """A stream that takes every text: letters that its encoding lacks are replaced, what nobody reads is dropped.

    Attributes:
        failure: why text could not be written that somebody would have read: a disk is full.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stream"], name)

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(ValueError):  # it is closed
            return self._stream is not None and self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        """Write a text, as far as it can be."""
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, _LETTERS).decode(self.encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def end(self) -> None:
        """Drop what libraries write when Python ends: bars that were left open, warnings."""
        if self._stream is not None and _is_own(self._stream):
            atexit.register(_discard, self._stream)  # the last to register is the first to run

    def _lose(self, error: OSError | ValueError) -> None:
        """Drop all that follows: the stream is closed, or its reader is gone, or it cannot be written to."""
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            self.failure = error
        stream, self._stream = self._stream, None
        if stream is not None and _is_own(stream):  # what waits in its buffer would fail again when Python ends
            _discard(stream, flush=False)


def _is_own(stream: TextIO) -> bool:
    return any(stream is own for own in (sys.__stdout__, sys.__stderr__))


def _discard(stream: TextIO, *, flush: bool = True) -> None:
    """Let all that is written to a stream from now on, by whomever, go nowhere."""
    with suppress(OSError, ValueError):
        if flush:
            stream.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Let printing never fail, and give the two streams back as they were: a context manager.

    Where results could not be written that somebody waits for, exit code 0 becomes 1 with a message.
    """
    before = sys.stdout, sys.stderr
    out, err = _Stream(before[0]), _Stream(before[1])
    sys.stdout, sys.stderr = out, err
    try:
        yield
        _report(out)
    except SystemExit as stop:
        stop.code = stop.code or (1 if _report(out) else stop.code)
        raise
    finally:
        err.flush()
        sys.stdout, sys.stderr = before


def _report(out: _Stream) -> bool:
    """Return whether standard output could not be written, and say so."""
    out.flush()
    if out.failure is not None:
        note(f"error: standard output cannot be written: {out.failure.strerror or out.failure}")
    return out.failure is not None
