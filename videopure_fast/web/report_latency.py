"""The report's section on latency: how long clips wait as the load grows, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence

from .report_charts import Curve, Stack, lines, stacks
from .report_data import Results, Run
from .report_markup import NBSP, Markup, element, legend, table
from .report_sections import Section, figure, paragraph, section, side_by_side, unmeasured

_PERCENTILES = {"p50": "series-1", "p95": "series-2", "p99": "series-3"}
# The parts of a clip's latency: class and words.
_STAGES = {
    "wait": ("quiet", "waiting"),
    "encode": ("series-4", "encode"),
    "sample": ("series-1", "denoise"),
    "decode": ("series-3", "decode"),
    "label": ("series-5", "label"),
}
_ROOM = 1.15  # of the largest measured latency, up to which an axis reaches


def latency(results: Results) -> Section:
    """Latency against load, a panel for each setting of the server."""
    title = "How long clips wait"
    found = results.latency
    measured = [] if found is None else [run for run in found.runs if not run.simulated]
    if found is None or not measured:
        return section("latency", title, unmeasured("make latency"))
    said = (
        "Clips come at random moments, whether or not earlier ones have been answered, and a clip's latency counts "
        "from when it was due. The load is a share of what the server can do. Marks are measured; lines are simulated "
        "from the measured times of the stages."
    )
    top = _ROOM * max(run.latency["p99"] for run in measured) or 1.0
    settings = list(dict.fromkeys(run.setting for run in measured))
    panels = [_panel(setting, [run for run in found.runs if run.setting == setting], top) for setting in settings]
    panels.append(_stages([run for run in measured if run.setting == settings[0]], settings[0]))
    return section(
        "latency",
        title,
        paragraph(said),
        side_by_side(*panels),
        paragraph(element("code", "make latency"), f" {found.made}."),
        _table(found.runs),
    )


def _panel(setting: str, runs: Sequence[Run], top: float) -> Markup:
    curves = []
    for simulated in (True, False):
        shown = [run for run in runs if run.simulated == simulated and _drawn(run)]
        named = simulated or not any(run.simulated for run in runs)
        for name, kind in _PERCENTILES.items() if shown else ():
            loads, seconds = [100 * run.load for run in shown], [run.latency[name] for run in shown]
            curves.append(Curve(name if named else "", kind, loads, seconds, simulated))
    chart = lines(curves, f"Latency against load: {setting}", x_top=100, y_top=top, x_unit="%", y_unit="s")
    caption = element("figcaption", f"Load in percent, latency in seconds; {setting}.")
    return figure(_capital(runs[0].title), chart, caption)


def _drawn(run: Run) -> bool:
    """Whether a chart has the run: of the simulated ones, those of the fine curve, which have no records."""
    return not run.simulated or run.curve


def _stages(runs: Sequence[Run], setting: str) -> Markup:
    rows = []
    for run in runs:
        known = {stage: run.stages.get(stage, 0.0) for stage in _STAGES}
        parts = [(kind, known[stage], f"{words}: {known[stage]:.3g} s") for stage, (kind, words) in _STAGES.items()]
        rows.append(Stack(f"{100 * run.load:.0f}{NBSP}% load", parts, f"{sum(known.values()):.3g} s"))
    chart = stacks(rows, "Mean seconds of a clip by stage", "s")
    caption = element("figcaption", f"Mean seconds of a clip; {setting}.")
    return figure("Where the time goes", legend(_STAGES.values()), chart, caption)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _table(runs: Sequence[Run]) -> Markup:
    from ..realtime.tables import HEADER

    shown = [run for run in runs if not (run.simulated and run.curve)]
    named = [f"{'simulated: ' if run.simulated else ''}{run.setting}" for run in shown]
    return table(["server", *HEADER], [[name, *run.cells] for name, run in zip(named, shown, strict=True)])
