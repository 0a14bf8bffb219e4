"""Line charts side by side, drawn by matplotlib into an SVG or PNG file."""

from __future__ import annotations

import importlib.util
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import atomic_write, check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# The colors of Okabe and Ito, which color-blind readers can tell apart. The number of markers has no divisor in common
# with the number of colors, so that 56 series differ in the pair, and neighbors differ in both.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
# Turns off what matplotlib writes by default beside the drawing: the date and its own version would change the bytes.
_NO_METADATA = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}

_COLUMNS = 3  # panels in a row
_PANEL_WIDTH, _PANEL_HEIGHT = 3.4, 2.6  # inches, with labels
_LEGEND_LINE = 0.19  # inches
_PNG_DPI = 200
_TITLE_CHARACTERS = 44  # in a line of a panel's title
_LETTER_WIDTH = 0.075  # inches of an average letter, to find how many columns the legend has room for
_MARGIN = 0.2  # on both sides of a logarithmic axis, in decades
INK, GRID = "#333333", "#dddddd"
_STYLE = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first is matplotlib's own and measures the text
    "axes.titlesize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # print a dollar sign as it is; it begins no formula
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.constrained_layout.w_pad": 0.08,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "lines.markeredgewidth": 0.5,
    "svg.fonttype": "none",  # write words as text rather than outlines: smaller, and searchable
    "svg.hashsalt": "videopure-fast",  # with a random salt, two drawings of the same numbers would differ
}


class Series(NamedTuple):
    """Points of one panel, joined by a line.

    name: entry of the legend; series of one name share color and marker in all panels.
    low, high: ends of the error bars, on the y axis; None draws no bars. line: matplotlib's line style.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    line: str = "-"


class Panel(NamedTuple):
    """One pair of axes; the y axis begins at zero.

    ticks: names of the positions 0, 1, ... of the x axis; None means that x is a quantity, on a logarithmic axis.
    top: end of the y axis; None fits it to the panel. Panels of a picture that all have the same top share their axis.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    ticks: Sequence[str] | None = None
    top: float | None = None


def missing_reason() -> str | None:
    """What `draw` lacks on this machine, and how to get it; None if it can draw."""
    if importlib.util.find_spec("matplotlib") is None:
        return "drawing needs matplotlib: pip install 'videopure-fast[plot]'"
    return None


def check_picture(path: str | os.PathLike[str]) -> None:
    """ValueError for a file that `draw` cannot write, ImportError where matplotlib is missing; loads nothing."""
    if Path(path).suffix.lower() not in _NO_METADATA:
        raise ValueError(f"cannot draw {path}; accepted extensions are {', '.join(_NO_METADATA)}")
    check_writable(path)
    if missing := missing_reason():
        raise ImportError(f"cannot draw {path}: {missing}")


def draw(panels: Sequence[Panel], legend: Sequence[str], path: str | os.PathLike[str], *, note: str = "") -> None:
    """Draw panels, three in a row, and below them the note and the legend, into an .svg or .png file.

    legend: names of the series, which decide colors and markers by their order. The same arguments give the same bytes.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width = _PANEL_WIDTH * columns
    # 8 letters' width is left for an entry's line and the space around it.
    entries_across = max(1, min(len(legend), int(width / (_LETTER_WIDTH * (max(map(len, legend)) + 8)))))
    notes = textwrap.wrap(note, int(width / _LETTER_WIDTH))
    lines = math.ceil(len(legend) / entries_across) + len(notes) + 1  # one blank
    tops = {panel.top for panel in panels}
    shared = len(tops) == 1 and None not in tops
    with styled():
        figure = Figure((width, _PANEL_HEIGHT * rows + _LEGEND_LINE * lines), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=shared, squeeze=False).ravel()
        handles = {name: _handle(name, i) for i, name in enumerate(legend)}
        for i, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
            _draw_panel(ax, panel, handles, y_label=not shared or i % columns == 0)
        for ax in axes[len(panels) :]:
            ax.remove()
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": entries_across, "frameon": False}
        box = figure.legend(handles=list(handles.values()), title="\n".join(notes), title_fontsize="small", **place)
        box.get_title().set_multialignment("center")
        save_figure(figure, path)


@contextmanager
def styled() -> Iterator[None]:
    """Within this block figures look as all of the package's do."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):  # "default" undoes the user's own settings
        yield


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure that was drawn in a `styled` block into an .svg or .png file, within that block."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=_PNG_DPI, metadata=_NO_METADATA[Path(path).suffix.lower()])


def _handle(name: str, number: int) -> Line2D:
    """The legend's entry; the series of this name take its color and marker."""
    from matplotlib.lines import Line2D

    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    return Line2D([], [], label=name, color=color, marker=marker, markeredgecolor="white")


def _draw_panel(ax: Axes, panel: Panel, handles: dict[str, Line2D], *, y_label: bool) -> None:
    ax.set_title("\n".join(textwrap.wrap(panel.title, _TITLE_CHARACTERS)))
    ax.set_xlabel(panel.x_label)
    if y_label:
        ax.set_ylabel(panel.y_label)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    if panel.ticks is None:
        ax.set_xscale("log")
        ax.set_xlim(*_decades([x for series in panel.series for x in series.x]))
        ax.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        ax.minorticks_off()
    else:
        ax.set_xticks(range(len(panel.ticks)), panel.ticks)
        ax.set_xlim(-0.5, len(panel.ticks) - 0.5)
    for series in panel.series:
        _draw_series(ax, series, handles[series.name])
    ax.set_ylim(0, panel.top)


def _draw_series(ax: Axes, series: Series, handle: Line2D) -> None:
    bars: Any = None
    if series.low is not None and series.high is not None:
        ends = zip(series.low, series.y, series.high, strict=True)
        # A bar's length is at least 0: an end may miss its value by rounding.
        bars = tuple(zip(*((max(y - low, 0.0), max(high - y, 0.0)) for low, y, high in ends), strict=True))
    ax.errorbar(
        series.x,
        series.y,
        bars,
        color=handle.get_color(),
        marker=handle.get_marker(),
        markeredgecolor=handle.get_markeredgecolor(),
        linestyle=series.line,
        elinewidth=0.8,
        clip_on=False,  # a marker at the end of the axis is drawn whole
    )


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis: the powers of ten around positive values, and a margin."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0 ** (low - _MARGIN), 10.0 ** (high + _MARGIN)
