"""Quality against cost: perplexity over the time of a step, and over the parameters that train."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spp.comparing.tables import AT_AN_END, Summary, notes, summaries, title
from spp.configs.comparing import REFERENCE, parse_contender
from spp.errors import DataError
from spp.report.plot import OURS, check_plot, new_figure, save_figure

FILLS = "#c2543d"  # of contenders that do not keep the zeros
_PEERS = "#77848e"
_DECADE = 10.0  # a logarithmic axis that spans less has labels at round numbers, not at powers
_ROOM = 0.1  # beside the points, as a part of what they span
Points = Mapping[int, tuple[float, Summary]]  # by number, each with its place on the lower axis
_DOT, _TYPE = 6.0, 7.0  # of a point and of its number, in points of type
_FROM_DOT = tuple(8.0 + 5.5 * i for i in range(24))  # distances of a number from its point, likewise
_WIDTH, _NAMES, _HEIGHT = 5.0, 2.4, 5.2  # of a panel, of the list of names, of the chart, in inches


def draw(contents: Mapping[str, Any], path: Path, *, overwrite: bool) -> None:
    """Write the chart: points are numbered from the best, and named beside the panels.

    Args:
        contents: of results.json.
        path: the file; its ending is the format.
        overwrite: replace the file.

    Raises:
        DataError: no contender has a finite perplexity yet.
        ConfigError, DependencyError: the format is not known, or matplotlib is missing.
    """
    check_plot(path)
    save_figure(make_figure(contents), path, overwrite=overwrite)


def make_figure(contents: Mapping[str, Any]) -> Any:
    """Return the chart as matplotlib's Figure; a DataError where no contender has a finite perplexity."""
    found = [one for one in summaries(contents) if one.perplexities and all(map(math.isfinite, one.perplexities))]
    if not found:
        raise DataError("there is nothing to draw: no contender has a finite perplexity yet")
    timed = any(one.cost is not None for one in found)
    panels: list[tuple[str, Callable[[Summary], float | None], bool]] = [("parameters that train", _parameters, True)]
    if timed:
        panels.insert(0, (f"time of a step, relative to {REFERENCE}", _time, False))
    width = _WIDTH * len(panels) + _NAMES
    figure = new_figure(width, _HEIGHT)
    figure.suptitle(textwrap.fill(title(contents), round(9 * width)), fontsize=11)
    ratios = [_WIDTH] * len(panels) + [_NAMES]
    *axes, names = figure.subplots(1, len(panels) + 1, squeeze=False, width_ratios=ratios)[0]
    drawn = []
    for one, (label, position, logarithmic) in zip(axes, panels, strict=True):
        drawn.append((one, _panel(one, found, position, logarithmic)))
        one.set_xlabel(label, fontsize=9)
    axes[0].set_ylabel("perplexity", fontsize=9)
    _list(names, found)
    text = " ".join(line for line in notes(contents) if not line.startswith(AT_AN_END))
    figure.supxlabel(textwrap.fill(text, round(17 * width)), fontsize=6.5, color="#555555")
    figure.draw_without_rendering()  # lays it out
    for one, points in drawn:
        _number(one, points)
    return figure


def _panel(
    axes: Any, found: Sequence[Summary], position: Callable[[Summary], float | None], logarithmic: bool
) -> Points:
    """Draw the points, and return them."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    axes.set_yscale("log")
    axes.set_ylim(_limits([perplexity for one in found for perplexity in one.perplexities]))
    if logarithmic:
        axes.set_xscale("log")
        low, high = _limits([x for one in found if (x := position(one)) is not None])
        axes.set_xlim(low, high)
    points = {number: (x, one) for number, one in enumerate(found, start=1) if (x := position(one)) is not None}
    for x, one in reversed(points.values()):  # the best is drawn last, on top
        mean = one.perplexity
        spread = [[mean - min(one.perplexities)], [max(one.perplexities) - mean]]
        axes.errorbar(x, mean, yerr=spread, fmt="none", ecolor=_colour(one), capsize=2, elinewidth=1)
        axes.plot(x, mean, "o", color=_colour(one), markersize=_DOT, markeredgecolor="white", markeredgewidth=0.5)
    axes.margins(x=_ROOM)
    if logarithmic:
        axes.xaxis.set_major_locator(MaxNLocator(5) if high < _DECADE * low else LogLocator(numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(True, color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return points


def _number(axes: Any, points: Points) -> None:
    """Write the number of each point beside it, clear of points and other numbers, with a line to one that is far off.

    Call it when the place of the axes is fixed.
    """
    scale = axes.figure.dpi / 72  # pixels of a point of type
    dots = {number: axes.transData.transform((x, one.perplexity)) / scale for number, (x, one) in points.items()}
    taken = [(x, y, _DOT / 2, _DOT / 2) for x, y in dots.values()]  # centre, half of the width and of the height
    turns = [math.radians(degrees) for degrees in (0, 180, 90, 270, 45, 135, 225, 315)]
    for number, (x, one) in points.items():
        width, height = (_TYPE * part / 2 for part in (0.65 * len(str(number)) + 0.3, 1.1))
        at = dots[number]
        places = ((at[0] + r * math.cos(turn), at[1] + r * math.sin(turn)) for r in _FROM_DOT for turn in turns)
        free = (
            (u, v) for u, v in places if all(abs(u - a) > width + w or abs(v - b) > height + h for a, b, w, h in taken)
        )
        place = next(free, tuple(at))
        taken.append((*place, width, height))
        offset = (place[0] - at[0], place[1] - at[1])
        colour = _colour(one)
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            str(number),
            (x, one.perplexity),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_TYPE,
            color=colour,
            arrowprops=arrow if math.hypot(*offset) > _FROM_DOT[0] else None,
        )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis with room on both sides, also where all values are one."""
    low, high = min(values), max(values)
    room = (high / low) ** _ROOM if high > low else 1 + _ROOM
    return low / room, high * room


def _list(axes: Any, found: Sequence[Summary]) -> None:
    """Write the names, the best on top, and what the colours mean."""
    axes.set_axis_off()
    step = min(0.055, 0.8 / len(found))
    for i, one in enumerate(found):
        text = f"{i + 1:>2}  {one.contender}  {one.perplexity:.2f}"
        axes.text(0, 1 - i * step, text, transform=axes.transAxes, fontsize=8, va="top", color=_colour(one))
    meaning = [("spp", OURS), ("peers that keep the zeros", _PEERS), ("zeros filled or moved", FILLS)]
    present = {_colour(one) for one in found}
    for i, (text, colour) in enumerate(reversed([pair for pair in meaning if pair[1] in present])):
        axes.text(0, 0.05 * i, f"● {text}", transform=axes.transAxes, fontsize=8, color=colour)


def _colour(one: Summary) -> str:
    if one.zeros_kept is not None and one.zeros_kept < 1:
        return FILLS
    return OURS if parse_contender(one.contender).kind.startswith("spp") else _PEERS


def _parameters(one: Summary) -> float:
    return float(one.row["trainable"])


def _time(one: Summary) -> float | None:
    return None if one.cost is None else float(one.cost["this_to_reference_wall"]["median"])
