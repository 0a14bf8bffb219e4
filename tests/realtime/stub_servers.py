"""Servers without models, for tests of what measures servers: on a virtual clock, and by a thread that sleeps."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from concurrent.futures import Future

import torch

from videopure_fast.realtime.serving import Answer, Closed, Dropped, QueueFull, Times
from videopure_fast.realtime.study import ServiceTimes, Setting

CLIP = torch.zeros(3, 4, 16, 16)
CLIPS = [CLIP]


class VirtualClock:
    """Time passes when someone waits, and only as far as the next event."""

    def __init__(self) -> None:
        self.time = 0.0
        self._events = []
        self._numbers = itertools.count()

    def now(self):
        return self.time

    def call_at(self, moment, function):
        heapq.heappush(self._events, (moment, next(self._numbers), function))

    def wait_until(self, moment):
        while self._events and self._events[0][0] <= moment:
            self.time, _, function = heapq.heappop(self._events)
            function()
        self.time = max(self.time, moment)

    def wait_for(self, futures):
        for future in futures:
            while not future.done():
                self.wait_until(self._events[0][0])


class VirtualServer:
    """Answers clips one by one, each in the same time. Its queue has no bound."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.free = clock, seconds, 0.0

    def submit(self, clip, *, deadline=None):
        now = self.clock.now()
        start = max(now, self.free)
        self.free = done = start + self.seconds
        future = Future()
        answer = Answer(clip, None, None, None, Times(now, start, start, done, done, done))
        self.clock.call_at(done, lambda: future.set_result(answer))
        return future


def service(clip_seconds, *, depth=2, curve=None):
    """Service times that end in so many seconds a clip, a tenth each for encoding and decoding.

    curve: batch size -> its seconds over those of a single clip; without it, a batch gains nothing.
    """
    curve = curve or {1: 1, 2: 2, 4: 4, 8: 8}
    ends = {size: [0.1 * clip_seconds * times] for size, times in curve.items()}
    evaluation = {size: [0.8 * clip_seconds * times / (2 * (depth + 1))] for size, times in curve.items()}
    return ServiceTimes(ends, evaluation, ends, {1: [0.0]}, depth)


class SleepingServer:
    """A thread that admits clips at every step and sleeps for as long as the models would take.

    Its times are those of a plan, to whose moments it sleeps: that the machine wakes it late adds nothing to them.
    """

    def __init__(self, service, setting=Setting()):  # noqa: B008  (immutable)
        self.service, self.setting = service, setting
        self.waiting = deque()
        self.active = []
        self.changed = threading.Condition()
        self.closed = False
        self.free = 0.0  # when the work that was begun ends
        self.thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()

    def submit(self, clip, *, deadline=None, steps=None):
        future = Future()
        work = [future, clip, self.service.evaluations(steps), [time.monotonic()]]
        with self.changed:
            if len(self.waiting) >= self.setting.queue_size:
                if self.setting.policy == "reject":
                    raise QueueFull("the queue is full")
                if self.setting.policy == "drop-oldest":
                    self.waiting.popleft()[0].set_exception(Dropped("a newer clip came"))
                self.changed.wait_for(lambda: self.closed or len(self.waiting) < self.setting.queue_size)
            if self.closed:
                raise Closed("the server is closed")
            self.waiting.append(work)
            self.changed.notify_all()
        return future

    def _serve(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.active)
                if self.closed and not self.waiting and not self.active:
                    return
                if not self.active:
                    self.free = max(self.free, self.waiting[0][3][0])
                joined = self._admit()
            if joined:
                self._spend("encode", joined)
            self.active += joined
            self._spend("evaluation", self.active, passed=False)
            for work in self.active:
                work[2] -= 1
            ended = [work for work in self.active if not work[2]]
            self.active = [work for work in self.active if work[2]]
            if ended:
                for work in ended:
                    work[3].append(self.free)
                self._spend("decode", ended)
                self._spend("label", ended)
            for future, clip, _, moments in ended:
                if not future.cancelled():
                    future.set_result(Answer(clip, None, None, None, Times(*moments)))

    def _admit(self):
        """Clips that have come by now, of the shape in flight, or where none is, of the first in the queue."""
        joined = []
        while self.waiting and len(self.active) + len(joined) < self.setting.max_batch:
            together = self.active + joined
            work = self.waiting[0]
            if work[3][0] > self.free or (together and together[0][1].shape != work[1].shape):
                break
            self.waiting.popleft()
            work[3].append(self.free)
            joined.append(work)
        self.changed.notify_all()
        return joined

    def _spend(self, stage, works, *, passed=True):
        self.free += self.service.seconds(stage, len(works))
        time.sleep(max(0.0, self.free - time.monotonic()))
        for work in works if passed else ():
            work[3].append(self.free)
