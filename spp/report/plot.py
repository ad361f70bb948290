"""What all charts share; matplotlib (the extra `plot`) is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spp.configs.checks import check_chart
from spp.errors import DependencyError
from spp.files import atomic_file
from spp.files.recognised import CHART_MARK, PICTURE

OURS, THEIRS = "#2a6f97", "#a9b4bd"
DPI = 130


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
