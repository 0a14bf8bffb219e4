"""The clips of a camera through a server: what came, what was decided, and a record of both."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..files import check_writable
from .cameras import TIMEOUT, Camera, CameraStatus
from .live import LiveOutput, PurifiedFrames, TimedFrame
from .ring import CameraClip
from .serving import Answer, ClipServer, Closed, DeadlineMissed, Dropped, QueueFull

_LOOK = 0.2  # seconds between two looks at a camera that gives no clips

Outcome = Literal["purified", "dropped", "rejected", "late", "closed", "failed"]
_OUTCOMES: list[tuple[type[Exception], Outcome]] = [
    (Dropped, "dropped"),
    (QueueFull, "rejected"),
    (DeadlineMissed, "late"),
    (Closed, "closed"),
]


class WatchStatus(NamedTuple):
    """What a watcher has seen and decided so far.

    camera: of its frames. clips: how many had each outcome. label: of the newest clip that was answered; None where
    there is no classifier, and while the camera is away. latency: seconds from when
    that clip's last frame came to its answer. queue_age: seconds since the last frame of the oldest clip came that is
    not answered yet. shown: frames given to the output, if there is one. problem: of the camera, the newest clip or the
    output.
    """

    camera: CameraStatus
    clips: dict[Outcome, int]
    label: str | None
    latency: float | None
    queue_age: float | None
    shown: int
    problem: str | None


class Record:
    """Lines of JSON at the end of a file, each written whole and at once, from any thread.

    Raises ValueError for a path that cannot be written. What fails later, as on a full disk, ends the record; `failure`
    says so.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_writable(path)
        self.failure: str | None = None
        self._path, self._lock = Path(path), threading.Lock()

    def __enter__(self) -> Record:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if os.fstat(self._file).st_size:
            os.lseek(self._file, -1, os.SEEK_END)
            if os.read(self._file, 1) != b"\n":  # the last line of a program that was killed
                self._append(b"\n")
        self._open = True
        return self

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._open = False
            os.close(self._file)

    def write(self, event: str, **fields: Any) -> None:
        """Append a line with the event, the time of day in seconds since 1970, and fields."""
        line = (json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n").encode()
        with self._lock:
            if self.failure is None and self._open:
                self._append(line)

    def _append(self, line: bytes) -> None:
        """Write all of a line, or nothing and why."""
        length = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) == len(line):
                return
            self.failure = "it took a part of a line"
        except OSError as error:
            self.failure = error.strerror
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, length)


class Watcher:
    """A thread that gives the clips of a camera to a server, in the order in which they come, and takes the answers.

    Args:
        camera: entered before.
        server: whose clock is time.monotonic, as the camera's.
        number: which camera it is, in the record.
        window, hop: the camera's.
        deadline: seconds from when a clip's last frame came to its answer.
        output: gets the purified frames.
        record: gets a line for each clip.
        classes: names of the labels.
        prepare: called with the shape (3, F, H, W) of the first clip, and whenever it changes, before it is submitted;
            as `StreamPurifier.warmup`. What comes meanwhile is dropped and counted, as ever.

    A server that was closed before the camera was stopped is a failure, and ends the watcher.
    """

    def __init__(
        self,
        camera: Camera,
        server: ClipServer,
        *,
        number: int = 1,
        window: int,
        hop: int,
        deadline: float | None = None,
        output: LiveOutput | None = None,
        record: Record | None = None,
        classes: Sequence[str] | None = None,
        prepare: Callable[[tuple[int, ...]], None] = lambda shape: None,
    ) -> None:
        self.camera, self._server, self._number, self._deadline = camera, server, number, deadline
        self._output, self._record, self._classes, self._prepare = output, record, classes, prepare
        self._frames = PurifiedFrames(window, hop)
        self._pending: deque[tuple[CameraClip, Future[Answer]]] = deque()
        self._clips: Counter[Outcome] = Counter()
        self._answer: tuple[str | None, float] | None = None  # label and latency
        self.failure: str | None = None  # why it ended before its camera did
        self._problem: str | None = None  # of the newest clip
        self._shown = 0
        self._segment = 0  # of the newest clip
        self._shape: tuple[int, ...] = ()  # of the newest clip
        self._thread = threading.Thread(target=self._run, name=f"watcher {camera.name}", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop the camera, and wait until every clip is answered or refused."""
        self.camera.stop()
        self._thread.join()

    @property
    def running(self) -> bool:
        """Whether more clips may come, or answers."""
        return self._thread.is_alive()

    @property
    def status(self) -> WatchStatus:
        """What is shown of it; from any thread."""
        camera = self.camera.status
        label, latency = self._answer or (None, None)
        oldest = next(iter(tuple(self._pending)), None)
        failing = self._output is not None and self._output.failure and f"{self._output.name}: {self._output.failure}"
        return WatchStatus(
            camera,
            dict(self._clips),
            label if camera.state in ("live", "ended") else None,
            latency,
            None if oldest is None else time.monotonic() - oldest[0].times[-1],
            self._shown,
            self.failure or camera.reason or self._problem or failing or None,
        )

    def _run(self) -> None:
        ring = self.camera.ring
        try:
            while self._pending or not ring.exhausted:
                clip = ring.take(_LOOK)
                if clip is not None:
                    self._submit(clip)
                while self._pending and self._pending[0][1].done():
                    self._settle(*self._pending.popleft())
                if not self._pending and ring.segment > self._segment:
                    self._show(self._frames.flush())  # the camera went away: no clip follows that has these frames
            self._show(self._frames.flush())
        except Exception as error:  # what nobody foresaw ends this watcher, in the open, and no other
            self._problem = self.failure = f"{type(error).__name__}: {error}"
            self.camera.stop()
        self._write("end", **self.camera.status._asdict(), clips=dict(self._clips), shown=self._shown)

    def _submit(self, clip: CameraClip) -> None:
        self._segment, shape = clip.segment, tuple(clip.frames.shape)
        try:
            if shape != self._shape:
                self._shape = shape
                self._prepare(shape)
            left = None if self._deadline is None else clip.times[-1] + self._deadline - time.monotonic()
            if left is not None and left <= 0:
                raise DeadlineMissed("its deadline was over before it could be given to the server")
            future = self._server.submit(clip.frames.float() / 255, deadline=left)
        except Exception as error:  # what one clip raises is its outcome, here as in a future
            future = Future()
            future.set_exception(error.with_traceback(None))  # whose frames would keep the clip in memory
            if isinstance(error, Closed) and not self.camera.stopped:
                self.failure = str(error)
                self.camera.stop()
        # Its frames are the server's: however long older clips take, those that were dropped meanwhile hold none.
        self._pending.append((clip._replace(frames=clip.frames.new_empty(0)), future))
        future.add_done_callback(lambda _: self.camera.ring.wake())

    def _settle(self, clip: CameraClip, future: Future[Answer]) -> None:
        """Count, show and record how a clip ended."""
        purified, outcome, fields = None, _outcome(future), dict[str, Any]()
        if outcome == "purified":
            answer = future.result()
            purified, label = answer.clip, answer.label
            latency = answer.times.done - clip.times[-1]
            name = None if label is None else self._label_name(label)
            self._answer, self._problem = (name, latency), None
            waited = answer.times.started - answer.times.submitted
            fields = {"label": label, "class": name, "latency": round(latency, 4), "waited": round(waited, 4)}
        elif outcome == "failed":
            error = future.exception()
            self._problem = fields["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._clips[outcome] += 1
        day = time.time() - time.monotonic()
        fields["came"] = [round(clip.times[0] + day, 3), round(clip.times[-1] + day, 3)]
        dropped = self.camera.status.dropped
        self._write("clip", first=clip.first, frames=len(clip.times), outcome=outcome, dropped=dropped, **fields)
        if self._output is not None:
            self._show(self._frames.add(clip, purified))

    def _label_name(self, label: int) -> str:
        return self._classes[label] if self._classes is not None and label < len(self._classes) else str(label)

    def _show(self, frames: list[TimedFrame]) -> None:
        if self._output is not None:
            self._output.write(frames)
            self._shown += len(frames)

    def _write(self, event: str, **fields: Any) -> None:
        if self._record is not None:
            self._record.write(event, camera=self._number, **fields)


def _outcome(future: Future[Answer]) -> Outcome:
    if future.cancelled():
        return "closed"
    error = future.exception()
    if error is None:
        return "purified"
    return next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), "failed")


@contextlib.contextmanager
def watching(
    sources: Sequence[str],
    server: ClipServer,
    *,
    window: int,
    hop: int,
    size: int,
    lossless: bool = False,
    timeout: float = TIMEOUT,
    deadline: float | None = None,
    outputs: Sequence[LiveOutput | None] | None = None,
    record: Record | None = None,
    classes: Sequence[str] | None = None,
    prepare: Callable[[tuple[int, ...]], None] = lambda shape: None,
) -> Iterator[list[Watcher]]:
    """Watchers of the sources, one for each, at work until they end or this context manager's block does.

    Arguments are those of `Camera` and `Watcher`; outputs, one for each source, are entered here. When the block ends
    cameras are stopped, clips at the server waited for, and outputs completed.
    """
    with contextlib.ExitStack() as stack:
        watchers = []
        for number, source in enumerate(sources, 1):
            output = None if outputs is None else outputs[number - 1]
            camera = Camera(
                source,
                window=window,
                hop=hop,
                size=size,
                lossless=lossless,
                timeout=timeout,
                notify=lambda state, reason, number=number: (  # type: ignore[misc]
                    None if record is None else record.write("camera", camera=number, state=state, reason=reason)
                ),
            )
            watcher = Watcher(
                camera,
                server,
                number=number,
                window=window,
                hop=hop,
                deadline=deadline,
                output=output,
                record=record,
                classes=classes,
                prepare=prepare,
            )
            if output is not None:
                stack.enter_context(output)
            stack.enter_context(camera)
            watchers.append(stack.enter_context(watcher))
        yield watchers
        for watcher in watchers:
            watcher.camera.stop()  # all at once: one by one their timeouts would add up
