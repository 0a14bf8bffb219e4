"""The generated parts of bench/LATENCY.md and the README's picture of latency, from bench/results/latency-cpu.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown_table import markdown

from videopure_fast.realtime import study
from videopure_fast.realtime.study import ServiceTimes, Setting, read_records
from videopure_fast.realtime.tables import (
    HEADER,
    LEGEND,
    SCENARIO_HEADER,
    cells,
    name_of,
    scenario_cells,
    scenario_note,
    sentences,
)

UNMEASURED = "Not measured yet: `make latency`."
PARTS = ("load", "policies", "scenarios", "simulated")
JUDGED, ALLOWED = (0.5, 0.8), 0.15  # loads, and the accepted difference of simulated p50 and p95 from measured ones
DEEP_SOURCE = 3  # of the bursts
Rows = list[dict[str, Any]]


def parts(results: Path) -> dict[str, str]:
    """The parts of the page, by name."""
    file = results / "latency-cpu.json"
    if not file.exists():
        return dict.fromkeys(PARTS, UNMEASURED)
    result = study.load(file)
    makers = (load, policies, scenarios, simulated)
    return {name: "\n".join(make(result)) for name, make in zip(PARTS, makers, strict=True)}


def picture(results: Path) -> str:
    """The README's part: one picture, and the sentence that a reader needs for it."""
    file = results / "latency-cpu.json"
    if not file.exists():
        return UNMEASURED
    result = study.load(file)
    (row,) = (
        row for row in rows_of(result, "load") if row["load"] == 0.8 and not row["simulated"] and is_one_by_one(row)
    )
    latency, seconds = row["summary"]["latency"], service_of(result).clip_seconds()
    return "\n".join(
        [
            "![Latency against load, and where the time goes](bench/results/latency-cpu.svg)",
            "",
            f"A clip takes {seconds:.2g} s alone on {machine(result)}; at 80 % load half of the clips take more than "
            f"{latency['p50']:.2g} s, and one in twenty more than {latency['p95']:.2g} s. Lines are simulated, marks "
            "measured. [bench/LATENCY.md](bench/LATENCY.md) has policies, scenarios and fleets.",
        ]
    )


def load(result: dict[str, Any]) -> Iterator[str]:
    rows = rows_of(result, "load")
    yield from markdown(["server", *HEADER], [[name_of(row), *cells(row)] for row in rows])
    yield from (
        "",
        f"{LEGEND} load: clips a second that are offered, as a share of those that could be answered one after another "
        "by the time of a clip alone when the study began; arrivals are random: a run of minutes has more or fewer.",
        "",
    )
    measured = [row for row in rows if not row["simulated"]]
    for sentence in sentences(service_of(result), [row for row in measured if is_one_by_one(row)]):
        yield f"- {sentence}"
    after = f"After the study a clip alone took {service_of(result, 'service_after').clip_seconds():.3g} s."
    yield from ("", f"{after} `make latency` on {machine(result)}, {result['created'][:10]}.", "")
    yield from agreement(rows)
    yield ""
    yield "![Latency against load](results/latency-cpu.svg)"
    yield ""
    yield "![Clips on their way through the stages](results/latency-cpu-timeline.svg)"


def agreement(rows: Rows) -> Iterator[str]:
    """How far the simulation is from what was measured, run by run."""
    lines = []
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        latency, simulated = row["summary"]["latency"], other["summary"]["latency"]
        apart = [simulated[name] / latency[name] - 1 for name in ("mean", "p50", "p95")]
        met = "yes" if max(map(abs, apart[1:])) <= ALLOWED else "no"
        met = met if row["load"] in JUDGED else "shown only"
        slower = flight_seconds(row) / flight_seconds(other) - 1
        lines.append(
            [f"{row['load']:.0%}, {name_of(row)}", *(f"{value:+.0%}" for value in (*apart, slower, row["drift"])), met]
        )
    yield (
        "The simulation's figures against the measured ones; p50 and p95 are asked to be within "
        f"{ALLOWED:.0%} at {' and '.join(f'{load:.0%}' for load in JUDGED)} load; at more they are shown, since queues "
        "multiply every difference there. slower: by how "
        "much longer clips took in the run, from the queue to the answer, than in the simulation, whose times were "
        "measured around it; queues multiply that. drift: how much longer a clip took after the run than before it. "
        "At 50 % load about half of the clips wait and half do not, so the p50 is where the latencies jump from one "
        "kind to the other."
    )
    yield ""
    yield from markdown(["run", "mean", "p50", "p95", "slower", "drift", "within"], lines)


def flight_seconds(row: dict[str, Any]) -> float:
    """Mean seconds of a clip from the queue to its answer."""
    stages = row["summary"]["stages"]
    return float(sum(seconds for stage, seconds in stages.items() if stage != "wait"))


def policies(result: dict[str, Any]) -> Iterator[str]:
    rows = rows_of(result, "cameras")
    yield (
        f"{rows[0]['cameras']} cameras of 25 frames a second, a clip every 16 frames, and a deadline of "
        f"{deadline_of(rows[0]):g} s:"
    )
    yield ""
    yield from markdown(["server", *HEADER], [[name_of(row), *cells(row)] for row in rows])
    yield ""
    yield "The same cameras, where every second one has three times as long:"
    yield ""
    yield from markdown(["server", *HEADER], [[name_of(row), *cells(row)] for row in rows_of(result, "order")])
    yield ""
    yield "Bursts of three shallow clips (T=1) and a deep one (T=9), at about 60 % load; seconds:"
    yield ""
    lines = []
    for row in rows_of(result, "bursts"):
        records = [record for record in read_records(row) if record.latency is not None]
        shallow = [record.latency for record in records if record.source != DEEP_SOURCE]
        deep = [record.latency for record in records if record.source == DEEP_SOURCE]
        every = row["summary"]["latency"]
        lines.append([name_of(row), *(f"{value:.3g}" for value in (median(shallow), median(deep), every["p95"]))])
    yield from markdown(["server", "p50, shallow", "p50, deep", "p95, all"], lines)


def scenarios(result: dict[str, Any]) -> Iterator[str]:
    yield from markdown(list(SCENARIO_HEADER), [scenario_cells(figures) for figures in result["scenarios"]])
    yield from ("", scenario_note(result["scenarios"]), "")
    sweep = result["sweep"]
    yield (
        "Beside those scenarios, a sweep of random arrivals: the highest load at which 95 % of clips are answered "
        f"within {sweep['deadline']:.3g} s, {sweep['deadline_clips']} times that of a clip alone, one by one: "
        f"{share(sweep['measured'])} measured in runs of {sweep['seconds']:g} s, {share(sweep['simulated'])} simulated."
    )


def simulated(result: dict[str, Any]) -> Iterator[str]:
    answers = result["answers"]
    yield "**All of this is simulated.**"
    yield ""
    lines = []
    for found in answers["fleets"]:
        what = f"{found['machine']}{', ' + found['change'] if found['change'] else ''}"
        lines.append(
            [what, f"{found['clip_seconds']:.3g}", str(found["window"]), f"{found['busy_servers']:.0f}"]
            + [f"**{found['servers'] or 'too slow'}**"]
        )
    first = answers["fleets"][0]
    yield (
        f"How many servers {first['cameras']:,} cameras of 25 frames a second need, for {first['in_time']:.0%} of the "
        f"clips to be answered within {first['deadline']:g} s; a clip follows the last without overlap, and goes to "
        "the server with the fewest clips. Cameras are periodic and each clip takes its mean time, so that hardly more "
        "servers are needed than are busy; where clips take unequal times it is more:"
    )
    yield ""
    yield from markdown(["simulated server", "s a clip", "frames", "busy on average", "needed"], lines)
    yield ""
    yield (
        "The H200's stages are those that `make gpu` measured for one clip with a given flow, with four votes decoded; "
        "several clips at once are taken to gain nothing there."
    )
    yield ""
    assumed = answers["assumed"]
    more, two, four = assumed["carried"]["4"] / assumed["carried"]["1"], *(assumed["curve"][size] for size in "24")
    yield (
        f"Where a batch of 4 costs as much as {four:g} single clips, and one of 2 as much as {two:.3g}, which is "
        f"**assumed**, batches of 4 carry {more:.2f} times the load that is possible one by one, where 95 % of "
        f"clips are to be answered within {assumed['deadline_clips']} times the time of one alone."
    )


def rows_of(result: dict[str, Any], part: str) -> Rows:
    return [row for row in result["rows"] if row["part"] == part]


def is_one_by_one(row: dict[str, Any]) -> bool:
    return Setting(**row["setting"]).max_batch == 1


def service_of(result: dict[str, Any], when: str = "service") -> ServiceTimes:
    """The service times measured before the study, or "service_after" it; JSON has made the batch sizes words."""
    fields = dict(result[when])
    for stage in ("encode", "evaluation", "decode", "label"):
        fields[stage] = {int(size): times for size, times in fields[stage].items()}
    return ServiceTimes(**fields)


def deadline_of(row: dict[str, Any]) -> float:
    record = read_records(row)[0]
    return 0.0 if record.deadline is None else record.deadline - record.due


def machine(result: dict[str, Any]) -> str:
    found = result["machine"]
    return f"{found['device']}, {found['threads']} threads, torch {found['torch']}"


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def share(load: float | None) -> str:
    return "none" if load is None else f"{load:.0%}"
