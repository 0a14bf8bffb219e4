"""Line charts side by side, as an SVG or PNG file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from ..files import atomic_write, check_writable

# Okabe and Ito's, which the color-blind tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_FORMS = ("circle", "square", "diamond")  # of dots: a second and third round of colors
_WIDTH, _HEIGHT = 460, 300  # of a panel's axes, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 40, 64  # margins around them
_LINE = 18  # of the legend
_ACROSS = 3  # panels in a row
_INK, _PALE = "#333333", "#dddddd"
_SCALE = 2  # pixels of a PNG for each of the drawing's


class Line(NamedTuple):
    """A line through (place on the x axis, value), with a dot at each.

    Lines of one color number share a color, and those of one round of colors the form of their dots.
    """

    points: Sequence[tuple[float, float]]
    color: int
    width: float = 2
    dots: bool = True


class Panel(NamedTuple):
    """Axes from zero upwards, and lines; `ticks` are the names of the places 0, 1, ... on the x axis.

    top: the largest value that has to fit; None is the lines' own.
    """

    title: str
    x_label: str
    ticks: Sequence[str]
    lines: Sequence[Line]
    top: float | None = None


def check_picture(path: str | os.PathLike[str]) -> None:
    """ValueError for a file that `draw` cannot write."""
    if Path(path).suffix.lower() not in _CANVASES:
        raise ValueError(f"cannot draw {path}; accepted extensions are {', '.join(_CANVASES)}")
    check_writable(path)


def draw(panels: Sequence[Panel], legend: Sequence[str], path: str | os.PathLike[str], *, note: str) -> None:
    """Write panels in rows and below them the legend, the colors' names in order, and a note; .svg or .png."""
    check_picture(path)
    across, down = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    width, height = across * min(len(panels), _ACROSS), down * math.ceil(len(panels) / _ACROSS)
    canvas = _CANVASES[Path(path).suffix.lower()](width, height + _LINE * (len(legend) + 1) + 12)
    for i, panel in enumerate(panels):
        row, column = divmod(i, _ACROSS)
        _draw_panel(canvas, panel, column * across + _LEFT, row * down + _TOP)
    for i, name in enumerate(legend):
        y = height + _LINE * i
        canvas.line([(_LEFT, y), (_LEFT + 24, y)], _color(i), 3)
        canvas.dot(_LEFT + 12, y, _color(i), _form(i))
        canvas.text(_LEFT + 32, y, name, "start")
    canvas.text(_LEFT, height + _LINE * len(legend), note, "start")
    with atomic_write(path) as temporary:
        canvas.save(temporary)


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _form(number: int) -> str:
    return _FORMS[number // len(COLORS) % len(_FORMS)]


def _draw_panel(canvas: Any, panel: Panel, left: float, above: float) -> None:
    bottom = above + _HEIGHT
    most = max((y for line in panel.lines for _, y in line.points), default=1)
    ticks = _ticks(most if panel.top is None else panel.top)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + _WIDTH * (x + 0.5) / len(panel.ticks), bottom - _HEIGHT * y / ticks[-1]

    canvas.text(left + _WIDTH / 2, above - _TOP / 2, panel.title, "middle")
    canvas.text(left + _WIDTH / 2, bottom + 38, panel.x_label, "middle")
    for tick in ticks:
        y = place(0, tick)[1]
        canvas.line([(left, y), (left + _WIDTH, y)], _PALE, 1)
        canvas.text(left - 8, y, f"{tick:g}", "end")
    for i, name in enumerate(panel.ticks):
        canvas.text(place(i, 0)[0], bottom + 16, name, "middle")
    canvas.line([(left, above), (left, bottom), (left + _WIDTH, bottom)], _INK, 1)
    for line in panel.lines:
        points, color = [place(x, y) for x, y in line.points], _color(line.color)
        canvas.line(points, color, line.width)
        for point in points if line.dots else ():
            canvas.dot(*point, color, _form(line.color))


def _ticks(top: float) -> list[float]:
    """Round values from zero to `top` or more, in two to five steps."""
    unit = 10.0 ** math.floor(math.log10(top / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if 5 * unit * factor >= top)
    return [round(step * i, 12) for i in range(math.ceil(top / step - 1e-9) + 1)]


def _corners(x: float, y: float, form: str) -> list[tuple[float, float]]:
    if form == "diamond":
        return [(x - 4.5, y), (x, y - 4.5), (x + 4.5, y), (x, y + 4.5)]
    return [(x - 3, y - 3), (x + 3, y - 3), (x + 3, y + 3), (x - 3, y + 3)]


class _Svg:
    def __init__(self, width: float, height: float) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')

    def dot(self, x: float, y: float, color: str, form: str) -> None:
        if form == "circle":
            self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
        else:
            corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in _corners(x, y, form))
            self._parts.append(f'<polygon points="{corners}" fill="{color}"/>')

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="middle"'
        self._parts.append(f'<text {place} fill="{_INK}">{escape(text)}</text>')

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self._parts, "</svg>\n"]))


class _Png:
    _ANCHORS = {"start": "lm", "middle": "mm", "end": "rm"}

    def __init__(self, width: float, height: float) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self._image = Image.new("RGB", (round(width * _SCALE), round(height * _SCALE)), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(12 * _SCALE)

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        self._draw.line([(x * _SCALE, y * _SCALE) for x, y in points], color, round(width * _SCALE), joint="curve")

    def dot(self, x: float, y: float, color: str, form: str) -> None:
        if form == "circle":
            self._draw.ellipse([(x - 3) * _SCALE, (y - 3) * _SCALE, (x + 3) * _SCALE, (y + 3) * _SCALE], color)
        else:
            self._draw.polygon([(a * _SCALE, b * _SCALE) for a, b in _corners(x, y, form)], color)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._draw.text((x * _SCALE, y * _SCALE), text, _INK, self._font, self._ANCHORS[anchor])

    def save(self, path: Path) -> None:
        self._image.save(path)


_CANVASES = {".svg": _Svg, ".png": _Png}
