"""Charts of a page as inline SVG, lines over steps and heat maps of layers × projections, and the page's style.

Colours are classes of the page's style sheet, which has them for light and dark; a line also has a dash pattern
of its own, and a cell its number, so that nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spp.files.tables import escaped
from spp.report.plot import NUMBERED, Panel

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 4")
_LINES = (  # light and dark of each line: at least 3:1 against the page
    *(("#0b5fa5", "#7cc0ff"), ("#b3470a", "#ffb27a"), ("#1b7a43", "#7fd8a2")),
    *(("#8a2be2", "#cfa6ff"), ("#a8175c", "#ff9ccb"), ("#6b5d00", "#e3d26f")),
)
_LOW, _HIGH = ((242, 245, 247), (8, 52, 84)), ((31, 39, 46), (150, 205, 245))  # light and dark, of a heat map's ends
_LEVELS = 20  # colours of a heat map
_WIDTH, _HEIGHT = 400, 230  # of a line chart, in units of which a phone has about as many as pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 34
_POINTS = 400  # of a line; more are averaged
_CELL, _SMALL, _ROW = 42, 9, 19  # a cell of a heat map, across; without numbers; down
_HEAD, _STUB = 58, 30  # room for the names of columns and rows


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: in the legend.
        points: (step, value).
        marks: (step, value) that stand out, joined by a thin line: what was measured rarely.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float]] = ()


def line_chart(lines: Sequence[Line], title: str, across: str, down: str) -> str:
    """Return lines over steps with axes; the legend is below.

    Args:
        title: what is shown, for those who cannot see it. across, down: names of the axes.
    """
    every = [point for line in lines for point in (*line.points, *line.marks)]
    if not every:
        return ""
    low, high = min(y for _, y in every), max(y for _, y in every)
    ys, xs = ticks(low, high), ticks(0, max(x for x, _ in every))
    bottom, top, last = min(low, ys[0]), max(high, ys[-1]), max(xs[-1], max(x for x, _ in every)) or 1

    def at(point: tuple[float, float]) -> str:
        x = _LEFT + point[0] / last * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (point[1] - bottom) / ((top - bottom) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for y in ys:
        x0, y0 = at((0, y)).split(",")
        parts.append(f'<line class="grid" x1="{x0}" y1="{y0}" x2="{_WIDTH - _RIGHT}" y2="{y0}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y0}" dy=".32em" text-anchor="end">{y:g}</text>')
    for x in xs:
        x0 = at((x, bottom)).split(",")[0]
        parts.append(f'<text x="{x0}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(_WIDTH + _LEFT) / 2:g}" y="{_HEIGHT - 4}" text-anchor="middle">{escaped(across)}</text>')
    parts.append(f'<text transform="translate(10 {(_HEIGHT - _BOTTOM) / 2:g}) rotate(-90)" '
                 f'text-anchor="middle">{escaped(down)}</text>')  # fmt: skip
    for i, line in enumerate(lines):
        kind = f"s{i % len(_LINES)}"
        dash = f' stroke-dasharray="{DASHES[i % len(DASHES)]}"' if i % len(DASHES) else ""
        points = " ".join(map(at, averaged(line.points, _POINTS)))
        parts.append(f'<polyline class="{kind}"{dash} points="{points}"/>' if points else "")
        if line.marks:
            parts.append(f'<polyline class="{kind} thin" points="{" ".join(map(at, line.marks))}"/>')
        for mark in line.marks:
            x0, y0 = at(mark).split(",")
            told = f"{escaped(line.name)}, measured at step {mark[0]:g}: {mark[1]:.4f}"
            parts.append(f'<circle class="{kind}" cx="{x0}" cy="{y0}" r="3.5"><title>{told}</title></circle>')
    body = "\n".join(filter(None, parts))
    chart = (
        f'<svg class="lines" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(title)}">\n{body}</svg>'
    )
    legend = "".join(_legend(i, line) for i, line in enumerate(lines))
    return f'{chart}\n<ul class="legend">{legend}</ul>'


def _legend(i: int, line: Line) -> str:
    kind, dash = f"s{i % len(_LINES)}", DASHES[i % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    sample = f'<svg width="30" height="8" aria-hidden="true"><path class="{kind}"{dashed} d="M0 4H30"/></svg>'
    return f"<li>{sample} {escaped(line.name)}</li>"


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers between two, the ends rounded outward where they are equal.

    Args:
        low, high: finite, low ≤ high.
    """
    if high <= low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 1e-300 else 1e-300
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def averaged(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most so many points: the means of runs of neighbours of equal length."""
    size = -(-len(points) // most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def heat_map(panel: Panel, title: str, most: float, text: Callable[[float], str]) -> str:
    """Return a panel as a heat map; a cell says its number where there is room, and always where one points at it.

    Args:
        title: what is shown, for those who cannot see it.
        most: the value that has the last colour; 0 has the first.
        text: how a cell writes its value, in five characters at most.
    """
    numbered = len(panel.columns) <= NUMBERED[1]
    across, down = (_CELL, _ROW) if numbered else (_SMALL, _SMALL)
    width, height = _STUB + across * len(panel.columns) + 40, _HEAD + down * len(panel.rows) + 4
    parts, wrong = [], set(panel.wrong)
    every = -(-14 // across)  # names are 14 apart at least
    for j, column in enumerate(panel.columns):
        if j % every == 0:
            place = f"translate({_STUB + (j + 0.5) * across:g} {_HEAD - 6}) rotate(-50)"
            parts.append(f'<text transform="{place}">{escaped(column.rpartition(".")[2])}</text>')
    every = -(-14 // down)
    for i, row in enumerate(panel.rows):
        y = _HEAD + i * down
        if i % every == 0:
            parts.append(
                f'<text x="{_STUB - 5}" y="{y + down / 2:g}" dy=".32em" text-anchor="end">{escaped(row)}</text>'
            )
        for j, value in enumerate(panel.values[i]):
            if value is None:
                continue
            bad = (i, j) in wrong or not math.isfinite(value)
            level = 0 if bad else min(_LEVELS, max(0, round(_LEVELS * value / (most or 1))))
            said, exact, kind = ("NaN", "NaN", "bad") if bad else (text(value), f"{value:.4g}", f"h{level}")
            x, where = _STUB + j * across, f"layer {row}, {panel.columns[j]}" if row else panel.columns[j]
            parts.append(f'<g class="{kind}"><title>{escaped(where)}: {exact}</title><rect x="{x}" y="{y}" '
                         f'width="{across - 1}" height="{down - 1}"/>')  # fmt: skip
            if numbered:
                middle = f'x="{x + across / 2 - 0.5:g}" y="{y + down / 2:g}" dy=".32em"'
                parts.append(f'<text {middle} text-anchor="middle">{escaped(said)}</text>')
            parts.append("</g>")
    attributes = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"'
    return f'<svg class="heat" {attributes} aria-label="{escaped(title)}">{"".join(parts)}</svg>'


def _mixed(ends: tuple[tuple[int, int, int], tuple[int, int, int]], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(*ends, strict=True))
    return red, green, blue


def luminance(colour: Sequence[int]) -> float:
    """Return the relative luminance of (red, green, blue), each to 255, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the contrast of two colours, from 1 to 21, as WCAG 2 defines it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def heat_colours(dark: bool) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Return (colour, ink on it) of each level of a heat map, the ink that is easier to read of black and white."""
    ends = _HIGH if dark else _LOW
    found = [_mixed(ends, level / _LEVELS) for level in range(_LEVELS + 1)]
    return [(colour, max((0, 0, 0), (255, 255, 255), key=lambda ink: contrast(colour, ink))) for colour in found]


def chart_style(dark: bool) -> str:
    """Return the style sheet of the charts for one theme."""

    def code(colour: Sequence[int]) -> str:
        return "#" + "".join(f"{part:02x}" for part in colour)

    lines = [f".s{i}{{stroke:{pair[dark]}}}circle.s{i}{{fill:{pair[dark]}}}" for i, pair in enumerate(_LINES)]
    cells = [
        f".h{i} rect{{fill:{code(fill)}}}.h{i} text{{fill:{code(ink)}}}"
        for i, (fill, ink) in enumerate(heat_colours(dark))
    ]
    return "\n".join([*lines, *cells])


STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f5f7f9; --ink: #14181c; --soft: #4a5560; --line: #cfd6dc; --link: #0b5394;
  --good: #0d6b34; --good-ink: #ffffff; --bad: #a3231a; --bad-ink: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12171b; --card: #1b2228; --ink: #e8edf1; --soft: #aab6c0; --line: #39444d; --link: #8cc4ff;
    --good: #8fe0ac; --good-ink: #06210f; --bad: #ffb1a8; --bad-ink: #330805;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0; margin: .5rem 0; }
nav a { display: inline-block; padding: .2rem 0; }
footer, figcaption, caption { color: var(--soft); font-size: .875rem; }
.chip { display: inline-block; margin: .1rem 0; padding: .1rem .6rem; border-radius: 1rem;
  border: 1px solid var(--line); font-size: .875rem; font-weight: normal; }
.chip.good { background: var(--good); color: var(--good-ink); border-color: var(--good); }
.chip.bad { background: var(--bad); color: var(--bad-ink); border-color: var(--bad); }
.notes { background: var(--card); border-left: 4px solid var(--bad); margin: 0; padding: .75rem 1rem .75rem 2rem; }
.scroll {  /* a shadow at an end behind which there is more */
  overflow-x: auto; margin: .5rem 0; max-width: 100%;
  background: linear-gradient(to right, var(--page) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--line), transparent) left / 1rem 100% no-repeat,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat;
}
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: normal; }
th + th, th + td, td + td { padding-left: 1.25rem; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; min-width: 3rem; max-width: 14rem; }
tbody th { font-weight: 500; min-width: 8.5rem; max-width: 22rem; overflow-wrap: anywhere; }
td { max-width: 34rem; overflow-wrap: break-word; }
[style*="right"] { white-space: nowrap; }
thead [style*="right"] { white-space: normal; }
pre { background: var(--card); padding: .75rem; margin: .25rem 0; white-space: pre-wrap; font-size: .85rem;
  overflow-wrap: anywhere; border-radius: .25rem; }
h4 { font-size: .9rem; margin: .5rem 0 0; }
.side { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23.5rem), 1fr)); gap: 0 2rem; }
.side > article { min-width: 0; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .2rem 0; }
figure { margin: .5rem 0; } .figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.figures figure { max-width: 100%; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg.lines { display: block; width: 100%; max-width: 33rem; height: auto; background: var(--card); }
svg.heat { display: block; }
.grid { stroke: var(--line); stroke-width: 1; }
polyline, .legend path { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
polyline.thin { stroke-width: 1; stroke-dasharray: 1 4; }
.bad rect { fill: var(--bad); } .bad text { fill: var(--bad-ink); }
.legend { list-style: none; padding: 0; margin: .25rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  font-size: .9rem; }
@media (max-width: 32rem) {
  table { font-size: .85rem; } tbody th { min-width: 7.5rem; } th + th, th + td, td + td { padding-left: .75rem; }
}
@media print { .scroll { overflow: visible; } details { display: block; } }
""".strip()
