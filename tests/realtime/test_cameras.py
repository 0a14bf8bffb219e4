import os
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from realtime_fakes import FakeCamera, datagrams, gray, sends, video_bytes

from videopure_fast.data.picture import upright
from videopure_fast.data.video import resized
from videopure_fast.realtime import cameras
from videopure_fast.realtime.cameras import Camera, check_source, listed_sources, source_name
from videopure_fast.realtime.ring import Ring

CLIP = Path(__file__).parents[1] / "data" / "part_0.mp4"
SHORT = 0.3  # seconds without data after which a camera of these tests is gone


@pytest.fixture(autouse=True)
def quick_returns(monkeypatch):
    monkeypatch.setattr(cameras, "_FIRST_WAIT", 0.02)


def frame(value, size=16):
    return torch.full((3, size, size), value, dtype=torch.uint8)


def fill(ring, count, start=0):
    for i in range(start, start + count):
        ring.push(frame(i), float(i))


def values(clip):
    return clip.frames[0, :, 0, 0].tolist()


def watched(source, until, *, window=4, hop=4, size=16, timeout=SHORT, limit=8.0, **options):
    """Clips of a camera until a condition of (camera, clips) holds, its final status, and its states with reasons."""
    clips, states = [], []
    with Camera(
        source, window=window, hop=hop, size=size, timeout=timeout, notify=lambda *s: states.append(s), **options
    ) as camera:
        camera.ring._lossless = True  # the frames of a burst are not dropped, however busy the machine is
        end = time.monotonic() + limit
        while not until(camera, clips) and not camera.ring.exhausted:
            assert time.monotonic() < end, (camera.status, states, len(clips))
            if clip := camera.ring.take(0.02):
                clips.append(clip)
    return clips, camera.status, states


def numbers(clip):
    """The numbers that a fake camera gave to the frames of a clip."""
    return np.round((clip.frames.float().mean((0, 2, 3)).numpy() - gray(0)) / (gray(1) - gray(0))).astype(int).tolist()


# The ring


def test_a_clip_whenever_hop_new_frames_have_come():
    ring, clips = Ring(4, 2), []
    for i in range(9):
        ring.push(frame(i), i / 10)
        while clip := ring.take(0):
            clips.append(clip)
    assert [values(clip) for clip in clips] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert [clip.first for clip in clips] == [0, 2, 4] and clips[1].times == (0.2, 0.3, 0.4, 0.5)
    assert clips[0].frames.shape == (3, 4, 16, 16) and clips[0].frames.dtype == torch.uint8
    assert (ring.frames, ring.dropped) == (9, 0)


def test_of_too_many_new_frames_the_newest_are_a_clip_and_the_others_are_counted():
    ring = Ring(4, 2)
    fill(ring, 11)
    assert values(ring.take(0)) == [7, 8, 9, 10] and ring.dropped == 7
    assert ring.take(0) is None


def test_the_last_clip_is_aligned_to_the_end_of_its_segment():
    ring = Ring(4, 3)
    fill(ring, 5)
    assert values(ring.take(0)) == [1, 2, 3, 4]  # taken late: it has the newest
    ring.push(frame(5), 5.0)
    ring.end()
    clip = ring.take(0)
    assert values(clip) == [2, 3, 4, 5] and clip.segment == 0 and ring.segment == 1
    fill(ring, 4, start=6)
    clip = ring.take(0)
    assert values(clip) == [6, 7, 8, 9] and clip.segment == 1 and ring.dropped == 1


@pytest.mark.parametrize("short", [False, True])
def test_a_segment_shorter_than_a_window(short):
    ring = Ring(4, 4)
    fill(ring, 3)
    ring.end(short=short)
    clip = ring.take(0)
    assert (values(clip) == [0, 1, 2] and ring.dropped == 0) if short else (clip is None and ring.dropped == 3)


def test_a_lossless_ring_waits_for_its_clips_to_be_taken():
    ring, clips = Ring(4, 3, lossless=True), []

    def write():
        fill(ring, 12)
        ring.end()
        ring.close()

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.05)
    assert ring.frames == 4
    while not ring.exhausted:
        if clip := ring.take(1):
            clips.append(clip.first)
    writer.join(5)
    assert clips == [0, 3, 6, 8] and ring.dropped == 0


def test_take_returns_when_it_is_woken_or_the_ring_is_closed():
    ring = Ring(4, 4)
    for act in (ring.wake, ring.close):
        threading.Timer(0.02, act).start()
        started = time.monotonic()
        assert ring.take(5) is None and time.monotonic() - started < 2
    started = time.monotonic()
    assert ring.take(0.05) is None and time.monotonic() - started > 0.04  # a closed ring is not asked in a hurry


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6), st.data())
def test_every_frame_is_in_a_clip_or_counted(window, data):
    ring = Ring(window, data.draw(st.integers(1, window)))
    seen, pushed, kinds, kind = set(), 0, {}, 0
    for act in data.draw(st.lists(st.sampled_from(["push"] * 6 + ["take", "take", "end"]), max_size=80)):
        if act == "push":
            ring.push(frame(pushed), float(pushed))
            kinds[pushed] = kind
            pushed += 1
        elif act == "end":
            ring.end(short=kind % 2 == 0)
            kind += 1
        elif clip := ring.take(0):
            held = range(clip.first, clip.first + len(clip.times))
            assert values(clip) == list(held) and clip.times == tuple(map(float, held))
            assert len({kinds[number] for number in held}) == 1
            seen.update(held)
    ring.end()
    if clip := ring.take(0):
        seen.update(range(clip.first, clip.first + len(clip.times)))
    assert ring.frames == pushed and len(seen) + ring.dropped == pushed


@pytest.mark.parametrize("window, hop", [(1, 1), (4, 0), (4, 5)])
def test_bad_windows(window, hop):
    with pytest.raises(ValueError, match="window|hop"):
        Ring(window, hop)


# Names


@pytest.mark.parametrize(
    "source, name",
    [
        ("clip.mp4", "clip.mp4"),
        ("rtsp://host:554/live?channel=1&subtype=0", "rtsp://host:554/live?channel=1&subtype=0"),
        ("rtsp://user:secret@host/live", "rtsp://***@host/live"),
        ("rtsp://secret@host", "rtsp://***@host"),
        ("RTSP://u:se@cret/p?a@host/live", "RTSP://***@host/live"),
        ("http://host/video?token=secret&channel=2", "http://host/video?token=***&channel=2"),
        ("http://host/video?a=1;PassWord=secret", "http://host/video?a=***;PassWord=***".replace(";", "&")),
        ("http://host/video?secret", "http://host/video?***"),
        ("http://host/video?channel=secret@+/=", "http://***@+/="),
        ("http://host/video?channel=verylongsecret", "http://host/video?channel=***"),
        ("https://host/video#secret", "https://host/video#***"),
        ("rtsp:/user:secret@host/live", "rtsp:/***@host/live"),
        ("user:secret@host/live", "***@host/live"),
        ("me@home/clip.mp4", "me@home/clip.mp4"),
        ("rtsp://host/\x1b[2J\n", "rtsp://host/?[2J?"),
    ],
)
def test_names_have_no_passwords(source, name):
    assert source_name(source) == name


@pytest.mark.parametrize(
    "source, message",
    [
        ("ftp://user:secret@host/x", r"ftp://\*\*\*@host/x cannot be watched: accepted are files"),
        ("concat:a|b", "there is no file"),
        ("file:///etc/passwd", "cannot be watched"),
        ("rtsp://user:secret@host/a b", r"address rtsp://\*\*\*@host/a b has characters"),
        (
            "http://[::1",
            r"address http://\[::1 has no host and port that can be; accepted: http://HOST or HOST:PORT, an",
        ),
        ("rtsp://user:secret@", r"address rtsp://\*\*\*@ has no host"),
        ("rtsp://user:se/cret@host:554/", r"address rtsp://\*\*\*@host:554/ has no host.*password as %2F %3F %23"),
        ("rtsp://::1:554/", "has no host"),
        ("rtsp://host:0/", "has no host"),
        ("https://host:port/", "has no host"),
        ("udp://0.0.0.0:99999", "accepted: udp://HOST:PORT, an IPv6 host in brackets"),
        ("tcp://host/live", "accepted: tcp://HOST:PORT"),
        ("absent.mp4", "there is no file absent.mp4"),
        ("", "a source is empty"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        check_source(source)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "rtsp://user:a@b:c@host/live?x=a@b",
        "http://[fe80::1%br-lan.1]:80",
        "HTTP://host",
        "udp://@:1234",
        "tcp://:1?listen",
    ],
)
def test_addresses_of_every_form(source):
    assert not check_source(source)


def test_sources_may_be_listed_in_a_file(tmp_path):
    listed = tmp_path / "cameras.txt"
    listed.write_text("# the yard\nrtsp://user:secret@yard/live\n\n  b c.mp4  \n")
    assert listed_sources(["a.mp4", f"@{listed}"]) == ["a.mp4", "rtsp://user:secret@yard/live", "b c.mp4"]
    listed.write_text("# none yet\n")
    with pytest.raises(ValueError, match="lists no source"):
        listed_sources([f"@{listed}"])
    with pytest.raises(FileNotFoundError):
        listed_sources(["@" + str(tmp_path / "none.txt")])


def test_playlists_are_no_sources(tmp_path):
    for name, text in (
        ("list.m3u8", f"#EXTM3U\n#EXTINF:1,\n{CLIP}\n"),
        ("list.txt", f"ffconcat version 1.0\nfile {CLIP}"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="damaged or not a video"):
            check_source(str(tmp_path / name))


# Files


def test_a_file_comes_at_its_own_pace_and_ends(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(video_bytes(10, step=30, kind="matroska"))
    started = time.monotonic()
    clips, status, states = watched(str(path), lambda *_: False, hop=3)
    assert [clip.first for clip in clips] == [0, 3, 6] and [numbers(clip)[0] for clip in clips] == [0, 3, 6]
    assert status.state == "ended" and status[1:] == (10, 0, 0, 0, None)
    assert [state for state, _ in states] == ["opening", "live", "ended"]
    times = [*clips[0].times, *clips[1].times[1:], *clips[2].times[1:]]
    assert all(time - started > 0.03 * i - 0.001 for i, time in enumerate(times))  # none is early


@pytest.mark.parametrize(
    "stamps, due",
    [
        ([5.0, 5.1, 5.3], [100, 100.1, 100.3]),
        ([None, None, 7.0], [100, 100.04, 100.08]),  # at the usual rate
        ([0.0, 9000.0, 9000.5], [100, 100.04, 100.54]),  # a leap is not waited for
        ([50.0, 3.0, 3.2], [100, 100.04, 100.24]),  # nor is time turned back
    ],
)
def test_time_stamps_of_files(stamps, due):
    pace = cameras._Pace(lambda: 100.0, 0)
    assert [pace.due(stamp) for stamp in stamps] == pytest.approx(due)


def test_a_short_file_is_one_clip(tmp_path):
    path = tmp_path / "a.mkv"
    path.write_bytes(video_bytes(3, kind="matroska"))
    clips, status, _ = watched(str(path), lambda *_: False)
    assert [clip.frames.shape[1] for clip in clips] == [3] and status.dropped == 0


# Cameras and their faults


def test_a_camera_that_goes_away_comes_back():
    with FakeCamera(sends(video_bytes(6))) as server:
        clips, status, states = watched(f"tcp://127.0.0.1:{server.port}", lambda camera, clips: len(clips) >= 4)
    assert status.losses >= 1 and ("waiting", "it ended") in states
    by_segment = {clip.segment: numbers(clip) for clip in clips}
    # The last clip of each connection is aligned to its end.
    assert len(by_segment) >= 2 and all(found[-1] in (3, 5) for found in by_segment.values())
    assert all(clip.frames.shape == (3, 4, 16, 24) for clip in clips)


def test_a_camera_that_stalls_is_opened_anew():
    with FakeCamera(sends(video_bytes(6), then=60), sends(video_bytes(8))) as server:
        _, status, states = watched(
            f"tcp://127.0.0.1:{server.port}", lambda camera, clips: clips and clips[-1].segment > 0
        )
    assert ("waiting", f"no data for {SHORT:g} s") in states and status.losses >= 1


def test_a_camera_that_never_answers_is_left_and_tried_again():
    with FakeCamera(lambda connection: connection.recv(1)) as server:
        _, status, states = watched(f"tcp://127.0.0.1:{server.port}", lambda camera, _: camera.status.losses > 0)
    assert status.frames == 0 and ("waiting", f"no data for {SHORT:g} s") in states


def test_refused_connections_are_tried_at_growing_intervals(monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waits.append(seconds) or False)
    monkeypatch.setattr(cameras, "_FIRST_WAIT", 0.5)
    camera = Camera("rtsp://user:secret@127.0.0.1:9/live", window=4, hop=4, size=16)
    monkeypatch.setattr(cameras, "_open_camera", refuse_until(camera, 9))
    camera._run()
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30] and camera.status.losses == 8


def refuse_until(camera, count):
    calls = []

    def opened(source, timeout):
        calls.append(source)
        if len(calls) == count:
            camera.stop()
        raise_refused = av.error.ConnectionRefusedError(111, "Connection refused", source)
        return Raising(raise_refused)

    return opened


class Raising:
    def __init__(self, error):
        self.error = error

    def __enter__(self):
        raise self.error

    def __exit__(self, *_error):
        pass


def test_garbage_is_no_video():
    noise = np.random.default_rng(0).bytes(100_000)
    with FakeCamera(sends(noise), sends(noise), sends(video_bytes(6))) as server:
        clips, status, states = watched(f"tcp://127.0.0.1:{server.port}", lambda camera, clips: len(clips) >= 1)
    assert status.losses >= 2 and numbers(clips[0])[-1] in (3, 5)
    assert all(reason for state, reason in states if state == "waiting")


@pytest.mark.parametrize("lost", [8, 3, 2])
def test_damaged_frames_are_counted_and_in_no_clip(lost):
    """What comes is bit for bit what an intact stream has: nothing is concealed, or predicted from what is missing."""
    content = video_bytes(24, height=64, width=96, noise=True)
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    for at in range(len(packets) // lost, len(packets), len(packets) // 4):
        packets[at] = b""
    found = {}
    for name, sent in (("intact", content), ("damaged", b"".join(packets))):
        with FakeCamera(sends(sent)) as server:
            url = f"tcp://127.0.0.1:{server.port}"
            clips, status, _ = watched(url, lambda camera, _: camera.status.losses > 0, window=2, hop=1, size=64)
        found[name] = {frame.numpy().tobytes() for clip in clips for frame in clip.frames.unbind(1)}, status
    assert found["intact"][1].damaged == 0 and len(found["intact"][0]) == 24
    assert found["damaged"][1].damaged > 0 and 3 < len(found["damaged"][0]) < 23
    assert found["damaged"][0] <= found["intact"][0]


def test_a_camera_that_changes_its_size_starts_a_segment():
    content = (
        video_bytes(9) + video_bytes(9, height=48, width=32, start=9) + video_bytes(9, height=64, width=96, start=18)
    )
    with FakeCamera(sends(content)) as server:
        clips, status, _ = watched(f"tcp://127.0.0.1:{server.port}", lambda camera, _: camera.status.losses > 0, hop=1)
    shapes = {}
    for clip in clips:
        shapes.setdefault(clip.segment, tuple(clip.frames.shape[2:]))
        assert tuple(clip.frames.shape[2:]) == shapes[clip.segment]
        assert max(numbers(clip)) - min(numbers(clip)) < 9
    assert status.frames + status.damaged == 27 and list(shapes.values()) == [(16, 24), (24, 16), (16, 24)]


@pytest.mark.parametrize("step", [1, 20_000])
def test_a_camera_that_lies_about_its_rate(step):
    """Its time stamps say 1000 frames a second, or three a minute; its frames count when they come."""
    started = time.monotonic()
    with FakeCamera(sends(video_bytes(12, step=step))) as server:
        clips, status, _ = watched(f"tcp://127.0.0.1:{server.port}", lambda camera, _: camera.status.losses > 0)
    assert status.frames == 12 and clips
    for clip in clips:
        assert list(clip.times) == sorted(clip.times) and started < clip.times[0] and clip.times[-1] < time.monotonic()


def test_data_without_pictures_is_no_live_camera():
    """Sound alone keeps the connection busy."""

    def behave(connection):
        connection.sendall(picture)
        for _ in range(200):
            connection.sendall(sound)
            if server.closing.wait(0.02):
                return

    picture, sound = with_sound()
    with FakeCamera(behave) as server:
        _, status, states = watched(f"tcp://127.0.0.1:{server.port}", lambda camera, _: camera.status.losses > 0)
    assert ("waiting", f"no picture for {SHORT:g} s") in states and status.frames > 0


def with_sound():
    """The start of a transport stream of pictures and sound, and sound that can be sent after it, again and again."""
    import io

    target = io.BytesIO()
    with av.open(target, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options={"tune": "zerolatency"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        track = container.add_stream("mp2", rate=48000)
        for i in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), 50 * i, np.uint8), "rgb24")))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48000), np.int16), format="s16", layout="stereo")
        samples.sample_rate = 48000
        container.mux(track.encode(samples))
    content = target.getvalue()
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    sound = [packet for packet in packets if (packet[1] & 0x1F, packet[2]) == (1, 1)]
    return content, b"".join(sound[:40])


@pytest.mark.parametrize(
    "sides, window, message",
    [
        ((8192, 8192), 4, "it sends frames of 8192x8192; accepted"),
        ((16, 16384), 4, None),
        ((16, 900_000), 4, "become 900000x16, 4 a clip; accepted: 1048576 pixels a frame"),
        ((1000, 1000), 4, None),
        ((1000, 1000), 1000, "1000 a clip; accepted"),
    ],
)
def test_frames_that_are_too_large(sides, window, message):
    size = min(sides)
    if message is None:
        assert cameras._checked_size(sides, size, window) == sides
        return
    with pytest.raises(ValueError, match=message):
        cameras._checked_size(sides, size, window)


def test_too_large_frames_are_a_fault_of_the_camera(monkeypatch):
    monkeypatch.setattr(cameras, "MAX_PIXELS", 40 * 40)
    with FakeCamera(sends(video_bytes(6, height=64, width=64)), sends(video_bytes(6))) as server:
        clips, status, states = watched(f"tcp://127.0.0.1:{server.port}", lambda camera, clips: clips)
    assert clips and status.losses >= 1 and states[1][0] == "waiting" and states[1][1]


@pytest.mark.parametrize("turn", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, 1)])
@pytest.mark.parametrize("shape", [(64, 96), (16, 24), (80, 120)])
def test_frames_are_resized_as_those_of_files(turn, shape):
    """Within a few levels: another library does it, whose filter is alike."""
    y, x = np.mgrid[:64, :96]
    picture = np.stack([x * 2, y * 3, (x + y) % 64 * 2 + 60], -1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    shape = shape if turn[0] else shape[::-1]
    found, expected = upright(frame, turn, shape), resized(upright(frame, turn), shape)
    assert found.shape == expected.shape == (3, *shape)
    assert (found.int() - expected.int()).abs().float().mean() < 2


# Addresses that name other addresses


def http(content, kind="video/mp2t", status="200 OK", more=""):
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n"
    return sends(head.encode() + content)


def test_a_camera_by_http():
    with FakeCamera(http(video_bytes(6)), asks=True) as server:
        clips, _, _ = watched(f"http://user:secret@127.0.0.1:{server.port}/live", lambda camera, clips: clips)
    assert numbers(clips[0])[-1] in (3, 5) and server.asked[0].startswith("GET /live")


def test_motion_jpeg_by_http():
    content = video_bytes(12, kind="mpjpeg", codec="mjpeg").replace(b"--ffmpeg--", b"")
    kind = "multipart/x-mixed-replace;boundary=ffmpeg"
    with FakeCamera(http(20 * content, kind=kind), asks=True) as server:
        clips, _, _ = watched(f"http://127.0.0.1:{server.port}/video", lambda camera, clips: len(clips) > 2)
    assert [numbers(clip) for clip in clips[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_camera_by_udp():
    with datagrams(video_bytes(40)) as port:
        clips, status, _ = watched(f"udp://127.0.0.1:{port}", lambda camera, clips: len(clips) > 2, timeout=1)
    assert status.losses == 0 and all(numbers(clip) == sorted(numbers(clip)) for clip in clips[:1])


@pytest.mark.parametrize("scheme", ["http", "tcp"])
@pytest.mark.parametrize("kind", ["playlist", "redirect"])
def test_nothing_else_is_opened(scheme, kind):
    with FakeCamera(http(video_bytes(6)), asks=True) as other:
        elsewhere = f"http://127.0.0.1:{other.port}/other.ts"
        if kind == "playlist":
            content = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n{elsewhere}\n#EXTINF:1,\n{CLIP}\n".encode()
            behave = http(content, kind="application/vnd.apple.mpegurl")
        else:
            behave = http(b"", status="302 Found", more=f"Location: {elsewhere}\r\n")
        with FakeCamera(behave) as server:
            clips, status, _ = watched(
                f"{scheme}://127.0.0.1:{server.port}/live.m3u8", lambda camera, _: camera.status.losses > 0
            )
    assert not clips and not other.asked and status.frames == 0


# Passwords


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp"])
def test_passwords_are_in_no_reason(scheme):
    with FakeCamera(sends(b"\0" * 100)) as server:
        ports = (server.port, 9)
        for port in ports:
            source = f"{scheme}://user:secret@127.0.0.1:{port}/live?token=secret"
            _, status, states = watched(source, lambda camera, _: camera.status.losses > 0)
            reasons = [reason for _, reason in states if reason]
            assert reasons and "secret" not in "".join(reasons) + str(status)


def test_an_rtsp_camera_that_does_not_answer():
    with FakeCamera(lambda connection: connection.recv(10**6) and server.closing.wait(60)) as server:
        started = time.monotonic()
        _, _, states = watched(f"rtsp://127.0.0.1:{server.port}/live", lambda camera, _: camera.status.losses > 0)
    assert time.monotonic() - started < 4 and states[1][0] == "waiting" and states[1][1]


# Devices


class FakeDevice:
    """A container that has frames only now and then, as a USB camera that is read without waiting, and then none."""

    def __init__(self, path, count):
        self._container, self._left = av.open(str(path)), count
        self.streams = self._container.streams
        self._packets = self._container.demux()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._container.close()

    def demux(self):
        if self._left:
            self._left -= 1
            yield next(self._packets)
        raise av.error.BlockingIOError(11, "Resource temporarily unavailable")


def test_a_device_is_polled_and_left_when_it_stalls(monkeypatch, tmp_path):
    path, opened, real = tmp_path / "a.ts", [], av.open
    path.write_bytes(video_bytes(6))

    def fake(source, **options):
        if source != "/dev/null":
            return real(source, **options)
        opened.append(options)
        return FakeDevice(path, 6)

    monkeypatch.setattr(av, "open", fake)
    with pytest.raises(ValueError, match="/dev/null is not a file"):
        check_source("/dev/null")
    monkeypatch.setattr(cameras, "_CAMERA_DEVICE", os.major(os.stat("/dev/null").st_rdev))
    clips, status, states = watched("/dev/null", lambda camera, _: camera.status.losses > 0)
    assert opened[0]["format"] == "v4l2" and opened[0]["options"] == {"fflags": "nonblock"}
    assert [numbers(clip) for clip in clips][0] == [0, 1, 2, 3] and status.frames == 6
    assert ("waiting", f"no picture for {SHORT:g} s") in states


def test_a_reader_that_is_held_is_noticed(monkeypatch):
    """By a look-up of a name, a driver or a file system that no timeout reaches."""
    release = threading.Event()

    def held(*_given):
        release.wait(20)
        raise ValueError("it is back")

    monkeypatch.setattr(cameras, "_open_camera", held)
    with Camera("rtsp://nowhere/live", window=4, hop=4, size=16, timeout=0.05) as camera:
        assert camera.status.state == "opening"
        time.sleep(0.2)
        assert camera.status.state == "waiting" and "has been held for" in camera.status.reason
        release.set()
        time.sleep(0.1)
        assert camera.status.losses and camera.status.reason == "it is back"


def test_what_nobody_foresaw_ends_the_camera_in_the_open(monkeypatch):
    def broken(*_given):
        raise KeyError("tcp://127.0.0.1:1/?token=secret")

    monkeypatch.setattr(cameras, "_open_camera", broken)
    _, status, _ = watched("tcp://127.0.0.1:1/?token=secret", lambda *_: False)
    assert status.state == "failed" and status.reason.startswith("KeyError") and "secret" not in status.reason
