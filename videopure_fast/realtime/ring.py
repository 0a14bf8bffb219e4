"""The newest frames of a camera, and the clips that they make."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import check_count


class CameraClip(NamedTuple):
    """The newest frames of a camera.

    frames: (3, F, H, W) uint8. first: number of the first one, counted from the camera's start. times: when each came,
    in seconds of the camera's clock. segment: counts on when the camera is opened anew or changes its picture; no clip
    has frames of two segments.
    """

    frames: Tensor
    first: int
    times: tuple[float, ...]
    segment: int


class Ring:
    """The newest frames of one camera, written by its reader and taken as clips by another thread.

    window: frames of a clip. hop: new frames after which there is one; of more new frames, those that no longer fit
    into a window are dropped and counted. lossless: the writer waits instead until a clip is taken.
    """

    def __init__(self, window: int, hop: int, *, lossless: bool = False) -> None:
        check_count("window", window, least=2)
        check_count("hop", hop, most=window)
        self.frames = self.dropped = self.segment = 0
        self._window, self._hop, self._lossless = window, hop, lossless
        self._held: deque[tuple[Tensor, float]] = deque(maxlen=window)
        self._new = 0  # held frames that were in no clip
        self._ended = False  # whether the held frames are the last of their segment
        self._closed = self._woken = False
        self.waiting = False  # whether the writer waits for a clip to be taken
        self._changed = threading.Condition()

    def push(self, frame: Tensor, came: float) -> None:
        """Add a frame (3, H, W) uint8 that came at a time. Frames of a segment have one size."""
        with self._changed:
            self._wait_until_taken()
            if self._ended:
                self._forget()
            if self._new == self._window:
                self.dropped += 1  # the oldest is in no clip, and leaves
            self._held.append((frame, came))
            self._new = min(self._new + 1, self._window)
            self.frames += 1
            self._changed.notify_all()

    def end(self, *, short: bool = False) -> None:
        """The segment ends: new frames that are fewer than a hop end a last clip, aligned to the end.

        short: also where all frames are fewer than a window, but two or more; else these are dropped.
        """
        with self._changed:
            self._wait_until_taken()
            if not self._held or self._ended:
                return
            self.segment += 1
            self._ended = self._new > 0 and (len(self._held) == self._window or (short and len(self._held) > 1))
            if not self._ended:
                self._forget()
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more comes, and nobody waits any more; a clip that is ready can still be taken."""
        with self._changed:
            self._closed = self._woken = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Let `take` return at once."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def take(self, timeout: float) -> CameraClip | None:
        """The newest clip that was not taken yet; None if there is none within a time, or after `wake` or `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready() or self._woken, timeout)
            self._woken = False
            if not self._ready():
                return None
            frames, times = zip(*self._held, strict=True)
            first, segment = self.frames - len(times), self.segment - self._ended
            self._new = 0
            if self._ended:
                self._forget()
            self._changed.notify_all()
        return CameraClip(torch.stack(frames, 1), first, times, segment)

    @property
    def exhausted(self) -> bool:
        """Whether it is closed and its last clip was taken."""
        with self._changed:
            return self._closed and not self._ready()

    def _wait_until_taken(self) -> None:
        if self._lossless:
            self.waiting = True
            self._changed.wait_for(lambda: self._closed or not self._ready())
            self.waiting = False

    def _ready(self) -> bool:
        return self._ended or (self._new >= self._hop and len(self._held) == self._window)

    def _forget(self) -> None:
        self.dropped += self._new
        self._held.clear()
        self._new, self._ended = 0, False
