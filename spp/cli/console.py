"""Shared by the commands: printing tables and paths, warnings on one line, progress, the choice of a device."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from spp.cli.options import Spellings, spoken
from spp.errors import ConfigError, OutputExistsError, SPPWarning, arg

if TYPE_CHECKING:
    from spp.files.recognised import FileKind
    from spp.report import Table

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
    """Print a line of results."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print a line about progress or a problem, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Print a table: drawn on a terminal that is wide enough, else in plain aligned columns."""
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


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say on standard error that something long begins, and how long it took."""
    from spp.report import time_text

    note(f"{text} …")
    start = time.perf_counter()
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
