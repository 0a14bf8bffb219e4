"""When clips are due: cameras of a fixed rate, Poisson arrivals and bursts, each made of a seed, and recorded ones."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..inputs import check_count, check_number

MOST_ARRIVALS = 10_000_000  # of one run


class Arrival(NamedTuple):
    """A clip of a source, due that many seconds after the run begins.

    due: when the clip's last frame is there. deadline: seconds from then, within which its answer must be there; None
    means that it may be late. steps: depth T of its purification; None means the server's own.
    """

    due: float
    source: int = 0
    deadline: float | None = None
    steps: int | None = None


def cameras(
    count: int, *, seconds: float, rate: float = 25.0, window: int = 16, hop: int = 16, seed: int = 0
) -> list[Arrival]:
    """Clips of `window` frames, each `hop` frames after the last, of cameras with `rate` frames a second.

    The cameras are switched on one after another within the first hop, at random moments, and stay on for `seconds`.
    """
    check_count("cameras", count)
    check_count("window", window, least=2)
    check_count("hop", hop, most=window)
    _check_rate(rate)
    _check_seconds(seconds, count * rate / hop)
    drawn, period = random.Random(seed), hop / rate
    first = [drawn.uniform(0, period) + window / rate for _ in range(count)]
    found = [
        Arrival(start + number * period, camera)
        for camera, start in enumerate(first)
        for number in range(max(0, math.ceil((seconds - start) / period)))
    ]
    return sorted(found)


def poisson(rate: float, *, seconds: float, seed: int = 0) -> list[Arrival]:
    """Clips that know nothing of each other, each of a source of its own: `rate` a second on average."""
    _check_rate(rate)
    _check_seconds(seconds, rate)
    return [Arrival(due, number) for number, due in enumerate(_moments(rate, seconds, random.Random(seed)))]


def bursts(
    size: int, *, every: float, seconds: float, steps: Sequence[int | None] = (None,), seed: int = 0
) -> list[Arrival]:
    """`size` clips at one moment, at random moments that lie `every` seconds apart on average.

    steps: the depths T of a burst's clips: the first source has the first, and so on around. Their order is drawn for
    each burst.
    """
    check_count("size", size)
    check_number("every", every, zero=False)
    _check_seconds(seconds, size / every)
    if not steps:
        raise ValueError("steps is empty; accepted: depths T, or None for the server's own")
    drawn = random.Random(seed)
    clips = [(number, steps[number % len(steps)]) for number in range(size)]
    found = []
    for due in _moments(1 / every, seconds, drawn):
        drawn.shuffle(clips)
        found += [Arrival(due, number, steps=depth) for number, depth in clips]
    return found


def with_deadlines(arrivals: Sequence[Arrival], deadlines: Sequence[float]) -> list[Arrival]:
    """The same arrivals with deadlines in seconds: the first source has the first, and so on around."""
    if not deadlines:
        raise ValueError("there are no deadlines; accepted: seconds, one or more")
    for deadline in deadlines:
        check_number("deadline", deadline, zero=False)
    return [arrival._replace(deadline=deadlines[arrival.source % len(deadlines)]) for arrival in arrivals]


def recorded(path: str | os.PathLike[str]) -> list[Arrival]:
    """The arrivals of a JSON file: a list of seconds, or of [seconds, source, deadline, steps], cut where one likes."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    accepted = "accepted: a JSON list of seconds, or of [seconds, source, deadline, steps] or the first of these"
    try:
        rows = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {accepted}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no list of arrivals; {accepted}")
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(_arrival(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"arrival {number} of {path} is {json.dumps(row)[:80]}: {error}; {accepted}") from error
    return sorted(found, key=lambda arrival: arrival.due)


def _arrival(row: Any) -> Arrival:
    found = Arrival(*(row if isinstance(row, list) else [row]))
    check_number("seconds", found.due)
    check_count("source", found.source, least=0)
    if found.deadline is not None:
        check_number("deadline", found.deadline, zero=False)
    if found.steps is not None:
        check_count("steps", found.steps, least=0)
    return found


def _moments(rate: float, seconds: float, drawn: random.Random) -> Iterator[float]:
    """Moments of a Poisson process: the time between two of them is exponential."""
    moment = drawn.expovariate(rate)
    while moment < seconds:
        yield moment
        moment += drawn.expovariate(rate)


def _check_rate(rate: float) -> None:
    check_number("rate", rate, zero=False)


def _check_seconds(seconds: float, rate: float) -> None:
    check_number("seconds", seconds, zero=False)
    if seconds * rate > MOST_ARRIVALS:
        raise ValueError(f"{seconds:g} s at {rate:g} clips a second are too many; accepted: {MOST_ARRIVALS} clips")
