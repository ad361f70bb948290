"""The harness that every benchmark runs in: its options, its child processes, its table, files and errors.

Contenders are measured as `spp compare` does it (spp.comparing.measure): interleaved, in ratios taken round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spp.cli.spelling import spoken
from spp.comparing.measure import (
    Memory,
    Sample,
    Spread,
    compare,
    environment,
    in_child,
    interleave,
    measure_memory,
    ratio,
    require_peft,
    spread,
)
from spp.errors import ConfigError, DependencyError, OutputExistsError, SPPError
from spp.files import atomic_file, write_json
from spp.files.provenance import Provenance, installed
from spp.files.recognised import MEASUREMENTS, PICTURE, FileKind
from spp.report import Table
from spp.report.plot import OURS, THEIRS, check_plot, new_figure, save_figure

__all__ = [
    "Memory",
    "Sample",
    "Spread",
    "compare",
    "environment",
    "in_child",
    "installed",
    "interleave",
    "measure_memory",
    "ratio",
    "require_peft",
    "spread",
]
COLUMNS, WIDTH = 2, 6.4  # of the panels of a chart, and the width of one in inches
Options = argparse.Namespace
Rows = Sequence[dict[str, Any]]


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a benchmark, `python -m benchmarks.<name>`, with --child: what a child process measures."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def run(
    options: Options,
    child: Callable[[Options], Memory | Mapping[str, int]],
    measure: Callable[[Options], Rows],
    table: Callable[[Rows], Table],
    plot: Callable[[Rows, Options], object],
) -> None:
    """Run a benchmark: print its table and what it was measured with; write the files of --out and --plot.

    Args:
        options: parsed and checked.
        child: measures what --child names, in this process; it is printed for the parent.
        measure: returns the rows.
        table, plot: show them.
    """
    if options.child:
        found = child(options)
        print(json.dumps(vars(found) if isinstance(found, Memory) else found))
        return
    rows = measure(options)
    print(table(rows).text())
    print(Provenance.from_dict(rows[0]).line)
    if options.out:
        write_rows(rows, options.out, overwrite=options.overwrite)
    if options.plot:
        plot(rows, options)
        print(f"wrote {options.plot}")


def exiting(main: Callable[[], object]) -> None:
    """Call the function of a program; an error of spp is one message on standard error and exit code 1."""
    try:
        main()
    except SPPError as error:
        sys.exit(f"error: {spoken(error, None)}")


def require_bitsandbytes() -> Any:
    """Import bitsandbytes, or say which extra brings it."""
    try:
        import bitsandbytes
    except ImportError as error:
        extra = "pip install 'spp[quantized]'"
        raise DependencyError(f"the contenders on quantized weights need bitsandbytes: {extra}") from error
    return bitsandbytes


def add_common_options(
    parser: argparse.ArgumentParser, *, device: str = "cpu", dtype: str = "float32", plot: bool = True
) -> None:
    """Add the options that every benchmark has; of one without a chart all but --plot."""
    parser.add_argument("--device", default=device, help="cpu, cuda or cuda:N (default: %(default)s)")
    told = "of weights and activations (default: %(default)s)"
    parser.add_argument("--dtype", default=dtype, choices=("float32", "bfloat16", "float16", "float64"), help=told)
    parser.add_argument("--threads", type=int, help="threads of the processor (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    if plot:
        parser.add_argument("--plot", type=Path, help="draw the table as a chart: a .png, .svg or .pdf file")
    files = "the files of --out and --plot" if plot else "the file of --out"
    parser.add_argument("--overwrite", action="store_true", help=f"replace {files}")
    parser.set_defaults(**({} if plot else {"plot": None}))


def add_timing_options(parser: argparse.ArgumentParser, *, rounds: int = 10, warmup: int = 2) -> None:
    """Add the options of a benchmark that takes turns."""
    told = "(default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds that count {told}")
    parser.add_argument("--warmup", type=int, default=warmup, help=f"rounds before them that do not {told}")


def check_common_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, and set the number of threads.

    Raises:
        ConfigError: an option makes no sense; the message names it.
    """
    for name in ("rounds", "warmup", "threads"):
        value = getattr(options, name, None)
        if value is not None and value < (name != "warmup"):
            raise ConfigError(f"--{name} is {value}; it must be at least {int(name != 'warmup')}")
    _check_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for path, kind in ((options.out, MEASUREMENTS), (options.plot, PICTURE)):
        if path is not None and path.exists() and not options.overwrite:
            raise OutputExistsError(f"{path} exists; choose another name, or pass --overwrite")
        if path is not None:
            _rehearse_writing(path, kind)
    if options.plot is not None:
        check_plot(options.plot)


def _check_device(device: str) -> None:
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not found:
        raise ConfigError(f"--device is {device!r}; known: cpu, cuda, cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {device}, but this torch ({torch.__version__}) finds no CUDA device")
    if device != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device is {device}, but the CUDA devices here are {torch.cuda.device_count()}, from cuda:0"
        )


def _rehearse_writing(path: Path, kind: FileKind) -> None:
    """Raise now what writing the file after the measurements would raise; nothing stays behind."""
    with contextlib.suppress(_RehearsalError), atomic_file(path, overwrite=True, kind=kind):
        raise _RehearsalError


class _RehearsalError(Exception):
    """Ends a rehearsal before the file is put in its place."""


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path, *, overwrite: bool) -> None:
    """Write rows of measurements as JSON, atomically; an existing file of measurements is kept unless `overwrite`."""
    with atomic_file(path, overwrite=overwrite, kind=MEASUREMENTS) as temporary:
        write_json(temporary, {"rows": [dict(row) for row in rows]})
    print(f"wrote {path}")


def child_arguments(options: Options, *names: str) -> list[str]:
    """Return the options of these names, as far as they are given, as a command line for a child process."""
    values = {name: getattr(options, name.replace("-", "_")) for name in names}
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def require_positive(options: Options, *names: str) -> None:
    """Raise a ConfigError for an option, or one of its values, below 1."""
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < 1:
                raise ConfigError(f"--{name} is {one}; it must be at least 1")


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module, beyond: Iterable[Tensor] = ()) -> int:
    """Return how many bytes a forward leaves behind for its backward, each piece of memory counted once.

    Args:
        forward: runs the forward with gradients and returns its result.
        module: its parameters and buffers do not count: they are there anyway.
        beyond: more tensors that do not count.
    """
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # an address is not used twice while its tensor lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(forward())
    for tensor in (*module.parameters(), *module.buffers(), *beyond):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def plot_ratios(
    panels: Mapping[str, Rows],
    title: str,
    measured: Mapping[str, Any],
    options: Options,
    *,
    field: str = "this_to_reference_wall",
    axis: str = "time",
) -> None:
    """Draw one panel of horizontal bars for each entry: every contender over the first, with p20 … p80.

    Args:
        panels: rows as `compare` makes them, by the title of their panel.
        title: over the whole chart.
        measured: a row; its provenance stands under the chart.
        options: with the file of --plot, whose ending is the format, and --overwrite.
        field: of the rows: a spread (median, p20, p80), or a number.
        axis: what is compared.
    """
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    bars = max(len(rows) for rows in panels.values())
    height = lines * (0.36 * bars + 1.1) + 1.0
    figure = new_figure(WIDTH * columns, height)
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, rows) in zip(grid.flat, panels.items(), strict=False):
        names = [row["contender"] for row in rows]
        values = [_spread(row[field]) for row in rows]
        medians = [median for median, _, _ in values]
        errors = [[m - low for m, low, _ in values], [high - m for m, _, high in values]]
        colours = [OURS if one.startswith("spp") else THEIRS for one in names]
        axes.barh(range(len(rows)), medians, color=colours, xerr=errors, error_kw={"elinewidth": 1, "capsize": 2})
        right = max(high for _, _, high in values)
        for i, (median, _, high) in enumerate(values):
            axes.text(high + 0.015 * right, i, f"{median:.2f}", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), names)
        axes.set_xlim(0, 1.12 * right)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.invert_yaxis()
        axes.set_title(name, fontsize=11)
        axes.set_xlabel(f"{axis}, relative to {names[0]}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    conditions = textwrap.fill(Provenance.from_dict(measured).line, round(15 * WIDTH * columns))
    figure.supxlabel(conditions, fontsize=7, color="#555555")
    save_figure(figure, options.plot, overwrite=options.overwrite)


def _spread(value: Any) -> tuple[float, float, float]:
    if isinstance(value, Mapping):
        return value["median"], value["p20"], value["p80"]
    return float(value), float(value), float(value)
