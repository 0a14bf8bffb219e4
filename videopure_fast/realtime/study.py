"""What a study of latency measures: the figures of a run, the service times of a server, the load that it carries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import atomic_write
from ..inputs import check_number
from ..machine import describe_machine
from .arrivals import Arrival, poisson
from .load import Record, offer
from .queueing import Order, Policy
from .serving import ClipServer, Times

KIND = "videopure-fast latency"
STAGES = ("wait", "encode", "sample", "decode", "label")  # of a clip's latency; "wait" begins when it is due
_PERCENTS = (50, 90, 95, 99)
_DIGITS = 6  # of seconds in a file
_LEAST_LOAD = 0.1  # tried in a sweep
_APART = 1e-3  # seconds within which the clips of one batch leave the queue


class Setting(NamedTuple):
    """How a server is set: clips in one batch at most, clips that may wait, and what happens when more come.

    policy: a full queue blocks the caller, rejects the new clip, or drops the oldest. order: first come, first served,
    or the earliest deadline first.
    """

    max_batch: int = 1
    queue_size: int = 64
    policy: Policy = "block"
    order: Order = "fifo"

    def __str__(self) -> str:
        batch = "one by one" if self.max_batch == 1 else f"batches of {self.max_batch}"
        return f"{batch}, {self.order}, queue of {self.queue_size}, {self.policy}"


Build = Callable[[Setting], AbstractContextManager[ClipServer]]


class ServiceTimes(NamedTuple):
    """Seconds of each stage, measured several times, by how many clips it took at once.

    evaluation: of one evaluation of the UNet, of which a clip of depth T takes `evaluations(T)`. depth: T of clips that
    say none. decode: of one vote, with the classifier, of which a clip takes `votes`. label: of what comes after that.
    """

    encode: Mapping[int, Sequence[float]]
    evaluation: Mapping[int, Sequence[float]]
    decode: Mapping[int, Sequence[float]]
    label: Mapping[int, Sequence[float]]
    depth: int
    votes: int = 1

    def evaluations(self, steps: int | None = None) -> int:
        """How many evaluations a clip takes: T + 1 of inversion, and as many of denoising."""
        return 2 * ((self.depth if steps is None else steps) + 1)

    def seconds(self, stage: str, clips: int, quantile: float | None = None) -> float:
        """Seconds of a stage for so many clips at once: the mean, or the measured one at a quantile.

        Between measured sizes it is interpolated; above the largest, time grows in proportion to the clips.
        """
        measured: Mapping[int, Sequence[float]] = getattr(self, stage)
        sizes = sorted(measured)
        if clips > sizes[-1]:
            return self.seconds(stage, sizes[-1], quantile) * clips / sizes[-1]
        values = [_value(measured[size], quantile) for size in sizes]
        return float(np.interp(clips, sizes, values))

    def clip_seconds(self, clips: int = 1, steps: int | None = None) -> float:
        """Mean seconds from the queue to the answer, of so many clips in one batch."""
        once = self.seconds("encode", clips) + self.seconds("label", clips)
        sampling = self.evaluations(steps) * self.seconds("evaluation", clips)
        return once + sampling + self.votes * self.seconds("decode", clips)

    def merged(self, other: ServiceTimes) -> ServiceTimes:
        """The times of two measurements of one server, which measured the same batch sizes."""
        found: dict[str, Any] = {}
        for stage in ("encode", "evaluation", "decode", "label"):
            mine, others = getattr(self, stage), getattr(other, stage)
            found[stage] = {size: [*times, *others[size]] for size, times in mine.items()}
        return self._replace(**found)

    def scaled(self, stage: str, factor: float) -> ServiceTimes:
        """The same server with one stage that takes `factor` of its time."""
        measured: Mapping[int, Sequence[float]] = getattr(self, stage)
        scaled: Any = {size: [factor * value for value in values] for size, values in measured.items()}
        return self._replace(**{stage: scaled})


def _value(samples: Sequence[float], quantile: float | None) -> float:
    if quantile is None:
        return sum(samples) / len(samples)
    return sorted(samples)[min(int(quantile * len(samples)), len(samples) - 1)]


def measure_service(
    server: ClipServer,
    clip: Tensor,
    *,
    depth: int,
    votes: int = 1,
    batches: Sequence[int] = (1,),
    repeats: int = 5,
) -> ServiceTimes:
    """Measure an idle server's stages, read from the times of its answers.

    While it computes a clip of another shape, which no batch can join, the clips of a larger batch gather in its queue.
    ValueError where it did not take them together.
    """
    found: dict[str, dict[int, list[float]]] = {stage: {} for stage in ("encode", "evaluation", "decode", "label")}
    other = clip[:, : max(2, clip.shape[1] // 2)]
    if max(batches) > 1 and other.shape == clip.shape:
        raise ValueError(f"clips have {clip.shape[1]} frames; accepted: 3 or more")
    parts = {"evaluation": 2 * (depth + 1), "decode": votes}
    for size in batches:
        for repeat in range(repeats + 1):
            if size > 1:
                server.submit(other)
            futures = [server.submit(clip) for _ in range(size)]
            times = [future.result().times for future in futures]
            if max(one.started for one in times) - min(one.started for one in times) > _APART:
                raise ValueError(f"the server did not take {size} clips together; accepted: its largest batch or less")
            if repeat == 0:  # the first of a size may compile and capture
                continue
            for stage, seconds in zip(found, np.diff(times[-1][1:]).tolist(), strict=True):
                found[stage].setdefault(size, []).append(seconds / parts.get(stage, 1))
    return ServiceTimes(**found, depth=depth, votes=votes)


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of a run: counts, throughput, utilization, percentiles, and the mean seconds of each stage.

    late: answered after the deadline. in_time: the share of all clips that were answered, and not late. Figures of
    latency are those of answered clips; None where there are none. queue_age: from when a clip was due until it left
    the queue. lag: how late the generator itself was. utilization: the share of the time, from the first clip that was
    due to the last answer, in which the server had a clip out of its queue.
    """
    outcomes: list[str] = [record.outcome for record in records]
    names = ("answered", "dropped", "refused", "missed", "failed")
    found: dict[str, Any] = {"offered": len(records), **{name: outcomes.count(name) for name in names}}
    in_time = sum(record.in_time for record in records)
    found |= {"late": found["answered"] - in_time, "in_time": in_time / len(records)}
    found["error"] = next((record.error for record in records if record.error), None)
    dues = [record.due for record in records]
    first, last = min(dues), max(dues)
    found["offered_per_second"] = (len(records) - 1) / (last - first) if last > first else None
    found["lag"] = _percentiles([one.submitted - one.due for one in records if one.submitted is not None])
    # [answered, 6]: when each clip was due, left the queue, and ended a stage
    points = np.array([(record.due, *record.times[1:]) for record in records if record.times]).reshape(-1, 6)
    span = points[:, -1].max(initial=first) - first
    found["answered_per_second"] = len(points) / span if span else 0.0
    found["utilization"] = _busy_seconds(points[:, 1], points[:, -1]) / span if span else 0.0
    found["latency"] = _percentiles(points[:, -1] - points[:, 0])
    found["queue_age"] = _percentiles(points[:, 1] - points[:, 0])
    means = np.diff(points, axis=1).mean(0).tolist() if len(points) else None
    found["stages"] = means and dict(zip(STAGES, means, strict=True))
    return found


def _percentiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    if not len(seconds):
        return None
    values = np.percentile(seconds, _PERCENTS).tolist()
    named = {f"p{percent}": value for percent, value in zip(_PERCENTS, values, strict=True)}
    return {"mean": float(np.mean(seconds)), **named, "max": float(np.max(seconds))}


def _busy_seconds(starts: np.ndarray, ends: np.ndarray) -> float:
    """Seconds in which at least one clip was out of the queue and not yet answered."""
    order = np.argsort(starts)
    starts, reached = starts[order], np.maximum.accumulate(ends[order])
    return float(reached[-1] - starts[0] - np.maximum(starts[1:] - reached[:-1], 0).sum())


def run(
    build: Build,
    setting: Setting,
    clips: Sequence[Tensor],
    arrivals: Sequence[Arrival],
    *,
    progress: Callable[[], None] | None = None,
    **labels: Any,
) -> dict[str, Any]:
    """Offer the arrivals to a new server, which `build` has warmed up. labels: what the row also says."""
    with build(setting) as server:
        records = offer(server, clips, arrivals, progress=progress)
    return row(setting, records, **labels)


def row(setting: Setting, records: Sequence[Record], *, simulated: bool = False, **labels: Any) -> dict[str, Any]:
    """One run as it is saved: its setting, its figures, and what became of each clip."""
    found = {**labels, "simulated": simulated, "setting": setting._asdict(), "summary": summarize(records)}
    return {**found, "records": [_flat(record) for record in records]}


def carried_load(
    build: Build,
    setting: Setting,
    clips: Sequence[Tensor],
    service: ServiceTimes,
    *,
    deadline: float,
    seconds: float,
    seed: int = 0,
    within: float = 0.05,
    progress: Callable[[], None] | None = None,
) -> tuple[float | None, list[dict[str, Any]]]:
    """The highest share of what one clip after another allows at which p95 is within the deadline, and the runs tried.

    The clips are due at random moments for `seconds` a run. The server is told no deadline: it computes every clip.
    """
    check_number("deadline", deadline, zero=False)
    tried: list[dict[str, Any]] = []
    batch = setting.max_batch
    most = batch * service.clip_seconds() / service.clip_seconds(batch)  # more than 1 where a batch pays

    def meets(load: float) -> bool:
        arrivals = poisson(load / service.clip_seconds(), seconds=seconds, seed=seed)
        if not arrivals:
            return True
        tried.append(run(build, setting, clips, arrivals, progress=progress, load=load))
        latency = tried[-1]["summary"]["latency"]
        return latency is not None and latency["p95"] <= deadline

    return highest_load(meets, _LEAST_LOAD, max(1.0, most), within=within), tried


def highest_load(meets: Callable[[float], bool], low: float, high: float, *, within: float = 0.02) -> float | None:
    """The highest load between `low` and `high` at which `meets` is true, to within that share of it.

    None if `low` does not meet it. A higher load is taken to be harder; `meets` may be a measured run.
    """
    if not 0 < low < high or within <= 0:
        raise ValueError(f"low is {low}, high {high}, within {within}; accepted: 0 < low < high, and within > 0")
    if meets(high):
        return high
    if not meets(low):
        return None
    while high - low > within * low:
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def fewest(meets: Callable[[int], bool], least: int = 1, most: int = 1_000_000) -> int | None:
    """The lowest whole number from `least` to `most` at which `meets` is true; None if `most` does not meet it.

    A higher number is taken to be easier.
    """
    high, step = least, 1
    while not meets(high):
        if high >= most:
            return None
        least, high, step = high + 1, min(high + step, most), 2 * step
    while least < high:
        middle = (least + high) // 2
        least, high = (least, middle) if meets(middle) else (middle + 1, high)
    return high


def new_study(device: torch.device, **settings: Any) -> dict[str, Any]:
    """A study without rows: where and when it was made, and what holds for all of its rows."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"kind": KIND, "created": created, "machine": describe_machine(device), "settings": settings, "rows": []}


def save(study: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a study as JSON. The file that was there stays until the new one is complete."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(study) + "\n")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a saved study. ValueError if there is none."""
    try:
        study = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read a study from {path}: {error}") from error
    if not isinstance(study, dict) or study.get("kind") != KIND:
        raise ValueError(f"{path} is no study of latency; accepted: a file written by {KIND} --json")
    return study


def _flat(record: Record) -> list[Any]:
    times = [] if record.times is None else record.times
    numbers = [record.due, record.submitted, record.deadline, *times]
    rounded = [None if number is None else round(number, _DIGITS) for number in numbers]
    return [record.source, record.outcome, *rounded]


def read_records(row: Mapping[str, Any]) -> list[Record]:
    """The records of a saved row."""
    return [
        Record(source, due, submitted, deadline, outcome, Times(*times) if times else None)
        for source, outcome, due, submitted, deadline, *times in row["records"]
    ]
