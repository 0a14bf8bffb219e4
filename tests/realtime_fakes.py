"""Cameras, servers of RTSP and servers of clips that are not there, for tests."""

import contextlib
import io
import re
import socket
import threading
import time
from concurrent.futures import Future
from fractions import Fraction

import av
import numpy as np

from videopure_fast.realtime.serving import Answer, Closed, Dropped, QueueFull, Times


def gray(number):
    """The value of a frame of a fake camera, whose number is below 27."""
    return 40 + 8 * (number % 27)


def video_bytes(count=12, *, step=40, kind="mpegts", codec="libx264", height=32, width=48, start=0, noise=False):
    """A video of gray, or noisy, frames `step` milliseconds apart, each decoded as soon as it is read."""
    target, generator = io.BytesIO(), np.random.default_rng(0)
    with av.open(target, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        if codec == "libx264":
            stream.options = {"tune": "zerolatency", "g": "4", "crf": "5", "sc_threshold": "0"}
        stream.pix_fmt, stream.height, stream.width = "yuvj420p" if codec == "mjpeg" else "yuv420p", height, width
        if codec != "mjpeg":
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            picture = np.full((height, width, 3), gray(start + i), np.uint8)
            if noise:
                picture += generator.integers(0, 100, picture.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i * step, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return target.getvalue()


@contextlib.contextmanager
def datagrams(content):
    """A port of this machine to which MPEG-TS is sent again and again, as packets that nobody waits for."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    closing = threading.Event()

    def send():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not closing.is_set():
                for start in range(0, len(content), 7 * 188):
                    sender.sendto(content[start : start + 7 * 188], ("127.0.0.1", port))
                    closing.wait(0.001)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        closing.set()
        thread.join(5)


class FakeCamera:
    """A server on a port of its own. Connection i is given to `behave[i](socket)`, later ones to the last of these.

    What a client asks first is in `asked`.
    """

    def __init__(self, *behave, asks=False):
        self._behave, self._asks, self.asked = behave, asks, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.closing = threading.Event()
        self._threads = [threading.Thread(target=self._serve, daemon=True)]

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_error):
        self.closing.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(5)

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                behave = self._behave[min(len(self._threads), len(self._behave)) - 1]
                self._threads.append(threading.Thread(target=self._answer, args=(connection, behave), daemon=True))
                self._threads[-1].start()

    def _answer(self, connection, behave):
        with connection, contextlib.suppress(OSError):
            if self._asks:
                self.asked.append(connection.recv(65536).decode())
            behave(connection)

    def sends(self, content, *, pause=0.0, pieces=1):
        """Behavior: send content in pieces, each after a pause."""

        def behave(connection):
            length = -(-len(content) // pieces) or 1
            for start in range(0, len(content), length):
                if self.closing.wait(pause):
                    return
                connection.sendall(content[start : start + length])

        return behave


def sends(content, *, then=0.0):
    """Behavior of a camera: send content, and go away after a time in seconds."""

    def behave(connection):
        connection.sendall(content)
        connection.settimeout(then or 0.01)
        with contextlib.suppress(TimeoutError):
            connection.recv(1)

    return behave


class RtspRelay(FakeCamera):
    """A server of RTSP that takes one stream (ANNOUNCE, RECORD), and gives what it took to players (DESCRIBE, PLAY)."""

    def __init__(self):
        super().__init__(self._talk)
        self.sdp, self.packets, self.methods = "", [], []

    def _talk(self, connection):
        file = connection.makefile("rb")
        while not self.closing.is_set():
            head = file.read(1)
            if head == b"$":  # a packet of RTP or RTCP: channel, length, content
                rest = file.read(3)
                self.packets.append(head + rest + file.read(int.from_bytes(rest[1:], "big")))
                continue
            line = (head + file.readline()).decode()
            if not line.strip():
                return
            fields = dict(re.findall(r"(\S+): *(.*?)\r\n", "".join(iter(lambda: file.readline().decode(), "\r\n"))))
            body = file.read(int(fields.get("Content-Length", 0))).decode()
            method = line.split()[0]
            self.methods.append(method)
            self._reply(connection, method, line.split()[1], fields, body)

    def _reply(self, connection, method, url, fields, body):
        answer, content = [f"CSeq: {fields['CSeq']}", "Session: 1"], ""
        if method == "ANNOUNCE":
            self.sdp = body
        elif method == "DESCRIBE":
            content = self.sdp
            answer += ["Content-Type: application/sdp", f"Content-Base: {url}/"]
        elif method == "SETUP":
            answer.append(f"Transport: {fields['Transport']}")
        answer += [f"Content-Length: {len(content)}", "", content]
        connection.sendall("\r\n".join(["RTSP/1.0 200 OK", *answer]).encode())
        if method == "PLAY":
            connection.sendall(b"".join(self.packets))


class StubServer:
    """A server of clips, whose purified clip is 1 - clip and whose label is the number of the clip.

    seconds: that each clip takes. size: clips that wait; policy: when there are more. fails: clips that fail. labels:
    whether there is a classifier.
    """

    def __init__(self, *, seconds=0.0, size=100, policy="drop-oldest", fails=(), labels=False):
        self._seconds, self._size, self._policy, self._fails, self._labels = seconds, size, policy, fails, labels
        self._waiting, self._changed = [], threading.Condition()
        self.submitted, self.closed = [], False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()

    def submit(self, clip, *, deadline=None):
        future = Future()
        with self._changed:
            if self._policy == "block":
                self._changed.wait_for(lambda: self.closed or len(self._waiting) < self._size)
            if self.closed:
                raise Closed("closed")
            if len(self._waiting) >= self._size:
                if self._policy == "reject":
                    raise QueueFull("full")
                self._waiting.pop(0)[2].set_exception(Dropped("a newer clip came"))
            self._waiting.append((len(self.submitted), clip, future, time.monotonic()))
            self.submitted.append((clip, deadline))
            self._changed.notify_all()
        return future

    def close(self, cancel=False):
        with self._changed:
            self.closed = True
            waiting, self._waiting = (self._waiting, []) if cancel else ([], self._waiting)
            self._changed.notify_all()
        for *_, future, _ in waiting:
            future.set_exception(Closed("closed"))
        self._thread.join(5)

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self._waiting)
                if not self._waiting:
                    return
                number, clip, future, submitted = self._waiting.pop(0)
                self._changed.notify_all()
            started = time.monotonic()
            time.sleep(self._seconds)
            if number in self._fails:
                future.set_exception(FloatingPointError("the clip\nis not finite"))
                continue
            done = time.monotonic()
            times = Times(submitted, started, done, done, done, done)
            future.set_result(Answer(1 - clip, None, None, number if self._labels else None, times))
