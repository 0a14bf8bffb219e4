"""Live sources of the service: opened once for all viewers, played at their pace, and missed by who is slow."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time

import httpx
import numpy as np
import pytest
from conftest import build_purifier
from PIL import Image
from realtime_fakes import FakeCamera, StubServer, gray, sends, video_bytes
from service_fakes import StubCodecs, StubStream, answer, is_cut, running, until

from videopure_fast.realtime import cameras
from videopure_fast.service import engine as service_engine
from videopure_fast.service import live
from videopure_fast.service.app import create_app
from videopure_fast.service.limits import Limits

SHAPE = {"window": 8, "overlap": 2, "size": 16}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A short and a long film."""
    folder = tmp_path_factory.mktemp("films")
    for name, count in (("short", 26), ("long", 200)):
        (folder / f"{name}.mkv").write_bytes(video_bytes(count, kind="matroska", step=20))
    return str(folder / "short.mkv"), str(folder / "long.mkv")


def shade(jpeg):
    return float(np.asarray(Image.open(io.BytesIO(jpeg))).mean())


def test_frames_come_purified_in_order_and_at_their_pace(films):
    async def run(server):
        frames = live.source_frames(films[0], server, **SHAPE)
        seen = []
        async with contextlib.aclosing(frames.view()) as pictures:
            async for picture in pictures:
                seen.append((time.monotonic(), shade(picture)))
        await frames.close()
        return seen

    with StubServer() as server:
        seen = asyncio.run(run(server))
    moments, shades = zip(*seen, strict=True)
    assert len(shades) == 26 and shades == pytest.approx([255 - gray(i) for i in range(26)], abs=6)
    steps = np.diff(moments)
    assert 0.3 < moments[-1] - moments[0] < 1.5 and np.median(steps) == pytest.approx(0.02, abs=0.01)


def test_viewers_share_a_source_and_the_slow_one_misses_frames(monkeypatch):
    made = []

    async def produce():
        made.append(True)
        try:
            for i in range(200):
                await asyncio.sleep(0.005)
                yield b"%d" % i
            await asyncio.sleep(60)
        finally:
            made.append("closed")

    async def look(frames, pause, count):
        seen = []
        async with contextlib.aclosing(frames.view()) as pictures:
            async for picture in pictures:
                seen.append(int(picture))
                await asyncio.sleep(pause)
                if len(seen) == count:
                    return seen

    async def run():
        frames = live.Frames(produce)
        quick, slow = await asyncio.gather(look(frames, 0, 100), look(frames, 0.05, 10))
        assert quick == list(range(quick[0], quick[0] + 100))
        assert all(b - a >= 4 for a, b in zip(slow[1:], slow[2:], strict=False)) and made == [True]
        late = await look(frames, 0, 1)  # who comes again finds it open
        assert late[0] > 50 and made == [True]
        await asyncio.sleep(0.2)
        assert made == [True, "closed"]
        assert await look(frames, 0, 1) == [0] and made == [True, "closed", True]
        await frames.close()
        assert made[-1] == "closed"

    monkeypatch.setattr(live, "_LINGER", 0.1)
    asyncio.run(run())


def test_a_source_keeps_few_clips_waiting():
    class Server:
        def __init__(self):
            self.futures = []

        def submit(self, clip, *, deadline=None):
            from concurrent.futures import Future

            self.futures.append(Future())
            return self.futures[-1]

    server = Server()
    bounded = live._AtMost(server, 2)
    bounded.submit(None)
    bounded.submit(None)
    with pytest.raises(live.QueueFull, match="2 clips of the source wait already"):
        bounded.submit(None)
    server.futures[0].set_result(None)
    bounded.submit(None)
    assert len(server.futures) == 3


@pytest.fixture(scope="module")
def service(films):
    limits = Limits(working=1, viewers=2, live=0.6, drain=3.0, taking=1.0)
    with pytest.MonkeyPatch.context() as patch, FakeCamera(sends(b"garbage" * 100)) as broken:
        patch.setattr(service_engine, "StreamPurifier", StubStream)
        patch.setattr(service_engine, "Codecs", StubCodecs)
        patch.setattr(cameras, "_FIRST_WAIT", 0.02)
        sources = dict(zip(("door", "long"), films, strict=True))
        sources["broken"] = f"tcp://user:hidden@127.0.0.1:{broken.port}"
        with running(create_app(build_purifier(), limits=limits, size=16, sources=sources)) as one:
            yield one


def test_a_source_is_a_series_of_pictures(service):
    assert service.get("/v1/info").json()["live"] == ["door", "long", "broken"]
    content = b""
    with httpx.stream("GET", f"{service.address}/v1/live/door", timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
        for piece in response.iter_bytes():
            content += piece
    parts = content.split(b"--frame\r\n")
    assert parts[0] == parts[-1] == b"" and len(parts) == 28  # a file ends, and its pictures with it
    lines, _, jpeg = parts[1].partition(b"\r\n\r\n")
    assert lines == b"Content-Type: image/jpeg\r\nContent-Length: %d" % len(jpeg[:-2])
    assert shade(jpeg) == pytest.approx(255 - gray(0), abs=6)
    until(lambda: service.engine.viewing == 0)


def test_a_source_that_shows_nothing(service):
    response = service.get("/v1/live/broken")
    assert response.status_code == 503 and "retry-after" in response.headers
    detail = response.json()["detail"]
    assert detail == "the live source shows nothing at present: there was no picture for 0.6 s"
    assert service.get("/v1/live/other").json()["detail"] == "there is no such source; accepted: door, long, broken"


def test_viewers_are_bounded_and_noticed_when_they_go(service):
    request = b"GET /v1/live/long HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with service.connect() as first, service.connect() as second, service.connect() as third:
        for one in (first, second):
            one.sendall(request)
        until(lambda: service.engine.viewing == 2)
        third.sendall(request)
        assert answer(third) == (503, "2 viewers look at live sources already; try again later")
        first.close()
        until(lambda: service.engine.viewing == 1, 1.0)
    until(lambda: service.engine.viewing == 0, 1.0)


def test_an_end_does_not_wait_for_viewers(service):
    """The last test of this service."""
    with service.connect() as viewer:
        viewer.sendall(b"GET /v1/live/broken HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        until(lambda: service.engine.viewing == 1)
        began = time.monotonic()
        service.server.should_exit = True
        assert is_cut(viewer, 3) and time.monotonic() - began < 1
