"""Live sources: purified frames of the service's own cameras as JPEG pictures, shared among those who look.

A source is opened for the first viewer, and closed a while after the last one has left. A viewer that is slower than
the source misses frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..realtime.cameras import check_source
from ..realtime.serving import Answer, ClipServer, QueueFull
from ..realtime.watcher import watching

if TYPE_CHECKING:
    from torch import Tensor

    from ..realtime.live import TimedFrame

CLIPS_WAITING = 2  # of a source, at the server at most: older ones are stale
_LINGER = 10.0  # seconds for which a source that nobody looks at stays open
_QUALITY = 85  # of JPEG
_HELD = 256  # frames that wait for their time at most
_LONGEST_STEP = 2.0  # seconds between two frames that are waited for
_LOOK = 0.5  # seconds between two looks at whether a source has ended
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_sources(sources: Mapping[str, str | Frames]) -> None:
    """ValueError for a name that no address can have, and for what is no source."""
    for name, source in sources.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"a source is named {name!r}; accepted: 1 to 64 letters, digits, '_', '.' and '-'")
        if isinstance(source, str):
            check_source(source)


class Frames:
    """The newest frame of a source, for as many viewers as there are.

    produce: makes an iterator over frames, which is run while somebody looks.
    """

    def __init__(self, produce: Callable[[], AsyncIterator[bytes]]) -> None:
        self._produce = produce
        self._viewers = 0
        self._frame, self._number = b"", 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._closer: asyncio.TimerHandle | None = None

    async def view(self) -> AsyncIterator[bytes]:
        """Frames from now on, until the source ends; those that came while a viewer was busy are left out."""
        self._viewers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)
        task, seen = self._task, self._number
        try:
            while True:
                while self._number == seen:
                    if task.done():
                        if not task.cancelled():
                            task.result()  # raises what ended it
                        return
                    await self._changed.wait()
                seen = self._number
                yield self._frame
        finally:
            self._viewers -= 1
            self._close_later()

    async def close(self) -> None:
        """End what runs."""
        self._end()
        if self._closer is not None:
            self._closer.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _close_later(self) -> None:
        if self._closer is not None:
            self._closer.cancel()
        self._closer = asyncio.get_running_loop().call_later(_LINGER, self._close_unseen)

    def _close_unseen(self) -> None:
        if not self._viewers:
            self._end()

    def _end(self) -> None:
        """Ending may take seconds; whoever comes meanwhile begins anew."""
        if self._task is not None:
            self._ending.add(self._task)
            self._task.cancel()
            self._task = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled():
            task.exception()  # which is the viewers' to raise; there may be none
        self._wake()

    async def _run(self) -> None:
        async with contextlib.aclosing(self._produce()) as frames:  # type: ignore[type-var]
            async for frame in frames:
                self._frame, self._number = frame, self._number + 1
                self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def source_frames(
    source: str,
    server: ClipServer,
    *,
    window: int,
    overlap: int,
    size: int,
    prepare: Callable[[tuple[int, ...]], None] | None = None,
) -> Frames:
    """The purified frames of a file, an address or a device; `prepare` as for a `Watcher`."""
    settings: dict[str, Any] = {"window": window, "hop": max(1, window - overlap), "size": size}
    if prepare is not None:
        settings["prepare"] = cache(prepare)
    return Frames(partial(_camera_frames, source, _AtMost(server, CLIPS_WAITING), settings))


async def _camera_frames(source: str, server: ClipServer, settings: Mapping[str, Any]) -> AsyncIterator[bytes]:
    output = _Pictures(asyncio.get_running_loop())
    stack = contextlib.ExitStack()
    (watcher,) = stack.enter_context(watching([source], server, outputs=[output], **settings))  # type: ignore[list-item]
    try:
        async for picture in output.played(lambda: watcher.running):
            yield picture
        if (reason := watcher.failure or watcher.camera.status.reason) is not None:
            raise OSError(reason)
    finally:
        watcher.camera.stop()
        await asyncio.to_thread(stack.close)  # which waits for threads


class _AtMost:
    """A server of clips, in which so many of one source's are at most: a source that is too much harms itself alone."""

    def __init__(self, server: ClipServer, most: int) -> None:
        self._server, self._most = server, most
        self._pending: set[Future[Answer]] = set()

    def submit(self, clip: Tensor, *, deadline: float | None = None) -> Future[Answer]:
        if len(self._pending) >= self._most:
            raise QueueFull(f"{self._most} clips of the source wait already")
        future = self._server.submit(clip, deadline=deadline)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future


class _Picture(NamedTuple):
    jpeg: bytes
    came: float


class _Pictures:
    """Where a watcher puts purified frames, as into a `LiveOutput`; an event loop plays them at the pace they came."""

    name, failure = "the viewers", None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[_Picture] = deque(maxlen=_HELD)
        self._came = asyncio.Event()

    def __enter__(self) -> _Pictures:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def write(self, frames: list[TimedFrame]) -> None:
        """Called by the watcher's thread."""
        pictures = [_Picture(_jpeg(frame.frame), frame.came) for frame in frames]
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._add, pictures)

    def _add(self, pictures: list[_Picture]) -> None:
        self._waiting.extend(pictures)
        self._came.set()

    async def played(self, running: Callable[[], bool]) -> AsyncIterator[bytes]:
        """The pictures, a clip's worth of which come at once, each when it is due; until nothing more can come."""
        due, before = 0.0, None
        while True:
            while not self._waiting:
                if not running():
                    await asyncio.sleep(0)  # what was written last is on its way
                    if not self._waiting:
                        return
                self._came.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._came.wait(), _LOOK)
            picture = self._waiting.popleft()
            step = 0.0 if before is None else picture.came - before
            due = max(time.monotonic(), due + step if 0 <= step <= _LONGEST_STEP else 0.0)
            before = picture.came
            await asyncio.sleep(due - time.monotonic())
            yield picture.jpeg


def _jpeg(frame: Tensor) -> bytes:
    """A frame (3, H, W) uint8."""
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(target, "JPEG", quality=_QUALITY)
    return target.getvalue()
