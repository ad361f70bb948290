"""Quality against cost: perplexity over the time of a step, and over the parameters that train."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from spp.bench.compare.contenders import REFERENCE, parse_contender
from spp.bench.compare.summary import Summary, summaries
from spp.bench.compare.tables import notes, title
from spp.bench.plot import OURS, THEIRS, check_plot
from spp.files import atomic_file

_FILLS = "#c2543d"  # of contenders that do not keep the zeros
_WIDTH, _HEIGHT = 5.6, 4.4  # of a panel, in inches
_CLOSE = 0.045  # of the height: labels nearer than this are moved apart


def draw(contents: Mapping[str, Any], path: Path, *, overwrite: bool) -> None:
    """Write the chart.

    Args:
        contents: of results.json, with at least one contender that was measured.
        path: the file; its ending is the format.
        overwrite: replace the file.

    Raises:
        ConfigError, DependencyError: the format is not known, or matplotlib is missing.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [one for one in summaries(contents) if one.perplexities]
    timed = [one for one in found if one.cost is not None]
    panels = [(found, "parameters that train", _parameters, True)]
    if timed:
        panels.insert(0, (timed, f"time of a step, relative to {REFERENCE}", _time, False))
    figure = Figure(figsize=(_WIDTH * len(panels), _HEIGHT + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title(contents), 56 * len(panels)), fontsize=11)
    for axes, (some, label, position, logarithmic) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _panel(axes, some, position, logarithmic)
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel("perplexity", fontsize=9)
    text = textwrap.fill(" ".join(line for line in notes(contents) if not line.startswith("*")), 110 * len(panels))
    figure.supxlabel(text, fontsize=6.5, color="#555555")
    with atomic_file(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=130)


def _panel(axes: Any, some: Sequence[Summary], position: Any, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xscale("log")
    xs = [position(one) for one in some]
    means = [sum(one.perplexities) / len(one.perplexities) for one in some]
    low, high = min(min(one.perplexities) for one in some), max(max(one.perplexities) for one in some)
    span = (high - low) or 1.0
    for one, x, mean in zip(some, xs, means, strict=True):
        spread = [[mean - min(one.perplexities)], [max(one.perplexities) - mean]]
        axes.errorbar(x, mean, yerr=spread, fmt="o", color=_colour(one), capsize=2, elinewidth=1, markersize=5)
    axes.set_ylim(low - 0.08 * span, high + 0.08 * span)
    axes.margins(x=0.12)
    left, right = axes.get_xlim()
    for one, x, mean, y in zip(some, xs, means, _apart(means, _CLOSE * 1.16 * span), strict=True):
        near_right = _share(x, left, right, logarithmic) > 0.7
        axes.annotate(
            one.contender,
            (x, mean),
            xytext=(x, y),
            textcoords="data",
            fontsize=8,
            va="center",
            ha="right" if near_right else "left",
            color="#333333",
            bbox={"boxstyle": "square,pad=0", "alpha": 0, "linewidth": 0},
            # Text coordinates are in data; the offset keeps the name off its point.
        ).set_x(_beside(x, left, right, logarithmic, -0.02 if near_right else 0.02))
    axes.grid(True, color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Return the heights, moved up where two are nearer than `least`; the order stays."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved


def _share(x: float, left: float, right: float, logarithmic: bool) -> float:
    if logarithmic:
        x, left, right = log(x), log(left), log(right)
    return (x - left) / ((right - left) or 1.0)


def _beside(x: float, left: float, right: float, logarithmic: bool, share: float) -> float:
    return x * (right / left) ** share if logarithmic else x + share * (right - left)


def _colour(one: Summary) -> str:
    if one.zeros_kept is not None and one.zeros_kept < 1:
        return _FILLS
    return OURS if parse_contender(one.contender).kind.startswith("spp") else THEIRS


def _parameters(one: Summary) -> float:
    return float(one.row["trainable"])


def _time(one: Summary) -> float:
    assert one.cost is not None
    return float(one.cost["this_to_reference_wall"]["median"])
