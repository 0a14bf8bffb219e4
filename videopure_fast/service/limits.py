"""What the service takes at most, and the queue before it: each bound has a status and a sentence for more."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from types import TracebackType
from typing import NamedTuple

from starlette.exceptions import HTTPException

_SHARE = 0.2  # of the newest request, in what requests are taken to need
_LONGEST_RETRY = 600  # seconds


class Limits(NamedTuple):
    """Bounds of a service.

    Of a video, answered by 413: bytes of the file; seconds for which it plays; frames; pixels of a frame as it is
    uploaded; aspect, its longer side by its shorter one; and reading, seconds in which it is decoded.

    Of many requests, answered by 503: working, videos that are decoded, purified and encoded at once; waiting, videos
    that wait for that; uploads that come at once; viewers of live sources; and connections, with a request or without.

    Of time, in seconds: head, for the lines before an upload, else the connection is cut; idle, between two pieces of
    an upload, and upload, for all of it, else 408; answer, from the end of the upload to the answer, else 504; live,
    for the first picture of a source, else 503; taking, for a client to take what waits for it, else it is cut; drain,
    for what is in flight when the service ends, which is canceled then.
    """

    bytes: int = 64 * 2**20
    seconds: float = 60.0
    frames: int = 256
    pixels: int = 4096 * 2304
    aspect: float = 4.0
    reading: float = 30.0
    working: int = 2
    waiting: int = 8
    uploads: int = 16
    viewers: int = 16
    connections: int = 256
    head: float = 10.0
    idle: float = 10.0
    upload: float = 120.0
    answer: float = 300.0
    live: float = 20.0
    taking: float = 120.0
    drain: float = 30.0


def check_limits(limits: Limits) -> None:
    """TypeError or ValueError unless all bounds are numbers that let something in."""
    for name, value in limits._asdict().items():
        default = Limits._field_defaults[name]
        if isinstance(value, bool) or not isinstance(value, (int, type(default))):
            raise TypeError(f"the limit {name} is a {type(value).__name__}; accepted: {type(default).__name__}")
        least = {"waiting": 0, "frames": 2, "aspect": 1}.get(name, 1 if isinstance(default, int) else 0)
        if not least <= value < math.inf or (least == 0 and not value and name != "waiting"):
            accepted = f"{least} or more" if least or name == "waiting" else "more than 0"
            raise ValueError(f"the limit {name} is {value}; accepted: {accepted}, and finite")


def refusal(status: int, sentence: str, retry_after: float | None = None) -> HTTPException:
    """The answer to a request that is refused; retry_after: seconds, from 1 to 10 minutes, for a busy service."""
    if retry_after is None:
        return HTTPException(status, sentence)
    seconds = max(1, min(math.ceil(retry_after), _LONGEST_RETRY))
    return HTTPException(status, sentence, {"Retry-After": str(seconds)})


class Line:
    """The queue before a number of places, first come first served, and how long a request holds a place.

    For one event loop; nothing here waits but `Place.__aenter__`.
    """

    def __init__(self, working: int, waiting: int) -> None:
        self.places, self._most = working, waiting
        self.working = 0
        self.seconds = 1.0  # that a request has lately held its place
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def retry_after(self) -> float:
        """Seconds until one more request would find a place, by those that wait and the time that each takes."""
        return (len(self._waiting) + 1) * self.seconds / self.places

    def join(self) -> Place:
        """A place now or in a while; 503 where as many wait as may."""
        if self.working < self.places:
            self.working += 1
            return Place(self, None)
        if len(self._waiting) >= self._most:
            sentence = f"the service is busy: {len(self._waiting)} videos wait already; try again later"
            raise refusal(503, sentence, self.retry_after)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        return Place(self, turn)

    def withdraw(self, turn: asyncio.Future[None]) -> None:
        """Who waited has gone; whose turn it was leaves that to the next one."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        else:
            self.leave()

    def leave(self) -> None:
        """A place is free."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self.working -= 1


class Place:
    """A request's place, from `Line.join` on; its block runs when it is the request's turn.

    ahead: how many are before it. Nothing may be awaited between the joining and the block.
    """

    def __init__(self, line: Line, turn: asyncio.Future[None] | None) -> None:
        self._line, self._turn = line, turn
        self.ahead = 0 if turn is None else line.waiting - 1 + line.working

    async def __aenter__(self) -> None:
        if self._turn is not None:
            try:
                await asyncio.wait({self._turn})  # which leaves the turn as it is when this request is canceled
            except asyncio.CancelledError:
                self._line.withdraw(self._turn)
                raise
        self._began = asyncio.get_running_loop().time()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # what was refused or canceled says nothing about the others
            taken = asyncio.get_running_loop().time() - self._began
            self._line.seconds += _SHARE * (taken - self._line.seconds)
        self._line.leave()
