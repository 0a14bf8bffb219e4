"""A service to test: its server in a thread, a stream of clips without models, and clients that are not polite."""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future

import httpx
import torch

from videopure_fast.realtime.serving import Answer, Closed, DeadlineMissed, Times
from videopure_fast.realtime.stream import Counts
from videopure_fast.service.server import Server, address_of, listen
from videopure_fast.service.workers import Decoded

BOUNDARY = "limit"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
LABELS = 3  # of the votes of a clip: 0, 1, 1 and so on


class Step:
    """As `serving.Progress`."""

    def __init__(self, stage, done, total, label=None):
        self.stage, self.done, self.total, self.label = stage, done, total, label


class StubStream:
    """In place of a StreamPurifier: its purified clip is 1 - clip. Its votes are 0, 1, 1 where there is a classifier.

    seconds: that each clip takes.
    """

    seconds = 0.0
    warmup_seconds = 0.0

    def __init__(self, purifier, classifier, *, max_batch, queue_size, policy, early_stop):
        assert policy == "reject" and not early_stop and max_batch == 1
        self.votes = classifier is not None
        self.queue_size = queue_size
        self.outcomes, self.shapes, self.asked = Counter(), [], []
        self._waiting, self._changed, self._closed = [], threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def warmup(self, shape):
        time.sleep(self.warmup_seconds)

    @property
    def counts(self):
        with self._changed:
            known = {name: self.outcomes[name] for name in Counts._fields}
            return Counts(**known | {"waiting": len(self._waiting)})

    def submit(self, clip, *, deadline=None, steps=None, progress=None):
        future = Future()
        with self._changed:
            if self._closed:
                raise Closed("closed")
            self._waiting = [one for one in self._waiting if not one[1].cancelled()]
            assert len(self._waiting) < self.queue_size
            self.shapes.append(tuple(clip.shape))
            self.asked.append(steps)
            self._waiting.append((clip, future, deadline, progress, time.monotonic()))
            self._changed.notify_all()
        return future

    async def answer(self, clip, **options):
        return await asyncio.wrap_future(self.submit(clip, **options))

    def close(self, cancel=False):
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(5)

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    for _, future, *_ in self._waiting:
                        if future.set_running_or_notify_cancel():
                            future.set_exception(Closed("closed"))
                    return
                clip, future, deadline, progress, submitted = self._waiting.pop(0)
            self._compute(clip, future, deadline, progress, submitted)

    def _compute(self, clip, future, deadline, progress, submitted):
        started = time.monotonic()
        while (left := started + self.seconds - time.monotonic()) > 0:
            time.sleep(min(left, 0.02))
            late = deadline is not None and time.monotonic() - submitted > deadline
            if future.cancelled() or self._closed or late:
                outcome = DeadlineMissed("late") if late else Closed("closed")
                self.outcomes["missed" if late else "canceled"] += 1
                if future.set_running_or_notify_cancel():
                    future.set_exception(outcome)
                return
        votes = [0, 1, 1][:LABELS] if self.votes else [None]
        steps = [Step("encode", 1, 1), Step("evaluate", 1, 2), Step("evaluate", 2, 2)]
        steps += [Step("decode", i, len(votes), vote) for i, vote in enumerate(votes, 1)]
        for step in steps:
            progress and progress(step)
        done = time.monotonic()
        logits = torch.eye(4)[votes] if self.votes else None
        self.outcomes["answered"] += 1
        if future.set_running_or_notify_cancel():
            times = Times(submitted, started, done, done, done, done)
            future.set_result(Answer(1 - clip, None, logits, 1 if self.votes else None, times))


class StubCodecs:
    """In place of the processes that decode: any upload is 20 gray frames, and any mp4 the same bytes."""

    def __init__(self, count):
        self.fit = True

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    @contextlib.asynccontextmanager
    async def lend(self):
        yield self

    async def decode(self, folder, *, size, limits):
        return Decoded(torch.full((20, 3, size, size), 99, dtype=torch.uint8), 25.0)

    async def encode(self, folder, purified, *, before):
        return [b"an mp4"] * (1 + before)


class Running:
    """A service at an address."""

    def __init__(self, app, server, address, thread):
        self.app, self.engine, self.server, self.address, self.thread = app, app.state.engine, server, address, thread
        self.port = int(address.rpartition(":")[2])

    @property
    def kept(self):
        """What is in the folder of uploads, but for its lock."""
        return sorted(set(os.listdir(self.engine.uploads.path)) - {"lock"})

    def purify(self, content, *, name="clip.mkv", headers=None, timeout=60, **fields):
        files = {"video": (name, content, "application/octet-stream")}
        return httpx.post(f"{self.address}/v1/purify", files=files, data=fields, headers=headers, timeout=timeout)

    def get(self, path, **options):
        return httpx.get(f"{self.address}{path}", timeout=60, **options)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def running(app, *, ready=True):
    """The application at a free port, served by a thread, until the block ends."""
    listener = listen("127.0.0.1", 0)
    server = Server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    service = Running(app, server, address_of(listener), thread)
    try:
        until(lambda: server.started, 20)
        if ready:
            until(lambda: service.get("/readyz").status_code == 200, 60)
        yield service
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def until(condition, seconds=30.0):
    """Wait for a condition; fail where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def form(*parts, end=True):
    """A form of parts (head, content)."""
    lines = b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (BOUNDARY.encode(), head, content) for head, content in parts)
    return lines + (b"--%b--\r\n" % BOUNDARY.encode() if end else b"")


def video_part(content, name=b"clip.mkv"):
    return b'Content-Disposition: form-data; name="video"; filename="%b"' % name, content


def field_part(name, value):
    return b'Content-Disposition: form-data; name="%b"' % name, value


def head(
    length, *, path="/v1/purify", method="POST", kind=f"multipart/form-data; boundary={BOUNDARY}", host="127.0.0.1"
):
    """The lines before a body; length: of the body, or a header in its place."""
    stated = length if isinstance(length, str) else f"Content-Length: {length}"
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *([f"Content-Type: {kind}"] if kind else []), stated]
    return "\r\n".join([*lines, "", ""]).encode()


def answer(connection, seconds=20.0):
    """(status, sentence or content) of what comes; (None, "") where the connection is cut without an answer."""
    connection.settimeout(seconds)
    content = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in content:
            if not (piece := connection.recv(65536)):
                return None, ""
            content += piece
        lines, _, body = content.partition(b"\r\n\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines.split(b"\r\n")[1:])
        length = int(headers.get(b"content-length", 0))
        while len(body) < length and (piece := connection.recv(65536)):
            body += piece
        status = int(lines.split()[1])
        return status, json.loads(body)["detail"] if status >= 400 else body
    return None, ""


def all_of(connection, seconds=20.0):
    """Everything that comes until the other side ends the connection."""
    connection.settimeout(seconds)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def is_cut(connection, seconds=10.0):
    """Whether the other side ends the connection in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True
