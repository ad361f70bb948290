"""Charts of measured ratios; matplotlib (the extra `plot`) is imported when one is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp.report.plot import OURS, THEIRS, check_plot, new_figure, save_figure

COLUMNS = 2  # of panels
WIDTH = 6.4  # of one, in inches


def plot_ratios(
    panels: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
    conditions: str,
    path: Path,
    *,
    overwrite: bool,
    field: str = "this_to_reference_wall",
    axis: str = "time",
) -> None:
    """Draw one panel of horizontal bars for each entry: every contender over the first, with p20 … p80.

    Args:
        panels: rows as `harness.compare` makes them, by the title of their panel.
        title: over the whole chart.
        conditions: under it: the machine, the versions.
        path: the file; its ending is the format.
        overwrite: replace the file.
        field: of the rows: a spread (median, p20, p80), or a number.
        axis: what is compared.
    """
    check_plot(path)
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
    conditions = textwrap.fill(conditions, round(15 * WIDTH * columns))
    figure.supxlabel(conditions, fontsize=7, color="#555555")
    save_figure(figure, path, overwrite=overwrite)


def _spread(value: Any) -> tuple[float, float, float]:
    if isinstance(value, Mapping):
        return value["median"], value["p20"], value["p80"]
    return float(value), float(value), float(value)
