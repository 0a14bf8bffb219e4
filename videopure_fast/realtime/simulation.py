"""A discrete-event model of servers of clips, fed with measured service times, for loads and fleets that are not here.

It models what `StreamPurifier` does: one loop a server, which admits waiting clips at every step, encodes them
together, evaluates the UNet once for all clips in flight, and decodes those that have ended. Its answers are simulated,
and rows made of them say so.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..inputs import check_count
from .arrivals import Arrival
from .load import Outcome, Record
from .serving import Times
from .study import ServiceTimes, Setting

_MISSING = "simulating needs SimPy: pip install 'videopure-fast[latency]'"


def simulate(
    service: ServiceTimes, arrivals: Sequence[Arrival], setting: Setting, *, servers: int = 1, seed: int | None = None
) -> list[Record]:
    """What would become of each arrival at `servers` equal servers: a new clip goes to the one with the fewest clips.

    seed: of the service times, which are drawn from those measured; None takes their means.
    """
    check_count("servers", servers)
    try:
        import simpy
    except ImportError as error:
        raise ImportError(_MISSING) from error
    environment = simpy.Environment()
    drawn = None if seed is None else random.Random(seed)
    seconds = functools.cache(service.seconds) if seed is None else service.seconds
    fleet = [_Server(environment, service, seconds, setting, drawn) for _ in range(servers)]
    clips = [_Clip(arrival, service.evaluations(arrival.steps)) for arrival in arrivals]
    for server in fleet:
        environment.process(server.serve())
    environment.process(_arrive(environment, clips, fleet))
    environment.run()
    return [clip.record() for clip in clips]


def _arrive(environment: Any, clips: Sequence[_Clip], fleet: Sequence[_Server]) -> Generator[Any, Any, None]:
    """Submit each clip when it is due. A full queue that blocks holds up those behind it, as it does the generator."""
    for clip in clips:
        if clip.arrival.due > environment.now:  # clips of one moment are all in the queue before a server looks
            yield environment.timeout(clip.arrival.due - environment.now)
        yield from min(fleet, key=_Server.clips).submit(clip)


class _Clip:
    """A clip on its way through a server."""

    def __init__(self, arrival: Arrival, evaluations: int) -> None:
        self.arrival, self.left = arrival, evaluations
        self.deadline = None if arrival.deadline is None else arrival.due + arrival.deadline
        self.outcome: Outcome = "answered"
        self.points: list[float] = []  # submitted, started, encoded, sampled, decoded, done

    def record(self) -> Record:
        times = Times(*self.points) if self.outcome == "answered" else None
        return Record(self.arrival.source, self.arrival.due, self.points[0], self.deadline, self.outcome, times)


class _Server:
    """One queue and the loop that empties it."""

    def __init__(
        self,
        environment: Any,
        service: ServiceTimes,
        seconds: Callable[[str, int, float | None], float],
        setting: Setting,
        drawn: random.Random | None,
    ) -> None:
        self._environment, self._service, self._seconds = environment, service, seconds
        self._setting, self._drawn = setting, drawn
        self._waiting: list[_Clip] = []
        self._active: list[_Clip] = []
        self._changed = environment.event()  # a clip came, or left the queue
        self._pace: float | None = None if drawn is None else drawn.random()

    def clips(self) -> int:
        """How many clips wait or are in flight."""
        return len(self._waiting) + len(self._active)

    def submit(self, clip: _Clip) -> Generator[Any, Any, None]:
        """Put a clip into the queue, or do what the policy says where that is full."""
        clip.points.append(self._environment.now)
        if len(self._waiting) >= self._setting.queue_size:
            if self._setting.policy == "reject":
                clip.outcome = "refused"
                return
            if self._setting.policy == "drop-oldest":
                self._waiting.pop(0).outcome = "dropped"
            while len(self._waiting) >= self._setting.queue_size:
                yield self._changed
        self._waiting.append(clip)
        self._notify()

    def serve(self) -> Generator[Any, Any, None]:
        """Admit, encode, evaluate once, and answer what has ended, for ever."""
        while True:
            while not self._waiting and not self._active:
                yield self._changed
            joined = self._admit()
            self._active += joined
            if joined:
                yield self._spend("encode", joined)
                self._pass(joined)
            if not self._active:
                continue
            yield self._spend("evaluation", self._active)
            for clip in self._active:
                clip.left -= 1
            ended = [clip for clip in self._active if clip.left == 0]
            if ended:
                self._pass(ended)
                for stage in ("decode", "label"):
                    yield self._spend(stage, ended)
                    self._pass(ended)
                self._active = [clip for clip in self._active if clip.left]

    def _admit(self) -> list[_Clip]:
        """Take clips from the queue while there is room; one that cannot be answered in time any more is refused."""
        joined: list[_Clip] = []
        while self._waiting and len(self._active) + len(joined) < self._setting.max_batch:
            clip = self._waiting[0]
            if self._setting.order == "edf":
                clip = min(self._waiting, key=lambda one: float("inf") if one.deadline is None else one.deadline)
            self._waiting.remove(clip)
            if clip.deadline is not None and self._environment.now + self._least(clip) > clip.deadline:
                clip.outcome = "missed"
            else:
                joined.append(clip)
            self._notify()
        if joined and self._drawn is not None:
            self._pace = self._drawn.random()  # until the next clip comes: slow spells outlast an evaluation
        self._pass(joined)
        return joined

    def _least(self, clip: _Clip) -> float:
        """Seconds that the clip takes where it is alone."""
        return self._service.clip_seconds(steps=clip.arrival.steps)

    def _spend(self, stage: str, clips: Sequence[_Clip]) -> Any:
        return self._environment.timeout(self._seconds(stage, len(clips), self._pace))

    def _pass(self, clips: Sequence[_Clip]) -> None:
        for clip in clips:
            clip.points.append(self._environment.now)

    def _notify(self) -> None:
        changed, self._changed = self._changed, self._environment.event()
        changed.succeed()
