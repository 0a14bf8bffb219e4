"""Purified clips as a live video: overlaps blended, each frame once and at its time, to a file or an rtsp:// address.

A frame that was not purified is never written. Where clips were dropped, refused or failed, nothing is: players show
the last purified frame until the next one.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.video import resized
from ..data.video_writer import color_of, encoder_frame
from ..files import check_writable
from ..windows import CrossFade
from .cameras import TIMEOUT, check_address, is_address, masked, source_name
from .ring import CameraClip

if TYPE_CHECKING:
    from av.container import OutputContainer

_RETRY = 2.0  # seconds before an address that failed is tried again
_CHUNKS = 8  # pieces of at most a window of frames that wait for the encoder
_PATIENCE = 5.0  # seconds to wait for the encoder of a file, and for each step of an output's end
_LONGEST_REASON = 200  # characters of what the process that sends says
_TICKS = 1000  # a second; of the times of frames
# Files are whole at any moment: an mp4 is written in fragments. Each second or so begins with a key frame.
_CONTAINERS = {
    ".mp4": ("mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    ".mkv": ("matroska", {}),
    ".ts": ("mpegts", {}),
}
_ENCODER = {"crf": "17", "preset": "veryfast", "tune": "zerolatency", "g": "25"}


class TimedFrame(NamedTuple):
    """A frame (3, H, W) uint8 and when it came, in seconds of the camera's clock."""

    frame: Tensor
    came: float


class PurifiedFrames:
    """Frames out of the purified clips of one camera, whose overlaps are cross-faded.

    window, hop: those of the camera. A frame is released when the last clip that it can be in has been answered. Since
    clips end at the newest frame, that is `window - 1` frames after it came, and the time of that clip's answer, at
    most; where the camera goes away, when that is known.
    """

    def __init__(self, window: int, hop: int) -> None:
        self._overlap, self._hop = window - hop, hop
        self._fade = CrossFade(self._overlap)
        self._start = 0  # number of the first frame that is held; those before it are done with
        self._times: deque[float] = deque()  # when the held frames came
        self._segment = 0

    def add(self, clip: CameraClip, purified: Tensor | None) -> list[TimedFrame]:
        """The frames that are final after this clip, which follows those before it. None: it was not purified.

        purified: (3, F, H, W), floats in [0, 1].
        """
        finished: list[TimedFrame] = []
        if clip.segment != self._segment:
            finished += self.flush()
            self._segment = clip.segment
        if purified is not None:
            finished += self._release(clip.first - self._start)
            if not self._times:
                self._start = max(self._start, clip.first)
            # The last clip of a segment is aligned to its end, and may begin with frames that are done with.
            self._fade.add(purified.float().cpu(), self._start - clip.first)
            self._times.extend(clip.times[self._start + len(self._times) - clip.first :])
        return finished + self._release(clip.first + self._hop - self._start)

    def flush(self) -> list[TimedFrame]:
        """The frames that are held: no clip follows that has them."""
        finished = self._release(len(self._times))
        self._fade = CrossFade(self._overlap)
        return finished

    def _release(self, count: int) -> list[TimedFrame]:
        count = min(count, len(self._times))
        if count <= 0:
            return []
        self._start += count
        pixels = (self._fade.release(count) * 255).round().clamp(0, 255).to(torch.uint8)
        return [TimedFrame(frame, self._times.popleft()) for frame in pixels.unbind(1)]


class LiveOutput:
    """Frames to a file or an address, encoded as H.264 by a thread while this context manager's block runs.

    target: a new file (.mp4, .mkv or .ts), which can be played while it is written; or an rtsp:// address of a server
        that takes streams, which is tried again when it fails. Frames have the size of the first one; others are fitted
        into it.

    Frames that the encoder or the server is too slow for are dropped and counted.

    Raises ValueError for a target that cannot be written, or that exists.
    """

    def __init__(self, target: str) -> None:
        self.name = source_name(target)
        self.written = self.dropped = 0
        self.failure: str | None = None  # why frames are dropped
        self._target, self._address = target, is_address(target)
        if self._address and not target.lower().startswith("rtsp://"):
            raise ValueError(f"cannot write to {self.name}: accepted are {', '.join(_CONTAINERS)} files and rtsp://")
        if self._address:
            check_address(target)
        else:
            try:
                _check_file(Path(target))
            except ValueError as error:
                raise ValueError(masked(str(error), target)) from None
        self._queue: queue.Queue[list[TimedFrame] | None] = queue.Queue(_CHUNKS)
        self._container: OutputContainer | None = None
        self._sender: subprocess.Popen[bytes] | None = None  # of an address
        self._given = 0  # frames to the container
        self._retry = 0.0  # when a failed address may be tried again
        self._origin: float | None = None  # when the frame came that is shown at time 0
        self._thread = threading.Thread(target=self._run, name=f"output {self.name}", daemon=True)

    def __enter__(self) -> LiveOutput:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Write what waits, and end the file or the stream; within some seconds, whatever a server does."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_PATIENCE)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive() and self._sender is not None:
            self._sender.kill()

    def write(self, frames: list[TimedFrame]) -> None:
        """Append frames, in the order of their times."""
        if not frames:
            return
        try:
            self._queue.put(frames, block=not self._address, timeout=_PATIENCE)
        except queue.Full:
            self.dropped += len(frames)

    def _run(self) -> None:
        while (frames := self._queue.get()) is not None:
            if self.failure is not None and (not self._address or time.monotonic() < self._retry):
                self.dropped += len(frames)
                continue
            left = deque(frames)
            self._guarded(partial(self._encode, left))
            self.dropped += len(left)
        self._guarded(self._finish)

    def _guarded(self, act: Callable[[], None]) -> None:
        """Act, and note what fails without the address, which may have a password."""
        import av

        try:
            act()
        except Exception as error:
            known = error.strerror if isinstance(error, (av.FFmpegError, OSError)) else str(error)
            self.failure = self._end_sender() or (known or type(error).__name__).replace(self._target, self.name)
        else:
            return
        self._retry = time.monotonic() + _RETRY
        with contextlib.suppress(Exception):  # closing a container may fail once more
            if self._container is not None:
                self._container.close()
        self._container = None

    def _end_sender(self) -> str | None:
        """End the input of the process that sends, and wait for it; what went wrong there. What it did not send was
        dropped."""
        if self._sender is None:
            return None
        sender, self._sender = self._sender, None
        try:
            _, said = sender.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            sender.kill()
            _, said = sender.communicate()
        sent, _, reason = said.decode(errors="replace").strip().rpartition("\n")[2].partition(" ")
        lost = self._given - int(sent) if sent.isdecimal() else self._given
        self.written -= lost
        self.dropped += lost
        return reason[:_LONGEST_REASON] or (None if sent.isdecimal() else "the process that sends was ended")

    def _open(self, frame: Tensor) -> OutputContainer:
        import av

        if self._address:
            command = [sys.executable, "-m", "videopure_fast.realtime.publish", str(TIMEOUT)]
            self._sender = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
            assert self._sender.stdin is not None
            self._sender.stdin.write(f"{self._target}\n".encode())
            container = av.open(self._sender.stdin, "w", format="mpegts", options={"flush_packets": "1"})
        else:
            kind, options = _CONTAINERS[Path(self._target).suffix.lower()]
            options = {**options, "flush_packets": "1"}
            container = av.open(f"file:{self._target}", "w", format=kind, options=options)
        self._stream = container.add_stream("libx264", rate=25, options=dict(_ENCODER))
        self._stream.height, self._stream.width = frame.shape[1:]
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        self._color = color_of(frame.shape[1])
        self._color.tag(self._stream.codec_context)
        self._last, self._given = -1, 0
        return container

    def _encode(self, left: deque[TimedFrame]) -> None:
        """Write frames, each of which then leaves the queue."""
        if self._sender is not None and self._sender.poll() is not None:
            raise BrokenPipeError(errno.EPIPE, "the server went away")
        if self._container is None:
            self._container = self._open(left[0].frame)
        while left:
            frame, came = left[0]
            if self._origin is None:
                self._origin = came
            fitted = _fitted(frame, self._stream.height, self._stream.width)
            picture = encoder_frame(fitted, "yuv420p", self._color)
            self._last = max(self._last + 1, round((came - self._origin) * _TICKS))
            picture.pts, picture.time_base = self._last, Fraction(1, _TICKS)
            self._container.mux(self._stream.encode(picture))
            left.popleft()
            self.written += 1
            self._given += 1
        self.failure = None

    def _finish(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
        if reason := self._end_sender():
            raise OSError(0, reason)


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in _CONTAINERS:
        raise ValueError(f"cannot write {path}: accepted are {', '.join(_CONTAINERS)} files and rtsp:// addresses")
    check_writable(path)
    if path.exists():
        raise ValueError(f"{path} exists, and a live output replaces nothing: give another name, or remove it")


def _fitted(frame: Tensor, height: int, width: int) -> Tensor:
    """A frame (3, H, W) as large as it fits, in the middle of a black one of another size."""
    if frame.shape[1:] == (height, width):
        return frame
    scale = min(height / frame.shape[1], width / frame.shape[2])
    inner = resized(frame, (max(1, int(frame.shape[1] * scale)), max(1, int(frame.shape[2] * scale))))
    above, left = (height - inner.shape[1]) // 2, (width - inner.shape[2]) // 2
    return F.pad(inner, (left, width - left - inner.shape[2], above, height - above - inner.shape[1]))
