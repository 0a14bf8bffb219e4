"""What clips take, as those before them took, and whether clips that share the time will all be in time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

_MOST_KINDS = 256  # that are known at a time
_SHARE = 0.2  # of a clip that took longer than usual, in what such clips are taken to need
_MARGIN = 1.2  # times that, for clips that would share the time: what others take longer, all of them do
_DOUBT = 0.05  # by which that shrinks with each clip that it keeps out


class Estimates:
    """Seconds that clips of a kind have lately taken, as if no other had been in flight.

    The first clip of a kind says nothing: with it, kernels are compiled and steps recorded or captured.
    """

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float | None] = {}  # None: the next one will tell

    def least(self, kind: Hashable) -> float:
        """Seconds that such a clip needs, as far as is known; 0 for an unknown kind."""
        return self._seconds.get(kind) or 0.0

    def restart(self, kind: Hashable) -> None:
        """What such clips have taken says nothing any more, and the next one will tell."""
        self._seconds.pop(kind, None)
        while len(self._seconds) >= _MOST_KINDS:
            self._seconds.pop(next(iter(self._seconds)))
        self._seconds[kind] = None

    def took(self, kind: Hashable, seconds: float) -> None:
        """Such a clip has ended after so many seconds of its own."""
        if kind not in self._seconds:
            self.restart(kind)
            return
        before = self._seconds[kind]
        self._seconds[kind] = seconds if before is None else min(seconds, before + _SHARE * (seconds - before))

    def takes_more(self, kind: Hashable, seconds: float) -> None:
        """Such a clip was given up after so many seconds of its own."""
        if kind not in self._seconds:
            self.restart(kind)
        else:
            self._seconds[kind] = max(self.least(kind), seconds)

    def doubt(self, kind: Hashable) -> None:
        """Such a clip was refused as it came: trust what they take a little less, so that one of them will tell."""
        if kind in self._seconds:
            self._seconds[kind] = (1 - _DOUBT) * self.least(kind)


def share_in_time(now: float, clips: Sequence[tuple[float, float, float]]) -> bool:
    """Whether clips that share the time equally all meet their deadlines.

    clips: of each, its deadline, the seconds that it takes alone, and how many of these it has had. It is done when
    every other one, too, has had as many seconds as it still needs itself, or has ended before.
    """
    left = [(deadline, max(0.0, _MARGIN * alone - spent)) for deadline, alone, spent in clips]
    return all(now + sum(min(own, other) for _, other in left) <= deadline for deadline, own in left)
