"""Charts as inline SVG, which are as wide as their place and keep their letters' size.

Horizontal places are shares of the width and vertical ones pixels, so that nothing is scaled: a chart is drawn once for
phones and for wide screens. Labels stand above what they name, where both have room for them. Colors are the custom
properties of style.css; report.css says what each class looks like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .report_markup import Markup, element, joined

_BAR = 18  # pixels of a bar's height
_LINE = 16  # of a line of text
_GAP = 14  # between two rows
_AXIS = 24  # of an axis' labels below a chart
_PLOT = 300  # of a plot's height
_NARROW = 318  # of the narrowest chart's width: on a phone of 375
_LETTER = 8.3  # of an average letter's width, in bold and in the widest of the fonts
_MOST_TICKS = 5
_MOST_LETTERS = 40  # of a label
_Box = tuple[float, float, float, float]  # left, top, right, bottom
# Places of a name beside its point, the best first: distance of its anchor in pixels, and the anchor. At the later ones
# a name could be taken for another point's, where it has not its own color.
_BESIDE = ((10, 4, "start"), (-10, 4, "end"), (0, -11, "middle"))
_NEAR = ((0, 21, "middle"), (8, -8, "start"), (8, 16, "start"), (-8, -8, "end"), (-8, 16, "end"), (8, -25, "start"))
_FAR = 10.0  # heights of a plot up to which a curve is drawn, and cut off


class Step(NamedTuple):
    """A row of a waterfall: what a technique takes, and what the one that it builds on took.

    name, detail: words for it. spread: the whisker's length. before: seconds of the technique that it builds on, if
    there is one. said: words at the bar's end. times, saved: words at the right. own: it leads from the first row to
    the last, rather than being compared with them.
    """

    name: str
    detail: str
    seconds: float
    spread: float
    before: float | None
    said: str
    times: str
    saved: str
    own: bool


class Level(NamedTuple):
    """A share of 0 to 1 and its interval, as a row; None where it was not measured."""

    name: str
    value: float | None
    low: float
    high: float
    said: str


class Bullet(NamedTuple):
    """A bar, the wider bar that it was before, and a mark where it was expected; None where it was not measured."""

    name: str
    value: float | None
    before: float
    expected: float
    said: str


class Stack(NamedTuple):
    """A row of parts one after another. parts: (class, value, words) of each."""

    name: str
    parts: Sequence[tuple[str, float, str]]
    said: str


class Curve(NamedTuple):
    """Points joined by a line, or marks: a series with a label at its end."""

    name: str
    kind: str
    x: Sequence[float]
    y: Sequence[float]
    line: bool


class Point(NamedTuple):
    """A place in a plot, with an interval of y. strong: its label is the first to have room."""

    name: str
    kind: str
    x: float
    y: float
    low: float
    high: float
    strong: bool


def waterfall(steps: Sequence[Step], label: str) -> Markup:
    """Bars of seconds below one another, each with what it saves of the one that it builds on, dashed."""
    top = max((step.seconds + step.spread / 2 for step in steps), default=1.0) or 1.0
    rows, y = [], 0
    for step in steps:
        row, height = _step(step, y, top)
        rows.append(row)
        y += height + _GAP
    return _chart(y + _AXIS, label, _axis(top, y, "s"), *rows)


def _step(step: Step, y: int, top: float) -> tuple[Markup, int]:
    """The row of a step, which begins at y, and its height."""
    kind = "own" if step.own else "other"
    parts = [_text(step.name, 0, y + 13, class_=f"name {kind}"), _end(step.times, y + 13, class_=f"name {kind}")]
    if step.detail or step.saved:
        y += _LINE
        parts += [_text(step.detail, 0, y + 13), _end(step.saved, y + 13)]
    y_bar = y + _LINE + 4
    own, before = step.seconds / top, (step.before or 0) / top
    if before > own:
        parts.append(_rect(own, before, y_bar + 0.5, _BAR - 1, "saved"))
    parts += [_rect(0, own, y_bar, _BAR, f"mark {kind}"), *_whisker(own, step.spread / top, y_bar + _BAR / 2)]
    reach, width = step.spread / top / 2, (_LETTER * len(step.said) + 8) / _NARROW
    if own + reach + width < 1:
        parts.append(_text(step.said, own + reach, y_bar + 13, dx=8, class_="value"))
    elif own - reach > width:
        parts.append(_text(step.said, own - reach, y_bar + 13, dx=-8, text_anchor="end", class_=f"inside {kind}"))
    else:
        parts.append(_end(step.said, y_bar + 13, class_="value"))
    said = f"{step.name} {step.detail}: {step.said}"
    height = y_bar + _BAR - y + _LINE * bool(step.detail or step.saved)
    return element("g", element("title", said), *parts, class_="series-1"), height


def levels(rows: Sequence[Level], label: str, kind: str) -> Markup:
    """Shares of 0 to 1 with their intervals, one below another. kind: the class that has the color."""
    drawn, pitch = [], _LINE + 12 + _GAP
    for place, row in enumerate(rows):
        y = place * pitch
        parts = _heading(row.name, row.said, y, known=row.value is not None)
        if row.value is not None:
            center = y + _LINE + 9
            parts += [
                _rect(row.low, row.high, center - 5, 10, "interval", rx=5),
                element("circle", cx=_percent(row.value), cy=center, r=5, class_="mark ring"),
            ]
        drawn.append(element("g", element("title", f"{row.name}: {row.said}"), *parts, class_=kind))
    bottom = len(rows) * pitch
    return _chart(bottom + _AXIS, label, _axis(1.0, bottom, ""), *drawn)


def bullets(rows: Sequence[Bullet], label: str, unit: str) -> Markup:
    """Bars in wider bars of what they were before, with marks where they were expected."""
    top = max((max(row.value or 0, row.before, row.expected) for row in rows), default=1.0) or 1.0
    drawn, pitch = [], _LINE + 4 + _BAR + _GAP - 4
    for place, row in enumerate(rows):
        y = place * pitch
        bar = y + _LINE + 3
        parts = _heading(row.name, row.said, y, known=row.value is not None)
        parts.append(_rect(0, row.before / top, bar, _BAR, "ghost"))
        if row.value is not None:
            parts.append(_rect(0, row.value / top, bar + 4, _BAR - 8, "mark"))
        expected = _percent(row.expected / top)
        parts.append(element("line", x1=expected, x2=expected, y1=bar - 1, y2=bar + _BAR + 1, class_="whisker"))
        drawn.append(element("g", element("title", f"{row.name}: {row.said}"), *parts, class_="series-1"))
    bottom = len(rows) * pitch
    return _chart(bottom + _AXIS, label, _axis(top, bottom, unit), *drawn)


def stacks(rows: Sequence[Stack], label: str, unit: str) -> Markup:
    """Rows of parts one after another, on one scale."""
    top = max((sum(value for _, value, _ in row.parts) for row in rows), default=1.0) or 1.0
    drawn, pitch = [], _LINE + 6 + _BAR + _GAP
    for place, row in enumerate(rows):
        y, start = place * pitch, 0.0
        parts = _heading(row.name, row.said, y)
        for kind, value, said in row.parts:
            bar = _rect(start, start + value / top, y + _LINE + 4, _BAR, "mark part")
            parts.append(element("g", element("title", said), bar, class_=kind))
            start += value / top
        drawn.append(element("g", *parts))
    bottom = len(rows) * pitch
    return _chart(bottom + _AXIS, label, _axis(top, bottom, unit), *drawn)


def lines(curves: Sequence[Curve], label: str, *, x_top: float, y_top: float, x_unit: str, y_unit: str) -> Markup:
    """Curves and marks over two linear axes that begin at zero. What is above the y axis' end is cut off."""
    parts = [*_scale(y_top, y_unit), _axis(x_top, _PLOT, x_unit)]
    ends = []
    for curve in curves:
        seen = [(x / x_top, y / y_top) for x, y in zip(curve.x, curve.y, strict=True) if y <= y_top]
        if curve.line:
            scaled = ((x / x_top, min(y / y_top, _FAR)) for x, y in zip(curve.x, curve.y, strict=True))
            points = " ".join(f"{100 * x:.2f},{100 - 100 * y:.2f}" for x, y in scaled)
            drawn = element("polyline", points=points, class_="curve", vector_effect="non-scaling-stroke")
            box = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none", "width": "100%", "height": _PLOT}
            parts.append(element("svg", drawn, class_=curve.kind, **box))
        else:
            dots = (element("circle", cx=_percent(x), cy=_height(y), r=5, class_="mark ring") for x, y in seen)
            parts.append(element("g", *dots, class_=curve.kind))
        if seen and curve.name:
            ends.append((_height(seen[-1][1]), seen[-1][0], curve))
    return _chart(_PLOT + _AXIS, label, *parts, *_end_labels(ends))


def _end_labels(ends: list[tuple[float, float, Curve]]) -> Iterator[Markup]:
    """The names of curves to the left of their ends, the lower ones moved down where they would cover others."""
    free = -math.inf
    for y, x, curve in sorted(ends, key=lambda end: end[0]):
        free = max(free + _LINE, y)
        name = _text(curve.name, x, free + 4, dx=-10, text_anchor="end", class_="name")
        yield element("g", name, class_=f"{curve.kind} colored")


def scatter(points: Sequence[Point], label: str, *, x_unit: str, y_unit: str) -> Markup:
    """Points over a logarithmic x axis and a y axis of 0 to 1, with names where there is room."""
    low, high = math.log10(min(point.x for point in points)) - 0.25, math.log10(max(point.x for point in points)) + 0.25
    placed = [(point, (math.log10(point.x) - low) / (high - low)) for point in points]
    parts = [*_scale(1.0, y_unit)]
    for power in range(math.ceil(low), math.floor(high) + 1):
        parts.append(_tick((power - low) / (high - low), f"{10.0**power:g} {x_unit}", _PLOT))
    for point, x in sorted(placed, key=lambda one: one[0].strong):  # strong ones above the others
        ends = {"y1": _height(point.low), "y2": _height(point.high), "x1": _percent(x), "x2": _percent(x)}
        dot = element("circle", cx=_percent(x), cy=_height(point.y), r=6 if point.strong else 4, class_="mark ring")
        title = element("title", f"{point.name}: {point.y:.3f} ({point.low:.2f} to {point.high:.2f})")
        parts.append(element("g", title, element("line", **ends, class_="bar-of-error"), dot, class_=point.kind))
    return _chart(_PLOT + _AXIS, label, *parts, *_point_labels(placed))


def _point_labels(placed: Sequence[tuple[Point, float]]) -> Iterator[Markup]:
    """Names beside points, where there is room for them on the narrowest chart; on wider ones the gaps only grow."""
    strong_first = sorted(placed, key=lambda one: (not one[0].strong, -one[0].y))
    marks = {point: _around(x * _NARROW, _height(point.y)) for point, x in strong_first}
    taken: list[_Box] = [(0, y - _LINE, 26, y) for y in map(_height, ticks(1.0))]  # the axis' labels
    for point, x in strong_first:
        others = [*taken, *(mark for other, mark in marks.items() if other != point)]
        found = _free_place(point, x, others, _BESIDE)
        if found is None and point.strong:  # it may cover weak marks
            strong = [*taken, *(mark for other, mark in marks.items() if other.strong and other != point)]
            found = _free_place(point, x, strong, (*_BESIDE, *_NEAR))
        if found is not None:
            box, dx, dy, anchor = found
            taken.append(box)
            name = {"dx": dx, "text_anchor": anchor, "class_": "name" if point.strong else None}
            words = _text(point.name, x, _height(point.y) + dy, **name)
            yield element("g", words, class_=f"{point.kind} colored" if point.strong else None)


def _free_place(
    point: Point, share: float, taken: Sequence[_Box], places: Sequence[tuple[int, int, str]]
) -> tuple[_Box, int, int, str] | None:
    """Where a name covers nothing: its box, the distance of its anchor from the point, and the anchor."""
    x, y, width = share * _NARROW, _height(point.y), _LETTER * len(point.name)
    for dx, dy, anchor in places:
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left, y + dy - 12, left + width, y + dy + 4)
        inside = left >= 0 and box[2] <= _NARROW and box[1] >= 0 and box[3] <= _PLOT + 5
        if inside and not any(_meet(box, other) for other in taken):
            return box, dx, dy, anchor
    return None


def _around(x: float, y: float) -> _Box:
    return x - 6, y - 6, x + 6, y + 6


def _meet(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# Parts


def _chart(height: float, label: str, *parts: Markup) -> Markup:
    return element("svg", *parts, class_="chart", width="100%", height=f"{height:g}", role="img", aria_label=label)


def _axis(top: float, bottom: float, unit: str) -> Markup:
    """Grid lines down to `bottom` and their labels below, from zero to `top`."""
    return joined(_tick(value / top, f"{value:g} {unit}".rstrip(), bottom) for value in ticks(top))


def _tick(share: float, words: str, bottom: float) -> Markup:
    x = _percent(share)
    line = element("line", x1=x, x2=x, y1=0, y2=f"{bottom:g}", class_="grid")
    anchor = "start" if share < 0.04 else "end" if share > 0.93 else "middle"
    return joined([line, _text(words, share, bottom + 17, text_anchor=anchor)])


def _scale(top: float, unit: str) -> Iterator[Markup]:
    """Grid lines over the width of a plot, each with its label on it, at the left."""
    for value in ticks(top):
        y = _height(value / top)
        yield element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid")
        if value and y > _LINE:
            yield _text(f"{value:g} {unit}".rstrip(), 0, y - 4)
        elif value:
            yield _text(f"{value:g} {unit}".rstrip(), 0, y + 14)


def ticks(top: float) -> list[float]:
    """Round values from zero to `top`, a few of them."""
    rough = top / _MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9)) * power
    return [round(number * step, 12) for number in range(math.floor(top / step * (1 + 1e-9)) + 1)]


def _whisker(center: float, length: float, y: float) -> Iterable[Markup]:
    if length > 0:
        ends = {"x1": _percent(center - length / 2), "x2": _percent(center + length / 2)}
        yield element("line", **ends, y1=f"{y:g}", y2=f"{y:g}", class_="whisker")


def _heading(name: str, said: str, y: int, *, known: bool = True) -> list[Markup]:
    """The line above a bar: what it is, and what it says."""
    return [_text(name, 0, y + 13, class_="label"), _end(said, y + 13, class_="value" if known else None)]


def _rect(start: float, end: float, y: float, height: float, kind: str, **more: object) -> Markup:
    place = {"x": _percent(start), "width": _percent(max(end - start, 0.0)), "y": f"{y:g}", "height": f"{height:g}"}
    return element("rect", **place, class_=kind, **more)


def _text(words: str, share: float, y: float, **more: object) -> Markup:
    shown = words if len(words) <= _MOST_LETTERS else f"{words[: _MOST_LETTERS - 1]}…"
    return element("text", shown, x=_percent(share), y=f"{y:g}", **more) if words else Markup()


def _end(words: str, y: float, **more: object) -> Markup:
    return _text(words, 1.0, y, text_anchor="end", **more)


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _height(share: float) -> float:
    return round(_PLOT * (1 - share), 1)
