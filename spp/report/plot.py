"""Charts: what all of them share, and the heat map of a model's zeros, layers × projections, a panel a stack of layers.

matplotlib (the extra `plot`) is imported when one is drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.certifying.certificate import SparsityReport
from spp.configs.checks import check_chart
from spp.errors import DependencyError
from spp.files import atomic_file
from spp.files.recognised import CHART_MARK, PICTURE
from spp.models.targets import OTHER_PROJECTIONS, PROJECTIONS

OURS, THEIRS = "#2a6f97", "#a9b4bd"
DPI = 130

# Of the heat map:
CELL, SMALL = (0.62, 0.2), 0.11  # inches of a cell, across and down; of one without a number
NUMBERED = 64, 24  # rows of all panels and columns of one up to which a cell says its number
MARGINS = 2.4, 1.5  # inches around a panel, for names and titles
TALLEST, WIDEST = 40.0, 30.0  # of a figure; cells of a larger model get smaller
TICKS = 40  # labels along an axis
COLOURS = ((0.0, "#f2f5f7"), (0.35, "#8fb4cb"), (0.6, "#2a6f97"), (1.0, "#0b2a3c"))
DARK = 0.4  # sparsity from which ink is white
WRONG = "#c0392b"
_NUMBERED = re.compile(r"^(?P<stack>.*?)(?:^|\.)(?P<layer>\d+)\.(?P<rest>.+)$")
_EXPERT = re.compile(r"(?:^|\.)experts?\.(?P<expert>\d+)\.")
Cell = tuple[float, int, bool]  # zeros or another sum, weights, all finite


def check_plot(path: Path) -> None:
    """Refuse a chart that could not be written, before anything is measured.

    Raises:
        ConfigError: the file's ending is not that of a known format.
        DependencyError: matplotlib is missing; the message names the extra.
    """
    check_chart("plot", path)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError("a chart needs matplotlib: pip install 'spp[plot]'") from error


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, *, overwrite: bool) -> None:
    """Write a figure to a file, whole or not at all, also over another chart of ours; its ending is the format."""
    ending = path.suffix.removeprefix(".")
    metadata = {"Software" if ending == "png" else "Creator": CHART_MARK}
    with atomic_file(path, overwrite=overwrite, kind=PICTURE) as temporary:
        figure.savefig(temporary, format=ending, dpi=DPI, metadata=metadata)


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Args:
        title: what it shows.
        rows, columns: labels.
        values: sparsity of each cell (rows × columns), None where there is no weight.
        wrong: (row, column) of cells with NaN or infinity.
        across: what the columns are.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    wrong: tuple[tuple[int, int], ...]
    across: str


def heat_panels(report: SparsityReport) -> list[Panel]:
    """Return the panels of a report: layers × projections of each stack, then layers × experts where they lie apart.

    A stack is what comes before the first number of a name ("model.layers"); what has no number is a last panel of one
    row. The experts of a layer count together in the first kind of panel.
    """
    return panels_of(report_cells(report))


def report_cells(report: SparsityReport) -> dict[str, Cell]:
    """Return the zeros of each weight of a report for `panels_of`, whose mean is its sparsity."""
    return {name: (t.zeros, math.prod(t.shape), t.valid) for name, t in report.tensors.items()}


def panels_of(weights: Mapping[str, Cell]) -> list[Panel]:
    """Return the panels of any mean over weights, as `heat_panels`.

    Args:
        weights: {name: (sum, number of weights in it, whether all of them are finite)}.
    """
    stacks: dict[str, dict[tuple[str, str], Cell]] = {}
    experts: dict[str, dict[tuple[str, str], Cell]] = {}
    for name, cell in weights.items():
        match = _NUMBERED.match(name)
        stack, layer, rest = (match["stack"], match["layer"], match["rest"]) if match else ("", "", name)
        kind = re.sub(r"(^|\.)\d+(?=\.)", "", rest.removesuffix(".weight")).removeprefix(".")
        _add(stacks.setdefault(stack, {}), layer, kind, cell)
        expert = _EXPERT.search(rest)
        if expert:
            _add(experts.setdefault(stack, {}), layer, expert["expert"], cell)
    panels = [_panel(stack or "other weights", cells, "") for stack, cells in stacks.items()]
    panels += [_panel(f"{stack}, by expert", cells, "expert") for stack, cells in experts.items()]
    return panels


def plot_sparsity(report: SparsityReport, title: str, path: Path, *, overwrite: bool) -> None:
    """Draw the heat map of a report.

    Args:
        report: of a model or a checkpoint.
        title: over the whole figure.
        path: a .png, .svg or .pdf file.
        overwrite: replace the file.

    Raises:
        ConfigError: the file's ending is not that of a known format.
        DependencyError: matplotlib is missing.
        OutputError: the file exists or cannot be written.
    """
    check_plot(path)
    from matplotlib.colors import LinearSegmentedColormap

    panels = heat_panels(report)
    colours = LinearSegmentedColormap.from_list("sparsity", COLOURS)
    rows, columns = sum(len(panel.rows) for panel in panels), max(len(panel.columns) for panel in panels)
    numbered = rows <= NUMBERED[0], columns <= NUMBERED[1]
    across, down = (cell if small else SMALL for cell, small in zip(CELL, numbered, strict=True))
    width = min(max(across * columns, 4.0) + MARGINS[0], WIDEST)
    height = min(down * rows + MARGINS[1] * len(panels) + 0.4, TALLEST)
    figure = new_figure(width, height)
    ratios = [len(panel.rows) for panel in panels]
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axes, panel in zip(grid.flat, panels, strict=True):
        image = _draw(axes, panel, colours, numbers=all(numbered))
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 4.0 / height), aspect=25, pad=0.02)
    bar.set_label("sparsity", fontsize=9)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "0.25", "0.5", "0.75", "1"], fontsize=8)
    figure.suptitle(f"{title}\nsparsity {report.sparsity:.4f}, {report.pattern}", fontsize=12)
    save_figure(figure, path, overwrite=overwrite)


def _draw(axes: Any, panel: Panel, colours: Any, *, numbers: bool) -> Any:
    import numpy as np
    from matplotlib.patches import Rectangle

    values = np.array([[np.nan if value is None else value for value in row] for row in panel.values], float)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1, aspect="auto")
    for which, labels in (("x", panel.columns), ("y", panel.rows)):
        every = -(-len(labels) // TICKS)
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_ticks(range(0, len(labels), every), labels[::every], fontsize=8)
        axis.set_ticks(np.arange(len(labels) + 1) - 0.5, minor=True)
    if max(map(len, panel.columns)) > 6:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_title(panel.title, fontsize=10, loc="left")
    if panel.rows != ("",):
        axes.set_ylabel("layer", fontsize=9)
    if panel.across:
        axes.set_xlabel(panel.across, fontsize=9)
    axes.grid(which="minor", color="white", linewidth=1.0 if numbers else 0.4)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for i, row in enumerate(panel.values):
        for j, value in enumerate(row):
            wrong = (i, j) in panel.wrong
            if wrong:
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=WRONG))
            if value is not None and numbers:
                text, ink = (f"{value:.2f}", "white" if value > DARK else "#1c1c1c") if not wrong else ("NaN", "white")
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
    return image


def _add(cells: dict[tuple[str, str], Cell], row: str, column: str, cell: Cell) -> None:
    total, count, finite = cells.get((row, column), (0, 0, True))
    cells[row, column] = (total + cell[0], count + cell[1], finite and cell[2])


def _panel(title: str, cells: dict[tuple[str, str], Cell], across: str) -> Panel:
    rows = sorted({row for row, _ in cells}, key=lambda row: int(row or -1))
    columns = sorted(dict.fromkeys(column for _, column in cells), key=int if across else _place)
    found = [[cells.get((row, column)) for column in columns] for row in rows]
    values = tuple(tuple(None if cell is None else cell[0] / max(1, cell[1]) for cell in row) for row in found)
    wrong = tuple((i, j) for i, row in enumerate(found) for j, cell in enumerate(row) if cell and not cell[2])
    return Panel(title, tuple(rows), tuple(columns), values, wrong, across)


def _place(column: str) -> tuple[int, str]:
    """Order projections as a layer computes them where their names tell, others by name behind them."""
    order: Sequence[str] = (*PROJECTIONS, *OTHER_PROJECTIONS)
    last = column.rpartition(".")[2]
    return (order.index(last) if last in order else len(order), column)
