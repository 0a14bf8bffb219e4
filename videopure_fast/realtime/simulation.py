"""A discrete-event model of servers of clips, fed with measured service times, for loads and fleets that are not here.

It models what `StreamPurifier` does: one loop a server, which admits waiting clips at every step, encodes those that
are new, evaluates the UNet for those in the loops, and decodes a vote of those that have been sampled. Its answers are
simulated, and rows made of them say so.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..inputs import check_count
from .arrivals import Arrival
from .estimates import share_in_time
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
    fleet = _Fleet([_Server(environment, seconds, setting, drawn) for _ in range(servers)])
    alone = functools.cache(lambda steps: service.clip_seconds(steps=steps))
    clips = [_Clip(arrival, service, alone(arrival.steps)) for arrival in arrivals]
    for server in fleet.servers:
        environment.process(server.serve())
    environment.process(_arrive(environment, clips, fleet))
    environment.run()
    return [clip.record() for clip in clips]


def _arrive(environment: Any, clips: Sequence[_Clip], fleet: _Fleet) -> Generator[Any, Any, None]:
    """Submit each clip when it is due. A full queue that blocks holds up those behind it, as it does the generator."""
    for clip in clips:
        if clip.arrival.due > environment.now:  # clips of one moment are all in the queue before a server looks
            yield environment.timeout(clip.arrival.due - environment.now)
        server = fleet.least()
        yield from server.submit(clip)
        fleet.note(server)


class _Fleet:
    """Servers by how many clips wait or are in flight at each. A server tells when it has fewer."""

    def __init__(self, servers: Sequence[_Server]) -> None:
        self.servers = servers
        self._order = [(0, number) for number in range(len(servers))]  # a heap; an entry is old if the number changed
        self._numbers = {id(server): number for number, server in enumerate(servers)}
        for server in servers:
            server.on_fewer = self.note

    def least(self) -> _Server:
        """One with the fewest clips."""
        while True:
            clips, number = self._order[0]
            if self.servers[number].clips() == clips:
                return self.servers[number]
            heapq.heappop(self._order)

    def note(self, server: _Server) -> None:
        """How many clips a server has now."""
        heapq.heappush(self._order, (server.clips(), self._numbers[id(server)]))


class _Clip:
    """A clip on its way through a server.

    alone: seconds that it takes where no other is in flight. evaluations, votes: those that are still to come.
    iterations, shared: of the server since it joined, and the clips in flight, summed over them.
    """

    def __init__(self, arrival: Arrival, service: ServiceTimes, alone: float) -> None:
        self.arrival, self.alone = arrival, alone
        self.iterations = self.shared = 0
        self.evaluations, self.votes = service.evaluations(arrival.steps), service.votes
        self.deadline = math.inf if arrival.deadline is None else arrival.due + arrival.deadline
        self.outcome: Outcome = "answered"
        self.points: list[float] = []  # submitted, started, encoded, sampled, decoded, done

    def is_possible(self, done: float) -> bool:
        """Whether an answer at this moment would be in time; the clip is missed if not."""
        if done > self.deadline:
            self.outcome = "missed"
        return done <= self.deadline

    def spent(self, now: float) -> float:
        """Seconds that were its own, of those that it has shared."""
        return (now - self.points[1]) * self.iterations / self.shared if self.shared else 0.0

    def record(self) -> Record:
        times = Times(*self.points) if self.outcome == "answered" else None
        deadline = None if self.arrival.deadline is None else self.deadline
        return Record(self.arrival.source, self.arrival.due, self.points[0], deadline, self.outcome, times)


class _Server:
    """One queue and the loop that empties it."""

    def __init__(
        self,
        environment: Any,
        seconds: Callable[[str, int, float | None], float],
        setting: Setting,
        drawn: random.Random | None,
    ) -> None:
        self._environment, self._seconds, self._setting, self._drawn = environment, seconds, setting, drawn
        self.on_fewer: Callable[[_Server], None] = lambda _: None
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
        """Take every clip in flight one step further, for ever."""
        while True:
            while not self._waiting and not self._active:
                yield self._changed
            joined = self._admit()
            for clip in self._active:
                clip.iterations += 1
                clip.shared += len(self._active)
            yield from self._step("encode", joined)
            self._pass(joined)
            sampling = [clip for clip in self._active if clip.evaluations]
            yield from self._step("evaluation", sampling)
            for clip in sampling:
                clip.evaluations -= 1
            self._pass([clip for clip in sampling if not clip.evaluations])
            decoding = [clip for clip in self._active if not clip.evaluations]
            yield from self._step("decode", decoding)
            for clip in decoding:
                clip.votes -= 1
            ended = [clip for clip in decoding if not clip.votes]
            self._pass(ended)
            yield from self._step("label", ended)
            self._pass(ended)
            if ended:
                self._active = [clip for clip in self._active if clip.votes]
                self.on_fewer(self)

    def _admit(self) -> list[_Clip]:
        """Refuse whoever cannot be in time any more, and take clips from the queue while there is room."""
        now, before, clips = self._environment.now, len(self._waiting), self.clips()
        self._active = [clip for clip in self._active if clip.is_possible(now)]
        self._waiting = [clip for clip in self._waiting if clip.is_possible(now + clip.alone)]
        if self.clips() < clips:
            self.on_fewer(self)
        ordered = self._waiting
        if self._setting.order == "edf":
            ordered = sorted(ordered, key=lambda clip: clip.deadline)
        joined: list[_Clip] = []
        for clip in ordered[: self._setting.max_batch - len(self._active)]:
            together = [*self._active, *joined, clip]
            if len(together) > 1 and not share_in_time(
                now, [(one.deadline, one.alone, one.spent(now)) for one in together]
            ):
                break
            joined.append(clip)
        self._waiting = [clip for clip in self._waiting if clip not in joined]
        self._active += joined
        if joined and self._drawn is not None:
            self._pace = self._drawn.random()  # until the next clip comes: slow spells outlast an evaluation
        self._pass(joined)
        if len(self._waiting) < before:
            self._notify()
        return joined

    def _step(self, stage: str, clips: Sequence[_Clip]) -> Generator[Any, Any, None]:
        if clips:
            yield self._environment.timeout(self._seconds(stage, len(clips), self._pace))

    def _pass(self, clips: Sequence[_Clip]) -> None:
        for clip in clips:
            clip.points.append(self._environment.now)

    def _notify(self) -> None:
        changed, self._changed = self._changed, self._environment.event()
        changed.succeed()
