"""The open-loop generator: it submits each clip when it is due, whether or not earlier ones have been answered.

A closed loop, which waits for an answer before the next clip, offers less load the slower the server is, and does not
see the clips that would have waited meanwhile. Here the moments are fixed before the run, and latency counts from when
a clip was due, also where the generator itself was held up, such as by a full queue that blocks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from .arrivals import Arrival
from .serving import Answer, ClipServer, Closed, DeadlineMissed, Dropped, QueueFull, Times

Outcome = Literal["answered", "dropped", "refused", "missed", "failed"]
_LEAD = 0.01  # seconds from the call to the run's beginning
_OUTCOMES: dict[type[BaseException], Outcome] = {
    Dropped: "dropped",
    QueueFull: "refused",
    Closed: "refused",
    CancelledError: "refused",
    DeadlineMissed: "missed",
}


class Clock(Protocol):
    """What the generator reads and waits on; its seconds are those of the server's Times."""

    def now(self) -> float: ...

    def wait_until(self, moment: float) -> None: ...

    def wait_for(self, futures: Sequence[Future[Answer]]) -> None:
        """Return when all of them have ended."""
        ...


class WallClock:
    """time.monotonic."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        remaining = moment - time.monotonic()
        if remaining > 0:
            time.sleep(remaining)

    def wait_for(self, futures: Sequence[Future[Answer]]) -> None:
        for future in futures:
            with contextlib.suppress(CancelledError):
                future.exception()


class Record(NamedTuple):
    """What became of one clip, in seconds since the run began.

    submitted: None if it was too late to be submitted. times: those of the server, where it answered. deadline: when
    the answer had to be there. error: what went wrong, of a clip that failed.
    """

    source: int
    due: float
    submitted: float | None
    deadline: float | None
    outcome: Outcome
    times: Times | None = None
    error: str | None = None

    @property
    def latency(self) -> float | None:
        """Seconds from when the clip was due to its answer."""
        return None if self.times is None else self.times.done - self.due

    @property
    def in_time(self) -> bool:
        """It was answered, and by its deadline if it has one."""
        return self.times is not None and (self.deadline is None or self.times.done <= self.deadline)


def offer(
    server: ClipServer,
    clips: Sequence[Tensor],
    arrivals: Sequence[Arrival],
    *,
    clock: Clock | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Record]:
    """Submit a clip at each arrival, in turn from `clips`, wait until all have ended, and say what became of each.

    The server is told the arrivals' deadlines and depths. progress: called as each clip has been submitted.
    """
    if not clips or not arrivals:
        raise ValueError(f"there are {len(clips)} clips and {len(arrivals)} arrivals; accepted: one of each or more")
    clock = clock or WallClock()
    origin = clock.now() + _LEAD
    pending: list[tuple[float | None, Future[Answer]]] = []
    try:
        for number, arrival in enumerate(arrivals):
            clock.wait_until(origin + arrival.due)
            pending.append(_submit(server, clips[number % len(clips)], arrival, origin, clock))
            if progress is not None:
                progress()
        clock.wait_for([future for _, future in pending])
    except BaseException:  # such as Ctrl-C: nobody waits for these any more
        for _, future in pending:
            future.cancel()
        raise
    return [
        _record(arrival, submitted, future, origin)
        for arrival, (submitted, future) in zip(arrivals, pending, strict=True)
    ]


def _submit(
    server: ClipServer, clip: Tensor, arrival: Arrival, origin: float, clock: Clock
) -> tuple[float | None, Future[Answer]]:
    """When the clip was submitted, and its future: one that has ended already if the server did not take it."""
    submitted = clock.now()
    options: dict[str, Any] = {} if arrival.steps is None else {"steps": arrival.steps}
    if arrival.deadline is not None:
        options["deadline"] = origin + arrival.due + arrival.deadline - submitted
        if options["deadline"] <= 0:
            return None, _ended(DeadlineMissed("it was too late when it could be submitted"))
    try:
        return submitted - origin, server.submit(clip, **options)
    except Exception as error:
        return submitted - origin, _ended(error)


def _ended(error: Exception) -> Future[Answer]:
    future: Future[Answer] = Future()
    future.set_exception(error)
    return future


def _record(arrival: Arrival, submitted: float | None, future: Future[Answer], origin: float) -> Record:
    fields: dict[str, Any] = {
        "source": arrival.source,
        "due": arrival.due,
        "submitted": submitted,
        "deadline": None if arrival.deadline is None else arrival.due + arrival.deadline,
    }
    with contextlib.suppress(CancelledError):
        error = future.exception()
        if error is None:
            times = Times(*(moment - origin for moment in future.result().times))
            return Record(**fields, outcome="answered", times=times)
        if type(error) not in _OUTCOMES:
            return Record(**fields, outcome="failed", error=f"{type(error).__name__}: {error}")
        return Record(**fields, outcome=_OUTCOMES[type(error)])
    return Record(**fields, outcome="refused")
