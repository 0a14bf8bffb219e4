"""Pictures of a study: latency against load, and the way of clips through the stages of a server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..measure.plot import COLORS, GRID, INK, check_picture, save_figure, styled
from .load import Record
from .study import STAGES, Setting, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The color of each, and the size of its marks in points: smaller ones lie upon larger ones, and hide none.
_PERCENTILES = {"p99": (COLORS[2], 9.0), "p95": (COLORS[1], 6.5), "p50": (COLORS[0], 4.5)}
_WAIT = "#d4d4d4"
_STAGE_COLORS = dict(zip(STAGES, (_WAIT, COLORS[4], COLORS[0], COLORS[2], COLORS[3]), strict=True))
_STAGE_NAMES = dict(zip(STAGES, ("waiting", "encode", "denoise", "decode", "label"), strict=True))
_PANEL = (3.6, 3.0)  # inches
_TIMELINE_WIDTH, _TIMELINE_CLIP = 8.0, 0.11  # inches, of the picture and of a clip's row
_MOST_CLIPS = 40  # in a timeline
_LATE, _UNDONE = "a deadline that passed", "not computed"
_BAR = 0.72  # height of a clip's bar, in rows


def draw_load(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, deadline: float | None = None, note: str = ""
) -> None:
    """Latency percentiles against load, a panel for each setting, and where the time goes at the first of them.

    rows: those of runs with a "load", a share of what the server can do. Simulated rows are lines without marks, and
    the legend says so; measured ones are marks. ValueError where nothing was measured.
    """
    check_picture(path)
    rows = sorted((row for row in rows if row.get("load") and row["summary"]["latency"]), key=lambda row: row["load"])
    measured = [row for row in rows if not row["simulated"]]
    if not measured:
        raise ValueError("no run with a load was measured; accepted: a study with one or more")
    settings = sorted({Setting(**row["setting"]) for row in measured})
    rules = {setting[1:] for setting in settings}  # what distinguishes them beside the batch
    with styled():
        from matplotlib.figure import Figure

        width = _PANEL[0] * (len(settings) + 1)
        figure = Figure((width, _PANEL[1] + 0.6), layout="constrained")
        *panels, last = figure.subplots(1, len(settings) + 1, squeeze=False)[0]
        top = max(row["summary"]["latency"]["p99"] for row in measured)
        for ax, setting in zip(panels, settings, strict=True):
            one = setting.max_batch == 1
            title = "one clip at a time" if one else f"up to {setting.max_batch} clips in a batch"
            ax.set_title(title if len(rules) == 1 else f"{title}\n{setting.order}, {setting.policy}")
            _draw_percentiles(ax, _rows_of(setting, rows), deadline, 1.15 * top)
        panels[0].set_ylabel("seconds from due to answer")
        _draw_stages(last, _rows_of(settings[0], measured))
        handles = {label: handle for ax in (*panels, last) for handle, label in zip(*_legend(ax), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
        if note:
            figure.suptitle(note, fontsize="medium")
        save_figure(figure, path)


def _rows_of(setting: Setting, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if Setting(**row["setting"]) == setting]


def _legend(ax: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = ax.get_legend_handles_labels()
    return handles, labels


def _draw_percentiles(ax: Axes, rows: Sequence[Mapping[str, Any]], deadline: float | None, top: float) -> None:
    ax.set_xlabel("load, % of what the server can do")
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    for simulated, style in ((True, {"linestyle": "-", "alpha": 0.55}), (False, {"linestyle": "", "marker": "o"})):
        found = [row for row in rows if row["simulated"] == simulated]
        for name, (color, marker) in _PERCENTILES.items() if found else ():
            x = [100 * row["load"] for row in found]
            y = [row["summary"]["latency"][name] for row in found]
            label = f"{name}, {'simulated' if simulated else 'measured'}"
            ax.plot(x, y, color=color, label=label, markersize=marker, markeredgecolor="white", **style)
    if deadline is not None:
        ax.axhline(deadline, color=INK, linewidth=0.9, linestyle=":", label="deadline")
    ax.set_ylim(0, top)
    ax.set_xlim(left=0)


def _draw_stages(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean seconds of each stage, stacked, for each measured load."""
    ax.set_title("where the time goes, on average")
    ax.set_xlabel("load, % of what the server can do")
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    bottom = np.zeros(len(rows))
    for stage in STAGES:
        seconds = np.array([row["summary"]["stages"][stage] for row in rows])
        if seconds.max() > 0.005 * max(row["summary"]["latency"]["mean"] for row in rows):
            ax.bar(range(len(rows)), seconds, 0.62, bottom, color=_STAGE_COLORS[stage], label=_STAGE_NAMES[stage])
        bottom += seconds
    ax.set_xticks(range(len(rows)), [f"{100 * row['load']:g}" for row in rows])


def draw_timeline(row: Mapping[str, Any], path: str | os.PathLike[str], *, note: str = "") -> None:
    """The clips of one run, a line each, from when they were due through the stages to the answer.

    Of many clips, those around the one that waited longest. A mark shows where a clip was dropped or refused, and where
    its deadline passed.
    """
    check_picture(path)
    records = _busiest(read_records(row))
    origin = min(record.due for record in records)
    with styled():
        from matplotlib.figure import Figure

        figure = Figure((_TIMELINE_WIDTH, _TIMELINE_CLIP * len(records) + 1.5), layout="constrained")
        ax = figure.subplots()
        for place, record in enumerate(records):
            _draw_clip(ax, place, record, origin)
        ax.set_ylim(len(records) - 0.4, -0.6)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("seconds; a line for each clip, in the order in which they were due")
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        said = "simulated: " if row["simulated"] else ""
        ax.set_title(note or f"{said}{Setting(**row['setting'])}", loc="left")
        named = dict(zip(*reversed(_legend(ax)), strict=True))
        order = [name for name in (*_STAGE_NAMES.values(), _LATE, _UNDONE) if name in named]
        handles = [named[name] for name in order]
        figure.legend(handles, order, loc="outside lower center", ncols=len(order), frameon=False)
        save_figure(figure, path)


def _busiest(records: Sequence[Record]) -> list[Record]:
    """As many clips as a picture can show, around the one with the largest latency."""
    longest = max(range(len(records)), key=lambda number: records[number].latency or 0.0)
    first = max(0, min(longest - _MOST_CLIPS * 2 // 3, len(records) - _MOST_CLIPS))
    return list(records[first : first + _MOST_CLIPS])


def _draw_clip(ax: Axes, place: int, record: Record, origin: float) -> None:
    if record.times is None:
        ax.plot(record.due - origin, place, "x", color=COLORS[1], markersize=4, label=_UNDONE)
        return
    points = [record.due, *record.times[1:]]
    for stage, start, end in zip(STAGES, points, points[1:], strict=False):
        if end - start > 0.002 * (points[-1] - points[0]):
            ax.barh(place, end - start, _BAR, start - origin, color=_STAGE_COLORS[stage], label=_STAGE_NAMES[stage])
    if record.deadline is not None and not record.in_time:
        ax.plot(record.deadline - origin, place, "|", color=INK, markersize=8, markeredgewidth=1.8, label=_LATE)
