"""Figures of a study in cells, for a terminal and for Markdown, and in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .study import ServiceTimes, Setting

HEADER = ("load", "clips", "clips/s", "p50", "p90", "p95", "p99", "age", "in time", "not done", "busy")
LEGEND = (
    "Seconds from when a clip was due to its answer. age: 95 % of the clips left the queue within so many seconds. "
    "in time: answered, by the deadline if there is one. not done: dropped, refused, missed or failed. busy: the share "
    "of the time in which a clip was out of the queue."
)
SCENARIO_HEADER = ("scenario", "clips", "clips/s", "p50", "p90", "p95", "p99", "LoadGen says")
_MISSING = "-"
_DISTURBED = 1.1  # clips answered in the time of one alone, above which the machine was busy when that was measured


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of a run below HEADER. Not computed: dropped, refused, missed or failed, and which of these."""
    summary = row["summary"]
    latency, age = summary["latency"], summary["queue_age"]
    undone = [f"{summary[name]} {name}" for name in ("dropped", "refused", "missed", "failed") if summary[name]]
    return [
        f"{row['load']:.0%}" if row.get("load") else _MISSING,
        str(summary["offered"]),
        f"{summary['answered_per_second']:.3g}",
        *(f"{latency[name]:.3g}" if latency else _MISSING for name in ("p50", "p90", "p95", "p99")),
        f"{age['p95']:.3g}" if age else _MISSING,
        f"{summary['in_time']:.1%}",
        ", ".join(undone) or "0",
        f"{summary['utilization']:.0%}",
    ]


def name_of(row: Mapping[str, Any]) -> str:
    """A run's setting, and first of all whether it was simulated."""
    return ("simulated: " if row["simulated"] else "") + str(Setting(**row["setting"]))


def scenario_cells(figures: Mapping[str, Any]) -> list[str]:
    """The cells of one of LoadGen's scenarios below SCENARIO_HEADER."""
    latency = figures["latency"]
    return [
        figures["scenario"],
        str(figures["clips"]),
        f"{figures['clips_per_second']:.3g}",
        *(f"{latency[name]:.3g}" for name in ("p50", "p90", "p95", "p99")),
        "valid" if figures["valid"] else "invalid",
    ]


def scenario_note(runs: Sequence[Mapping[str, Any]]) -> str:
    """How the figures of LoadGen's scenarios are to be read."""
    note = "Seconds of a query. Invalid: too few queries for LoadGen to be sure of the percentile, or it was missed."
    short = {run["seconds"] for run in runs if run["shorter_than_mlperf"]}
    if not short:
        return note
    least = runs[0]["mlperf_seconds"]
    return f"{note} Runs of {max(short):g} s, and MLPerf's rules ask for {least}: these are no MLPerf results."


def sentences(service: ServiceTimes, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a study of loads says, for those who have never seen one."""
    seconds, several = service.clip_seconds(), len(set(map(name_of, rows))) > 1
    yield f"Alone, a clip takes {seconds:.3g} s: at most {1 / seconds:.3g} clips a second, one after another."
    alone = (row for row in rows if row.get("load") and row["setting"]["max_batch"] == 1)
    fastest = max((row["summary"]["answered_per_second"] for row in alone), default=0.0)
    if fastest * seconds > _DISTURBED:
        yield (
            f"But {fastest:.3g} clips a second were answered: other work may have slowed this machine while a clip was "
            "measured alone. Loads in percent are of that rate; measure again when it is quiet."
        )
    for row in rows:
        latency = row["summary"]["latency"]
        if row.get("load") and latency:
            waited = row["summary"]["stages"]["wait"] / latency["mean"]
            by = f", {name_of(row)}" if several else ""
            yield (
                f"At {row['load']:.0%} of that{by}, half of the clips take more than {latency['p50']:.3g} s and one in "
                f"twenty more than {latency['p95']:.3g} s; {waited:.0%} of the time is waiting."
            )


def camera_sentence(service: ServiceTimes, *, rate: float, hop: int) -> str:
    """How much of a server one camera takes."""
    share = service.clip_seconds() * rate / hop
    room = int(1 / share)
    able = f"keeps up with {room} at most, and with fewer where clips have deadlines" if room else "cannot keep up"
    return (
        f"A camera of {rate:g} frames a second, a clip every {hop} frames, takes {share:.0%} of this server: it {able}."
    )
