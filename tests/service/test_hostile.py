"""Requests that mean harm, or look like it: each is answered or cut as promised, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import random
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from socket import MSG_PEEK, MSG_WAITALL

import av
import httpx
import pytest
from conftest import build_purifier
from PIL import Image
from realtime_fakes import video_bytes
from service_fakes import StubStream, answer, field_part, form, head, is_cut, running, until, video_part

from videopure_fast.service import engine as service_engine
from videopure_fast.service.app import create_app
from videopure_fast.service.limits import Limits

LIMITS = Limits(
    bytes=1_000_000,
    seconds=5.0,
    frames=64,
    pixels=1024 * 1024,
    reading=5.0,
    working=1,
    waiting=4,
    uploads=8,
    connections=240,
    head=0.4,
    idle=0.4,
    upload=0.9,
    taking=0.5,
)


@pytest.fixture(scope="module")
def clip():
    return video_bytes(8, kind="matroska")


@pytest.fixture(scope="module")
def service():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_engine, "StreamPurifier", StubStream)
        with running(create_app(build_purifier(), limits=LIMITS, size=16)) as one:
            yield one


@pytest.fixture
def asked(service, clip):
    """Send content and get (status, sentence). Afterwards nothing may be left, and the service answers as before."""

    def ask(*pieces, pause=0.0):
        with service.connect() as connection:
            for piece in pieces:
                try:
                    connection.sendall(piece)
                except ConnectionError:
                    break
                time.sleep(pause)
            return answer(connection)

    before = open_files(), threading.active_count()
    yield ask
    assert service.get("/readyz").status_code == 200
    until(lambda: not service.kept and not service.engine.line.working and not service.engine.uploading)
    until(lambda: open_files() <= before[0] and threading.active_count() <= before[1] + 2, 8)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def post(content, **options):
    return head(len(content), **options) + content


def gif(width, height, frames):
    """A GIF of frames that each have a pixel, on a screen of any size: 23 bytes a frame."""
    control, picture = b"\x21\xf9\x04\x00\x01\x00\x00\x00", b"\x2c" + bytes(4) + b"\x01\x00\x01\x00\x00"
    start = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\x00\x00" + bytes(3) + b"\xff" * 3
    return start + (control + picture + b"\x02\x02\x44\x01\x00") * frames + b";"


CLIP = video_part(video_bytes(8, kind="matroska"))
PLAYLISTS = {
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:1/secret.ts\n#EXT-X-ENDLIST\n",
    "m3u8 of a file": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>file:///etc/</BaseURL></MPD>',
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 33\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}
DAMAGED = {
    "text": b"this is no video " * 100,
    "nothing": b"",
    "zeros": bytes(100_000),
    "half a video": video_bytes(40, kind="mp4", noise=True)[:3000],
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("content", [*PLAYLISTS.values(), *DAMAGED.values()], ids=[*PLAYLISTS, *DAMAGED])
def test_what_is_no_video(asked, content):
    status, sentence = asked(post(form(video_part(content))))
    assert status == 400 and sentence.startswith("video ")
    assert "/" not in sentence.partition("accepted")[0]  # of the server's folders


@pytest.mark.parametrize(
    ("content", "statuses", "words"),
    [
        (gif(16, 16, 40_000), {413}, "more than 64 frames"),
        (gif(65535, 65535, 2), {400}, "accepted: 1 to 67108864 pixels a frame"),
        (gif(8000, 8000, 2), {413}, "frames of 8000x8000; accepted: 1048576 pixels a frame at most"),
        (gif(16, 1000, 4), {413}, "longer side"),
        (video_bytes(2, step=3_600_000, kind="matroska"), {413}, "plays for 3600"),
        (
            video_bytes(8, kind="avi", codec="mjpeg").replace(
                struct.pack("<II", 48, 32), struct.pack("<II", 30000, 30000)
            ),
            {200},  # the pictures in it are small: what the header says is not believed
            "",
        ),
    ],
    ids=["a bomb of frames", "no size", "a large size", "a long side", "an hour", "a header that lies"],
)
def test_what_is_too_much(asked, content, statuses, words):
    began = time.monotonic()
    status, sentence = asked(post(form(video_part(content))))
    assert status in statuses and (status == 200 or words in sentence)
    assert time.monotonic() - began < 5


def pictures(*sizes):
    """An AVI of JPEGs, each of its own size (width, height); the header states the first one's."""
    target = io.BytesIO()
    with av.open(target, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.pix_fmt, (stream.width, stream.height) = "yuvj420p", sizes[0]
        for i, size in enumerate(sizes):
            picture = io.BytesIO()
            Image.new("RGB", size).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 25)
            container.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize(
    ("last", "status", "sentence"),
    [
        ((1024, 1024), 200, ""),
        ((1026, 1024), 413, "video has a frame of 1026x1024; accepted: 1048576 pixels a frame at most"),
        ((4000, 4000), 400, "video is damaged: decoding fails after 3 frames"),
    ],
)
def test_frames_that_grow(asked, last, status, sentence):
    """The limit holds for each of them; what is far beyond it is not decoded."""
    found, words = asked(post(form(video_part(pictures(*[(48, 32)] * 3, last)))))
    assert found == status and (status == 200 or words.startswith(sentence))


def test_a_length_that_is_stated_and_too_large(asked):
    status, sentence = asked(head(10**12))
    assert status == 413 and sentence == "the video is too large; accepted: 1000000 bytes at most"


def test_a_client_that_asks_before_it_sends(service, asked):
    content = form(CLIP)
    for length, begins in ((len(content), b"HTTP/1.1 100 "), (10**7, b"HTTP/1.1 413 ")):
        with service.connect() as connection:
            connection.sendall(head(length).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
            assert connection.recv(13, MSG_PEEK | MSG_WAITALL) == begins
            if length == len(content):
                while not connection.recv(1024).endswith(b"\r\n\r\n"):
                    pass
                connection.sendall(content)
                assert answer(connection)[0] == 200


def test_a_body_without_a_length_that_is_too_large(asked):
    lines = head("Transfer-Encoding: chunked") + b"%x\r\n" % 10**7 + form(video_part(b""), end=False)[:-2]
    status, sentence = asked(lines, *[bytes(100_000)] * 30)
    assert status == 413 and sentence.startswith("the video is too large")


def test_bytes_around_the_form_count(asked):
    status, _ = asked(head(2_000_000), *[b"\r\n" * 50_000] * 20)
    assert status == 413


def test_a_length_that_is_too_small(asked):
    content = form(CLIP)
    status, sentence = asked(head(len(content) - 60) + content)
    assert status == 400 and sentence.startswith("the form breaks off")


@pytest.mark.parametrize(
    ("pieces", "pause", "reason"), [(40, 0.03, "took more than 0.9 s"), (1, 0.0, "paused for 0.4 s")]
)
def test_an_upload_that_is_slow(asked, pieces, pause, reason):
    content = form(video_part(bytes(100_000)))
    status, sentence = asked(head(len(content)), *[content[:1000]] * pieces, pause=pause)
    assert status == 408 and sentence == f"the upload {reason}; accepted: a faster one, or a smaller video"


def test_a_head_that_does_not_come(service, asked):
    began = time.monotonic()
    with ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(4)]
        beginnings = (b"", b"\r\n", b"GET / HT", b"POST /v1/purify HTTP/1.1\r\nHost: 127.0")
        for connection, content in zip(connections, beginnings, strict=True):
            connection.sendall(content)
        assert all(is_cut(connection, 3) for connection in connections)
    assert time.monotonic() - began < 3


def test_a_head_that_comes_byte_by_byte(service, asked):
    began = time.monotonic()
    with service.connect() as connection:
        try:
            for byte in head(5) * 5:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        except ConnectionError:
            pass
    assert time.monotonic() - began < 3


def test_a_second_head_that_does_not_come(service, asked):
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert answer(connection)[0] == 200
        connection.sendall(b"GET /hea")
        assert is_cut(connection, 3)


@pytest.mark.parametrize(
    "kind",
    ["", "application/json", "application/x-www-form-urlencoded", "video/mp4", "multipart/mixed; boundary=limit"],
)
def test_a_request_without_a_form(asked, kind):
    status, sentence = asked(post(form(CLIP), kind=kind))
    assert status == 415 and sentence.startswith("the request has no form; accepted: multipart/form-data")


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 10_000, '; boundary="\u00e9"'])
def test_a_boundary_that_cannot_be_used(asked, boundary):
    request = head(9, kind=f"multipart/form-data{boundary}".encode().decode("latin-1")) + b"--limit\r\n"
    assert asked(request)[0] == 400


@pytest.mark.parametrize(
    ("parts", "status", "words"),
    [
        ([field_part(b"steps", b"1")], 415, "the form has no video"),
        ([], 415, "the form has no video"),
        ([CLIP, CLIP], 400, "the field video twice"),
        ([CLIP, *[field_part(b"steps", b"1")] * 5000], 400, "the field steps twice"),
        ([field_part(b"x%d" % i, b"1") for i in range(5000)], 400, "a part that is not known"),
        ([(b"X-Long: " + b"x" * 20_000, b"")], 400, ""),
        ([(b"\r\n".join([b"X-Many: x"] * 2000), b"")], 400, ""),
        ([(b"no header at all", b"")], 400, "the form cannot be read"),
        ([(b'Content-Disposition: attachment; name="video"', b"")], 400, "a part that is not known"),
        ([(b"", b"")], 400, ""),
    ],
)
def test_forms_that_are_not_as_they_should_be(asked, parts, status, words):
    found, sentence = asked(post(form(*parts)))
    assert found == status and words in sentence


@pytest.mark.parametrize(
    "name",
    [b"../../../../tmp/evil.mkv", b"/etc/passwd", b"a\0b.mkv", b"con", b"\xff\xfe", b"x" * 3000, b"; rm -rf", b""],
)
def test_names_are_not_used(asked, name):
    status, _ = asked(post(form(video_part(CLIP[1], name))))
    assert status == 200 and not os.path.exists("/tmp/evil.mkv")


def test_half_a_request(service, asked):
    content = form(CLIP)
    gone = service.engine.metrics.gone._value.get()
    with service.connect() as connection:
        connection.sendall(head(len(content)) + content[: len(content) // 2])
        until(lambda: service.kept)
    until(lambda: not service.kept)
    until(lambda: service.engine.metrics.gone._value.get() == gone + 1)


@pytest.mark.parametrize(
    "content", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/1.1 x\r\n\r\n", bytes(range(256)) * 100]
)
def test_what_is_no_http(service, asked, content):
    with service.connect() as connection:
        connection.sendall(content)
        status, sentence = answer(connection)
        assert status is None or (status == 400 and "accepted: HTTP/1.1" in sentence)
        assert is_cut(connection, 3)


def test_a_head_that_is_too_long(asked):
    status, _ = asked(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: " + b"x" * 100_000)
    assert status in (400, None)


def test_two_lengths(asked):
    content = form(CLIP)
    request = head(len(content)).replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n") + content
    assert asked(request)[0] == 400


@pytest.mark.parametrize("tail", [b"garbage\r\n\r\n", b"garbage" * 100_000])
def test_garbage_behind_a_request(service, asked, tail, monkeypatch):
    monkeypatch.setattr(StubStream, "seconds", 0.2)
    with service.connect() as connection:
        connection.sendall(post(form(CLIP)))
        try:
            connection.sendall(tail)
        except ConnectionError:
            pass
        assert answer(connection)[0] in (200, None)
        assert is_cut(connection, 3)


def test_requests_in_a_row_are_answered_in_order(service, asked):
    with service.connect() as connection:
        connection.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        )
        content = b""
        while content.count(b"HTTP/1.1 ") < 2:
            content += connection.recv(65536)
    assert content.index(b"HTTP/1.1 200") < content.index(b"HTTP/1.1 404")


def test_hosts_that_are_not_the_services(asked):
    assert asked(post(form(CLIP), host="evil.example"))[0] == 403
    assert asked(b"GET / HTTP/1.0\r\n\r\n")[0] == 403
    assert asked(b"GET http://127.0.0.1/../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")[0] == 404
    assert asked(b"GET /v1/live/..%2f..%2fetc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")[0] == 404


def test_a_long_head(service, asked):
    for line in (b"X: " + b"x" * 2**14, b"\r\n".join(b"X: %d" % i for i in range(3000))):
        status, *_ = asked(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + line + b"\r\n\r\n")
        assert status in (400, 431)  # by whether it came in one piece
    long = httpx.get(f"{service.address}/healthz", headers={"X": "x" * 2**14})
    assert long.status_code == 431 and "accepted: 16384 bytes" in long.json()["detail"]
    assert httpx.get(f"{service.address}/healthz", headers={"X": "x" * 15000}).status_code == 200


def test_a_socket_of_the_web(asked):
    lines = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n"
    assert asked(b"GET /v1/live/x HTTP/1.1\r\nHost: 127.0.0.1\r\n" + lines + b"\r\n")[0] == 404


def test_a_body_where_there_should_be_none(asked):
    assert asked(head(10**9, path="/healthz", method="GET") + bytes(1000))[0] == 200


def test_two_hundred_at_once(service, asked, clip, monkeypatch):
    monkeypatch.setattr(StubStream, "seconds", 0.02)
    content = post(form(CLIP))

    def ask(_):
        return asked(content)

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 1 + LIMITS.waiting
    assert all(sentence.startswith("the service is busy") for status, sentence in answers if status == 503)
    # Some may have waited for a while to be heard at all: those are answered too.
    assert service.purify(clip).status_code == 200


def test_more_connections_than_there_may_be(service, asked, monkeypatch):
    monkeypatch.setattr(service.server.config.http, "limits", LIMITS._replace(connections=5))
    until(lambda: not service.server.server_state.connections)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(service.connect())
        until(lambda: len(service.server.server_state.connections) == 5)
        assert answer(stack.enter_context(service.connect())) == (
            503,
            "the service has too many connections; try again later",
        )


def test_random_requests(service, asked):
    """Whatever the lines say, the answer is one of ours."""
    draw = random.Random(0)
    body = form(CLIP)
    with httpx.Client(base_url=service.address) as client:
        for _ in range(60):
            method = draw.choice(["GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "X"])
            path = "/" + "".join(draw.choice("abv1/%.;?=\u00e9 ~purify") for _ in range(draw.randrange(12)))
            path = draw.choice([path, "/v1/purify", "/v1/info", "/v1/live/x", "/metrics"])
            names = ["Accept", "Content-Type", "Origin", "Range", "Expect", "If-None-Match", "X-HTTP-Method-Override"]
            headers = {
                draw.choice(names): draw.choice(["*/*", "", "a,b;q=9", "bytes=0-1", "multipart/form-data"])
                for _ in range(2)
            }
            headers.pop("Expect", None)
            content = draw.choice([b"", body, os.urandom(50)])
            response = client.request(method, path, headers=headers, content=content)
            assert response.status_code in (200, 400, 403, 404, 405, 415)
            if response.status_code != 200 and method != "HEAD":
                assert list(response.json()) == ["detail"] and response.headers["x-content-type-options"] == "nosniff"


def test_damaged_forms_end(asked):
    """Cut and changed at random places: never an error of the service."""
    draw, content = random.Random(1), form(CLIP, field_part(b"steps", b"1"))
    for _ in range(30):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 5])):
            place = draw.randrange(300) if draw.random() < 0.7 else draw.randrange(len(damaged))
            damaged[place] = draw.randrange(256)
        damaged = bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        assert asked(post(damaged))[0] in (200, 400, 413, 415)


def test_a_gif_is_a_video(asked, tmp_path):
    """What the bombs are made of is read where it is small."""
    assert asked(post(form(video_part(gif(32, 16, 8)))))[0] == 200
