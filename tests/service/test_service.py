"""What the service answers, to whom, and that it works for nobody who has gone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import Classifier, build_purifier
from realtime_fakes import video_bytes
from service_fakes import StubCodecs, StubStream, all_of, form, head, running, until, video_part
from starlette.exceptions import HTTPException

from videopure_fast import tiny
from videopure_fast.data.video import probe, read_frames
from videopure_fast.realtime.stream import StreamPurifier
from videopure_fast.service import app as service_app
from videopure_fast.service import engine as service_engine
from videopure_fast.service import workers
from videopure_fast.service.app import create_app
from videopure_fast.service.limits import Limits, Line
from videopure_fast.service.server import listen, serve
from videopure_fast.service.uploads import UploadFolder
from videopure_fast.streaming import purify_stream
from videopure_fast.windows import window_starts

ROOT = Path(__file__).resolve().parents[2]
CLASSES = tiny.CLASSES
LINES = {"Accept": "application/x-ndjson"}
LIMITS = Limits(bytes=500_000, seconds=4.0, frames=40, pixels=320 * 240, reading=5.0, working=1, waiting=1, drain=5.0)
FRAMES = 20  # of the clip: windows of 8 frames that overlap by 2


@cache
def small():
    """A small purifier for whoever does not purify."""
    return build_purifier()


@pytest.fixture(scope="module")
def clip():
    return video_bytes(FRAMES, kind="matroska", step=40)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service with a real decoder, a stub in the place of the stream, and a stand-in for the page."""
    page = tmp_path_factory.mktemp("web")
    for name in ("index.html", "page.js", "player.js", "style.css", "report.css"):
        (page / name).write_text(f"the content of {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_engine, "StreamPurifier", StubStream)
        patch.setattr(service_app, "files", lambda _: page)
        with running(create_app(small(), tiny.load_classifier(), limits=LIMITS, size=32)) as one:
            yield one


@pytest.fixture
def slow(monkeypatch):
    """Clips take ten seconds in this test."""
    monkeypatch.setattr(StubStream, "seconds", 10.0)


def frames_of(content, path, size=32):
    path.write_bytes(content)
    return probe(path), torch.stack(list(read_frames(probe(path), size)))


# The contract


def test_a_video_is_answered_by_the_purified_one(service, clip, tmp_path):
    response = service.purify(clip)
    assert response.status_code == 200 and response.headers["content-type"] == "video/mp4"
    sent, before = frames_of(clip, tmp_path / "before.mkv")
    got, after = frames_of(response.content, tmp_path / "after.mp4")
    assert got.frames == FRAMES and (got.height, got.width) == (32, 48)
    steps = np.diff(got.stamps * float(got.time_base))
    assert steps == pytest.approx(np.diff(sent.stamps * float(sent.time_base)), abs=1e-3)
    assert (after.float() - (255 - before.float())).abs().mean() < 3  # the stub inverts; the rest is the encoder's
    assert response.headers["x-label"] == CLASSES[1]
    assert json.loads(response.headers["x-votes"]) == {CLASSES[0]: 3, CLASSES[1]: 6}  # of three windows
    stages = re.findall(r"(\w+);dur=[\d.]+", response.headers["server-timing"])
    assert stages == ["queue", "encode", "sample", "decode", "total"]
    assert service.kept == []


def test_lines_tell_what_happens_while_it_happens(service, clip, tmp_path):
    response = service.purify(clip, headers=LINES, steps=0)
    assert response.status_code == 200 and response.headers["content-type"] == LINES["Accept"]
    events = [json.loads(line) for line in response.text.splitlines()]
    shape = {"windows": 3, "frames": FRAMES, "height": 32, "width": 48, "rate": 25.0}
    assert events[0] == {"event": "started", **shape}
    assert service.engine.stream.asked[-1] == 0
    window = [
        {"event": "progress", "window": 1, "stage": "encode", "done": 1, "total": 1},
        {"event": "progress", "window": 1, "stage": "evaluate", "done": 1, "total": 2},
        {"event": "progress", "window": 1, "stage": "evaluate", "done": 2, "total": 2},
    ]
    for vote, label in enumerate([CLASSES[0], CLASSES[1], CLASSES[1]]):
        window.append({"event": "progress", "window": 1, "stage": "decode", "done": vote + 1, "total": 3})
        window.append({"event": "vote", "window": 1, "vote": vote, "label": label})
    assert [event for event in events if event.get("window") == 1] == window
    done = events[-1]
    assert done["event"] == "done" and done["label"] == CLASSES[1] and done["votes"] == {CLASSES[0]: 3, CLASSES[1]: 6}
    assert list(done["times"]) == ["queue", "encode", "sample", "decode", "total"]
    before, _ = frames_of(base64.b64decode(done["before"]), tmp_path / "before.mp4")
    after, _ = frames_of(base64.b64decode(done["after"]), tmp_path / "after.mp4")
    assert (before.frames, before.height, before.width) == (after.frames, after.height, after.width) == (FRAMES, 32, 48)
    assert (before.stamps * before.time_base == after.stamps * after.time_base).all()


def test_windows_give_what_the_purifier_gives(monkeypatch):
    """Bit for bit: the service adds nothing to the method."""
    joined = []

    def cat(pieces):
        joined.extend(piece.dtype for piece in pieces)
        return torch.cat(pieces)

    monkeypatch.setattr(service_engine, "torch", SimpleNamespace(cat=cat, uint8=torch.uint8))
    purifier, classifier = build_purifier(), Classifier()
    frames = torch.randint(0, 256, (19, 3, 16, 18), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    engine = service_engine.Engine(purifier, classifier, model="m", size=16, limits=Limits(), sources={})

    async def run(stream):
        engine.stream = stream
        starts = window_starts(len(frames), engine.window, 2)
        return await engine._windows(frames, starts, None, time.monotonic() + 60, lambda event: None)

    with StreamPurifier(purifier, classifier, policy="reject", early_stop=False) as stream:
        purified, votes, times = asyncio.run(run(stream))
    assert torch.equal(purified, torch.stack(list(purify_stream(purifier, frames, 19))))
    assert joined == [torch.uint8] * 3  # a piece of each window, and not all of them as floats
    assert sum(votes.values()) == 3 * (purifier.config.inversion_steps + 2) and min(times.values()) >= 0


def test_without_a_classifier_nobody_votes(service, clip, monkeypatch):
    monkeypatch.setattr(service.engine, "votes", False)
    monkeypatch.setattr(service.engine.stream, "votes", False)
    response = service.purify(clip)
    assert response.status_code == 200 and "x-label" not in response.headers and "x-votes" not in response.headers
    done = json.loads(service.purify(clip, headers=LINES).text.splitlines()[-1])
    assert done["label"] is None and done["votes"] is None


def test_the_page_and_what_it_asks_for(service):
    assert service.get("/").text == "the content of index.html"
    for name, kind in (("style.css", "text/css"), ("page.js", "text/javascript"), ("player.js", "text/javascript")):
        response = service.get(f"/{name}")
        assert response.text == f"the content of {name}" and response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert service.get("/report.css").status_code == 404
    info = service.get("/v1/info").json()
    limits = {"bytes": 500_000, "seconds": 4.0, "frames": 40, "pixels": 320 * 240}
    expected = {"model": "tiny", "frames": 8, "size": 32, "steps": 1, "classes": list(CLASSES), "live": []}
    assert info == {**expected, "limits": limits}
    assert service.get("/healthz").json() == {"status": "alive"}
    assert service.get("/readyz").json() == {"status": "ready"}


def test_the_files_of_the_page_are_there():
    """Those of the package, each with its content, and nothing else of their folder."""
    folder = Path(service_app.__file__).parents[1] / "web"
    served = {route.path for route in create_app(small()).routes if route.path.endswith((".js", ".css"))}
    named = re.findall(r'(?:src|href)="(\w+\.\w+)"', (folder / "index.html").read_text())
    imported = re.findall(r'from "\./(.+?)"', (folder / "page.js").read_text())
    assert named and imported and served == {f"/{name}" for name in (*named, *imported)}


def test_metrics_count(service, clip):
    assert service.purify(clip).status_code == 200
    service.get("/v1/nothing?secret=1")
    text = service.get("/metrics").text
    assert 'videopure_requests_total{method="POST",path="/v1/purify",status="200"}' in text
    assert 'videopure_requests_total{method="GET",path="other",status="404"}' in text
    assert "videopure_ready 1.0" in text and "videopure_working 0.0" in text
    assert re.search(r'videopure_stage_seconds_count\{stage="total"\} [1-9]', text)
    assert re.search(r'videopure_clips\{outcome="answered"\} [1-9]', text) and "secret" not in text


def test_the_schema_describes_the_form(service):
    schema = service.get("/openapi.json").json()
    purify = schema["paths"]["/v1/purify"]["post"]
    fields = purify["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert list(fields["properties"]) == ["video", "steps", "deadline"] and fields["required"] == ["video"]
    assert set(purify["responses"]) >= {"200", "400", "401", "403", "408", "413", "415", "503", "504"}
    assert set(purify["responses"]["200"]["content"]) >= {"video/mp4", "application/x-ndjson"}
    assert {"/v1/live/{name}", "/v1/info", "/healthz", "/readyz", "/metrics"} <= set(schema["paths"])


def test_the_client_of_the_readme_runs(service, clip, tmp_path, monkeypatch):
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "httpx" in block
    )
    assert len([line for line in block.splitlines() if line.strip()]) <= 14
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").write_bytes(clip)
    names = {}
    exec(compile(block.replace("http://127.0.0.1:8000", service.address), "README.md", "exec"), names)
    assert probe("purified.mp4").frames == FRAMES


# Limits and fields: each has its status and a sentence


@pytest.mark.parametrize(
    ("video", "status", "sentence"),
    [
        ({"count": 41}, 413, "the video has more than 40 frames; accepted: as many at most"),
        ({"count": 10, "step": 500}, 413, "the video plays for 4.5 s; accepted: 4 s at most"),
        ({"height": 320, "width": 320}, 413, "the video has frames of 320x320; accepted: 76800 pixels a frame at most"),
        ({"height": 16, "width": 80}, 413, "the video has frames of 80x16; accepted: a longer side of at most 4 times"),
        ({"count": 1}, 400, "video has 1 frame; accepted: mp4, avi, gif and webm videos, also mov, mkv and MPEG-TS"),
    ],
)
def test_what_a_video_may_be(service, video, status, sentence):
    response = service.purify(video_bytes(**{"kind": "matroska", **video}))
    assert response.status_code == status and response.json()["detail"].startswith(sentence)
    assert service.kept == []


def test_the_size_of_a_video(service):
    response = service.purify(bytes(500_001))
    assert response.status_code == 413
    assert response.json() == {"detail": "the video is too large; accepted: 500000 bytes at most"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": "-1"}, "steps cannot be read; accepted: a whole number"),
        ({"steps": "49"}, ""),
        ({"steps": "50"}, "inversion_steps must satisfy"),
        ({"steps": "1" * 33}, "steps is too long; accepted: 32 characters at most"),
        ({"deadline": "nan"}, "deadline cannot be read; accepted: seconds, more than 0, at most 300"),
        ({"deadline": "0"}, "deadline is 0; accepted: seconds, more than 0, at most 300"),
        ({"deadline": "301"}, "deadline is 301; accepted: seconds, more than 0, at most 300"),
        ({"size": "5"}, "the form has a part that is not known; accepted: multipart/form-data with a file `video`"),
    ],
)
def test_what_fields_may_be(service, clip, fields, sentence):
    response = service.purify(clip, **fields)
    assert response.status_code == (400 if sentence else 200)
    assert not sentence or response.json()["detail"].startswith(sentence)


def test_settings_in_the_address_are_refused(service, clip):
    response = httpx.post(f"{service.address}/v1/purify?steps=1", files={"video": clip}, timeout=60)
    assert response.status_code == 400 and "the address has a query; accepted: multipart" in response.json()["detail"]


def test_a_deadline_that_passes(service, clip, slow):
    began = time.monotonic()
    last = json.loads(service.purify(clip, headers=LINES, deadline="2").text.splitlines()[-1])  # once lines are sent
    assert last["event"] == "error" and last["status"] == 504
    response = service.purify(clip, deadline="0.2")
    assert response.status_code == 504 and response.json()["detail"].startswith("the answer was not there within 0.2 s")
    assert time.monotonic() - began < 7
    until(lambda: not service.engine.line.working)


# Many requests


def in_background(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_full_queue_says_when_to_come_again(service, clip, monkeypatch):
    monkeypatch.setattr(StubStream, "seconds", 0.12)
    results = []
    first = in_background(lambda: results.append(service.purify(clip)))
    until(lambda: service.engine.line.working == 1)
    second = in_background(lambda: results.append(service.purify(clip, headers=LINES)))
    until(lambda: service.engine.line.waiting == 1)
    third = service.purify(clip)
    assert third.status_code == 503 and third.json()["detail"].startswith("the service is busy: 1 videos wait already")
    assert 1 <= int(third.headers["retry-after"]) <= 600
    assert service.purify(clip, headers=LINES).status_code == 503  # an answer of its own, and not a line
    for thread in (first, second):
        thread.join(20)
    assert [response.status_code for response in results] == [200, 200]
    assert json.loads(results[1].text.splitlines()[0]) == {"event": "queued", "ahead": 1}


def test_a_line_is_first_come_first_served():
    async def run():
        line, order = Line(1, 3), []

        async def work(name):
            async with line.join():
                order.append(name)
                await asyncio.sleep(0.01)

        tasks = []
        for name in "abcd":
            tasks.append(asyncio.ensure_future(work(name)))
            await asyncio.sleep(0)
        tasks[1].cancel()  # one that waits
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["a", "c", "d"] and not line.working and not line.waiting
        place = line.join()
        await place.__aenter__()
        task = asyncio.ensure_future(work("e"))
        await asyncio.sleep(0)
        await place.__aexit__(None, None, None)  # its turn comes, and it is canceled before it sees that
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert order[-1] == "d" and not line.working and not line.waiting

    asyncio.run(run())


@pytest.mark.parametrize("accept", ["video/mp4", "application/x-ndjson"])
def test_a_client_that_goes_away_frees_its_place(service, clip, slow, accept):
    canceled, before = service.engine.stream.outcomes["canceled"], len(service.engine.stream.shapes)
    body = form(video_part(clip))
    with service.connect() as connection:
        connection.sendall(head(len(body)).replace(b"\r\n\r\n", f"\r\nAccept: {accept}\r\n\r\n".encode()) + body)
        until(lambda: len(service.engine.stream.shapes) > before and service.engine.line.working == 1)
        time.sleep(0.05)
    began = time.monotonic()
    until(lambda: not service.engine.line.working and not service.kept, 3)
    assert time.monotonic() - began < 1.0
    until(lambda: service.engine.stream.outcomes["canceled"] > canceled, 3)


def test_a_client_that_has_sent_more_is_seen_to_go_away(service, clip, slow):
    """A second request in the pipe would have uvicorn read no more, and so not see the end."""
    body = form(video_part(clip))
    with service.connect() as connection:
        connection.sendall(head(len(body)) + body + b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        until(lambda: service.engine.line.working == 1)
        time.sleep(0.05)
    until(lambda: not service.engine.line.working, 1.0)


# Who may ask


def ask(app, method="GET", path="/v1/info", **headers):
    """The status that an application gives without a server, and the sentence."""

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            response = await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            return response.status_code, response.json().get("detail") if path != "/" else None

    return asyncio.run(run())


def test_hosts_and_origins():
    app = create_app(small())
    assert ask(app)[0] == ask(app, host="LOCALHOST")[0] == ask(app, host="[::1]:8000")[0] == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "localhost@evil", "", "127.0.0.1:x"):
        status, sentence = ask(app, host=host)
        assert status == 403 and sentence.endswith("accepted: localhost, 127.0.0.1, [::1]"), host
    assert ask(app, origin="http://localhost:8000")[0] == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:9000",
        "http://localhost:8000@evil",
        "http://[",
        "",
    ):
        assert ask(app, origin=origin)[0] == 403, origin
    for site, status in (("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)):
        assert ask(app, sec_fetch_site=site)[0] == status
    assert ask(app, path="/healthz", sec_fetch_site="cross-site")[0] == 200
    named = create_app(small(), hosts=["Box.Local."])
    assert ask(named, host="box.local:80")[0] == 200 and ask(named, host="localhost")[0] == 403
    assert ask(app, "POST", "/v1/purify", origin="http://evil.example")[0] == 403


def test_a_token_is_asked_for():
    token = "a-token-that-is-long"
    app = create_app(small(), token=token, hosts=None)
    assert ask(app, authorization=f"Bearer {token}")[0] == ask(app, authorization=f"bearer  {token}")[0] == 200
    for given in (None, "Bearer", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Basic {token}", token, "Bearer \u00e9"):
        status, sentence = ask(app, **({} if given is None else {"authorization": given.encode()}))
        assert status == 401 and sentence.endswith("accepted: the header `Authorization: Bearer TOKEN`")
    for path in ("/metrics", "/v1/purify", "/openapi.json", "/nothing", "/healthz/"):
        assert ask(app, path=path)[0] == 401, path
    assert ask(app, path="/healthz", host="any.where")[0] == 200
    for bad in ("short", "with a blank in it ....", "no-ascii-\u00e9-in-headers"):
        with pytest.raises(ValueError, match="the token cannot be used; accepted: 16 or more"):
            create_app(small(), token=bad)


def test_the_log_has_no_secrets(service, caplog, clip):
    with caplog.at_level("INFO", "videopure_fast.service"):
        service.get("/v1/info?token=hidden", headers={"Authorization": "Bearer hidden"})
        service.get("/v1/%0d%0aforged%1b[2J")
        service.purify(clip, name="hidden.mp4")
    shown = [record.getMessage() for record in caplog.records]
    assert any(re.fullmatch(r"127\.0\.0\.1 GET /v1/info 200 0\.\d+ s", line) for line in shown)
    assert "127.0.0.1 GET /v1/??forged?[2J 404" in " ".join(shown) and "hidden" not in " ".join(shown)


def test_paths_and_methods_that_are_not_there(service):
    response = service.get("/v1/other")
    assert response.status_code == 404 and response.json()["detail"].startswith(
        "there is nothing at /v1/other; accepted"
    )
    response = service.get("/v1/purify")
    assert response.status_code == 405 and response.json()["detail"] == "GET is not accepted here; accepted: POST"
    response = service.get("/v1/live/door")
    assert response.status_code == 404 and response.json()["detail"] == "there is no such source; accepted: none, here"


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"limits": Limits(bytes=0)}, ValueError, "the limit bytes is 0; accepted: 1 or more"),
        ({"limits": Limits(seconds=float("inf"))}, ValueError, "the limit seconds is inf"),
        ({"limits": Limits(frames="9")}, TypeError, "the limit frames is a str; accepted: int"),
        ({"size": 15}, ValueError, "size must be an even number of 16 pixels or more, got 15"),
        ({"hosts": ["box:8000"]}, ValueError, "'box:8000' is no name of a host; accepted: a name or a number, no port"),
        ({"sources": {"a/b": "x.mp4"}}, ValueError, "a source is named 'a/b'; accepted: 1 to 64 letters"),
        ({"sources": {"door": "ftp://u:secret@h/x"}}, ValueError, "ftp://\\*\\*\\*@h/x cannot be watched"),
    ],
)
def test_arguments_of_the_application(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        create_app(small(), **arguments)


@pytest.mark.parametrize("config", [{"method": "ddpm"}, {"feedback": True}])
def test_purifiers_that_no_stream_takes(config):
    with pytest.raises(ValueError, match="the purifier has .*; accepted: 'videopure' or 'ddim_inversion'"):
        create_app(small().with_config(**config))


# Beginnings and ends


@pytest.fixture
def stubs(monkeypatch):
    """No models and no decoders in this test's own service."""
    monkeypatch.setattr(service_engine, "StreamPurifier", StubStream)
    monkeypatch.setattr(service_engine, "Codecs", StubCodecs)


def test_not_ready_before_it_is_warm(monkeypatch, clip, stubs):
    monkeypatch.setattr(StubStream, "warmup_seconds", 0.3)
    with running(create_app(small(), limits=LIMITS), ready=False) as service:
        assert service.get("/healthz").status_code == 200
        response = service.get("/readyz")
        assert response.status_code == 503 and response.json()["detail"] == "the service is not ready: it is warming up"
        assert service.purify(clip).headers["retry-after"] == "5"
        until(lambda: service.get("/readyz").status_code == 200)


def test_a_beginning_that_fails_is_ended(monkeypatch, stubs, capfd):
    ended = []

    def no_stream(*_, **__):
        raise OSError("no more threads")

    monkeypatch.setattr(service_engine, "StreamPurifier", no_stream)
    monkeypatch.setattr(StubCodecs, "__exit__", lambda *_: ended.append(True))
    app, listener = create_app(small()), listen("127.0.0.1", 0)
    with pytest.raises(RuntimeError, match="the service cannot begin: no more threads"):
        serve(app, listener, lambda: pytest.fail("it has begun"))
    assert ended == [True] and not app.state.engine.uploads.path.exists() and listener.fileno() == -1
    assert "Traceback" not in capfd.readouterr().err


def test_an_end_finishes_what_is_in_flight(monkeypatch, clip, stubs):
    monkeypatch.setattr(StubStream, "seconds", 0.2)
    results = []
    with running(create_app(small(), limits=LIMITS)) as service:
        request = in_background(lambda: results.append(service.purify(clip)))
        until(lambda: service.engine.stream.shapes)
        with service.connect() as idle:
            service.server.should_exit = True
            until(lambda: service.engine.closing.is_set())
            assert idle.recv(1) == b""
        with pytest.raises(httpx.TransportError):
            service.get("/healthz")
        folder = service.engine.uploads.path
    request.join(5)
    assert results[0].status_code == 200 and not folder.exists()


@pytest.mark.parametrize("accept", ["video/mp4", "application/x-ndjson"])
def test_an_end_cancels_what_takes_too_long(clip, slow, stubs, accept):
    limits, body = LIMITS._replace(drain=0.3), form(video_part(clip))
    with running(create_app(small(), limits=limits)) as service, service.connect() as connection:
        connection.sendall(head(len(body)).replace(b"\r\n\r\n", f"\r\nAccept: {accept}\r\n\r\n".encode()) + body)
        until(lambda: service.engine.stream.shapes)
        began = time.monotonic()
        service.server.should_exit = True
        content = all_of(connection)
        assert content.startswith(b"HTTP/1.1 503" if accept == "video/mp4" else b"HTTP/1.1 200")
        assert b"the service has ended; the video was given up" in content
        service.thread.join(10)
        assert time.monotonic() - began < 4 and not service.engine.uploads.path.exists()


def test_a_client_that_does_not_read_is_cut(clip, stubs, monkeypatch):
    """Its answer is more than the buffers between it and the service hold."""

    async def encode(self, folder, purified, *, before):
        return [bytes(40 << 20)]

    monkeypatch.setattr(StubCodecs, "encode", encode)
    body = form(video_part(clip))
    with running(create_app(small(), limits=LIMITS._replace(taking=0.3))) as service, service.connect() as connection:
        connection.sendall(head(len(body)) + body)
        until(lambda: service.engine.stream.outcomes["answered"] == 3)
        until(lambda: not service.server.server_state.connections, 3)


# The folder of uploads


def test_folders_of_dead_processes_are_removed(tmp_path):
    with UploadFolder(tmp_path) as alive:
        (alive.path / "video").write_text("in use")
        child = os.fork()
        if not child:
            folder = UploadFolder(tmp_path).__enter__()
            (folder.path / "video").write_text("left behind")
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        (tmp_path / "videopure-fast-uploads-empty").mkdir()  # killed before its lock was made
        (tmp_path / "videopure-fast-uploads-link").symlink_to(alive.path)
        (tmp_path / "another").mkdir()
        assert len(os.listdir(tmp_path)) == 5
        with UploadFolder(tmp_path) as second:
            kept = {alive.path.name, second.path.name, "another", "videopure-fast-uploads-link"}
            assert set(os.listdir(tmp_path)) == kept and (alive.path / "video").exists()
    assert set(os.listdir(tmp_path)) == {"another", "videopure-fast-uploads-link"}


# Decoders that fail


def test_a_decoder_that_hangs_or_dies_is_replaced(service, clip, monkeypatch):
    (codec,) = service.engine._codecs._idle
    assert codec._used  # by tests before this one: it has imported what it needs
    monkeypatch.setattr(service.engine, "limits", LIMITS._replace(reading=0.3))
    os.kill(codec._process.pid, signal.SIGSTOP)
    response = service.purify(clip)
    assert response.status_code == 413
    assert response.json()["detail"] == "the video takes more than 0.3 s to decode; accepted: a shorter or smaller one"
    (second,) = service.engine._codecs._idle
    assert second is not codec and codec._process.returncode == -signal.SIGKILL
    monkeypatch.setattr(service.engine, "limits", LIMITS)
    os.kill(second._process.pid, signal.SIGKILL)
    until(lambda: second.ended)
    assert service.purify(clip).status_code == 200  # who comes next is not blamed for it
    (third,) = service.engine._codecs._idle
    os.kill(third._process.pid, signal.SIGSTOP)
    responses = []
    request = in_background(lambda: responses.append(service.purify(clip)))
    until(lambda: not third.fit)
    os.kill(third._process.pid, signal.SIGSEGV)
    os.kill(third._process.pid, signal.SIGCONT)
    request.join(5)
    assert responses[0].status_code == 400
    assert responses[0].json()["detail"] == "the video cannot be decoded: its decoder crashed"
    assert service.engine._codecs._idle != [third] and service.kept == []


def test_a_decoder_that_cannot_be_made_is_made_later(monkeypatch):
    """Its place is kept; and none is made when the service has ended."""
    made = []

    class Process:
        ended = False

        def __init__(self, threads):
            if made and made[-1] is None:
                raise OSError("no more processes")
            made.append(self)
            self.fit = True

        def close(self):
            self.ended = True

        def forget(self):
            pass

    async def lend(fit=True):
        async with codecs.lend() as codec:
            codec.fit = fit

    monkeypatch.setattr(workers, "Codec", Process)
    codecs = workers.Codecs(1)
    with codecs:
        made.append(None)
        asyncio.run(lend(fit=False))
        with pytest.raises(OSError, match="no more processes"):
            asyncio.run(lend())
        assert codecs._idle == [None] and made.pop() is None and made[0].ended
        asyncio.run(lend())

        async def outlast():
            async with codecs.lend() as codec:
                codecs.__exit__()
                codec.fit = False

        asyncio.run(outlast())
    assert len(made) == 2 and all(one.ended for one in made)


def test_a_video_that_was_not_encoded_is_forgotten(service, clip, tmp_path):
    """Its client went away; and what cannot be encoded is not the next client's fault."""
    (tmp_path / "video").write_bytes(clip)

    async def decode():
        async with service.engine._codecs.lend() as codec:
            return codec, await codec.decode(tmp_path, size=32, limits=LIMITS)

    async def encode(frames):
        async with service.engine._codecs.lend() as codec:
            await codec.encode(tmp_path, frames, before=True)

    codec, decoded = asyncio.run(decode())
    assert service.engine._codecs._idle == [codec]
    with pytest.raises(HTTPException) as refused:
        asyncio.run(encode(decoded.frames))
    assert (refused.value.status_code, refused.value.detail) == (500, "the purified video cannot be encoded")
    assert codec.ended and service.engine._codecs._idle != [codec]


def test_jpegs_are_pictures():
    from PIL import Image

    from videopure_fast.service.live import _jpeg

    frame = torch.zeros(3, 20, 24, dtype=torch.uint8)
    frame[0] = 250
    picture = np.asarray(Image.open(io.BytesIO(_jpeg(frame))))
    assert picture.shape == (20, 24, 3) and abs(picture.reshape(-1, 3).mean(0) - (250, 0, 0)).max() < 5
