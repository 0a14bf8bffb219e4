"""The clips that wait for a place in flight: who gives way, who is too late, and who may join."""

from __future__ import annotations

from typing import Literal

from .batching import Batch
from .flights import Clock, Ended, Request
from .serving import DeadlineMissed

Policy = Literal["block", "reject", "drop-oldest"]
Order = Literal["fifo", "edf"]


class Waiting:
    """The bounded queue of a stream, which holds the lock on it. The arguments are the stream's."""

    def __init__(
        self, batch: Batch, queue_size: int, max_batch: int, policy: Policy, order: Order, clock: Clock
    ) -> None:
        self.requests: list[Request] = []
        self._batch, self._queue_size, self._max_batch = batch, queue_size, max_batch
        self._policy, self._order, self._clock = policy, order, clock

    @property
    def full(self) -> bool:
        return len(self.requests) >= self._queue_size

    def make_room(self) -> Request | None:
        """Takes a canceled clip out of a full queue, or the oldest where that is the policy; None if none gives way."""
        gone = next((one for one in self.requests if one.future.cancelled()), None)
        if gone is None and self._policy == "drop-oldest":
            gone = min(self.requests, key=lambda one: one.submitted)
        if gone is not None:
            self.requests.remove(gone)
        return gone

    def take_late(self) -> list[Ended]:
        """Takes out clips that can no longer be in time, or were canceled."""
        ended: list[Ended] = []
        for request in list(self.requests):
            least = self._batch.estimates.least(request.kind)
            late = self._clock() + least > request.deadline
            if late or request.future.cancelled():
                self.requests.remove(request)
                if request.submitted + least > request.deadline:  # whether or not it had to wait
                    self._batch.estimates.doubt(request.kind)
                ended.append((request, DeadlineMissed("the clip's answer could no longer have been there in time")))
        return ended

    def admissible(self) -> list[Request]:
        """Those that may join the clips in flight now.

        Where clips are in flight, one of another shape waits for their end, as does one for whom a deadline would be
        missed, and so does whoever comes after it. Where none are, the first one joins, and decides on the shape.
        """
        shape = self._batch.shape
        admitted: list[Request] = []
        joining = shape is not None
        by_order = sorted(self.requests, key=lambda one: one.deadline if self._order == "edf" else 0.0)
        for request in by_order:
            if len(self._batch.flights) + len(admitted) == self._max_batch:
                break
            shape = shape or tuple(request.clip.shape)
            if tuple(request.clip.shape) == shape:
                if (joining or admitted) and not self._batch.keeps_deadlines([*admitted, request]):
                    break
                admitted.append(request)
            elif joining:
                break
        return admitted
