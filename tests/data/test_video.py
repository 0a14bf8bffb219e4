import contextlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import build_purifier
from hypothesis import given, settings
from hypothesis import strategies as st

from videopure_fast.data import video, video_writer
from videopure_fast.data.video import probe, read_frames, working_size
from videopure_fast.data.video_writer import VideoWriter, check_output
from videopure_fast.streaming import purify_stream
from videopure_fast.windows import window_starts, window_weights

CLIP = Path(__file__).with_name("part_0.mp4")
NTSC = Fraction(30000, 1001)
ENCODERS = {".mp4": "libx264", ".avi": "mpeg4", ".webm": "libvpx-vp9", ".gif": "gif"}


def moving_gradient(frames=12, height=48, width=64):
    """Frames (3, height, width) uint8, smooth in space: a codec keeps them within a few levels."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    for i in range(frames):
        yield (torch.stack([(y + i / 8).sin(), (x - i / 6).cos(), (x + y).sin()]) * 100 + 128).round().to(torch.uint8)


def write(path, frames=12, rate=25, **options):
    with VideoWriter(path, height=48, width=64, rate=rate, **options) as writer:
        for frame in moving_gradient(frames):
            writer.write(frame)
    return path


def add_tone(silent, path, codec, rate=48000):
    """Copy the video of `silent` to `path`, and add a second of sound. Returns the sound's packets."""
    with av.open(str(silent)) as source, av.open(str(path), "w") as target:
        pictures = target.add_stream_from_template(source.streams.video[0])
        sound = target.add_stream(codec, rate=rate)
        sound.layout = "mono"
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                target.mux(packet)
        wave = np.sin(np.arange(rate) / 20).astype(np.float32)[None]
        kind = "flt" if codec == "libopus" else "fltp"
        tone = av.AudioFrame.from_ndarray(wave, format=kind, layout="mono")
        tone.sample_rate, tone.pts = rate, 0
        target.mux(sound.encode(tone))
        target.mux(sound.encode())
    return audio_packets(path)


def audio_packets(path):
    with av.open(str(path)) as container:
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(audio=0) if p.size]


def turn_sideways(path):
    """Give an mp4 the display matrix of a phone held upright: 90 degrees clockwise."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = b"".join(
        value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    )
    path.write_bytes(content)


def encode(path, codec, frames, *, options=None, container_options=None, times=None, size=(48, 64), pixels="yuv420p"):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        (stream.height, stream.width), stream.pix_fmt = size, pixels
        for i, frame in enumerate(moving_gradient(frames, *size)):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            picture.pts, picture.time_base = (times[i] if times else i), Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm", ".gif", ".MP4"])
@pytest.mark.parametrize("rate", [Fraction(25), NTSC, Fraction(12)])
def test_round_trip(tmp_path, suffix, rate):
    path = write(tmp_path / f"clip{suffix}", frames=30, rate=rate)
    found = probe(path)
    assert (found.frames, found.height, found.width, found.has_audio) == (30, 48, 64, False)
    # GIF time stamps are whole hundredths of a second.
    assert found.rate == pytest.approx(rate, rel=0.01 if suffix == ".gif" else 1e-6)
    written = torch.stack(list(moving_gradient(30))).float()
    read = torch.stack(list(read_frames(found, 48))).float()
    assert read.shape == written.shape
    assert (read - written).abs().mean() < 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("suffix", "quality", "sizes", "times"),
    [
        (".mp4", 30, [(32, 48), (64, 64)], 24),  # x264's macroblock tree changed some, by what memory held
        (".mp4", "lossless", [(48, 64)], 4),
        (".avi", None, [(48, 64)], 4),
        (".webm", None, [(48, 64)], 4),
        (".webm", "lossless", [(48, 64)], 4),
        (".gif", None, [(48, 64)], 2),
    ],
)
def test_equal_frames_make_equal_files(tmp_path, suffix, quality, sizes, times):
    """On one core or on all of them, and whatever memory held before."""
    path = tmp_path / f"clip{suffix}"
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}

    def encoded(frames, fill, cores):
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)  # of this thread, and of those that it starts
        junk = [np.full(size, fill, np.uint8) for size in (3000, 40_000, 100_000)]
        del junk
        with VideoWriter(path, height=frames[0].shape[1], width=frames[0].shape[2], rate=25, quality=quality) as writer:
            for frame in frames:
                writer.write(frame)
        return path.read_bytes()

    for height, width in sizes:
        noise = torch.randint(64, (30, 3, height, width), generator=torch.Generator().manual_seed(0))
        smooth = moving_gradient(30, height, width)
        frames = [(frame * 0.75 + more).byte() for frame, more in zip(smooth, noise, strict=True)]
        with ThreadPoolExecutor(1) as pool:
            fills = range(0, 240, 240 // times)
            files = {
                pool.submit(encoded, frames, fill, some).result() for some in (cores, {min(cores)}) for fill in fills
            }
        assert len(files) == 1


def test_probes_the_real_clip():
    found = probe(CLIP)
    assert (found.frames, found.height, found.width, found.rate, found.has_audio) == (32, 256, 340, 30, False)
    assert found.pixel_aspect == Fraction(1024, 765)


def test_reads_at_the_working_size():
    frames = list(read_frames(probe(CLIP), 64))
    assert len(frames) == 32
    assert all(frame.shape == (3, 64, 84) and frame.dtype == torch.uint8 for frame in frames)


def test_keeps_the_pixel_aspect(tmp_path):
    path = write(tmp_path / "out.mp4", source=probe(CLIP))
    assert probe(path).pixel_aspect == Fraction(1024, 765)


@pytest.mark.parametrize(
    "height, width, size, expected",
    [(256, 340, 64, (64, 84)), (340, 256, 64, (84, 64)), (17, 999, 16, (16, 940)), (48, 64, 48, (48, 64))],
)
def test_working_size(height, width, size, expected):
    assert working_size(height, width, size) == expected


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), size=st.integers(8, 64).map(lambda n: 2 * n))
def test_working_size_is_even_and_keeps_the_aspect(height, width, size):
    new_height, new_width = working_size(height, width, size)
    assert min(new_height, new_width) == size
    assert new_height % 2 == new_width % 2 == 0
    scale = size / min(height, width)
    assert abs(new_height - height * scale) <= 1 and abs(new_width - width * scale) <= 1


@pytest.mark.parametrize("size", [0, -64, 14, 65])
def test_working_size_refuses(size):
    with pytest.raises(ValueError, match=f"got {size}"):
        working_size(256, 340, size)


def test_working_size_is_bounded():
    with pytest.raises(ValueError, match="pixels a frame at most"):
        working_size(1, 8000, 224)


def test_odd_sides_are_read(tmp_path):
    path = encode(tmp_path / "odd.mp4", "libx264", 5, size=(35, 51), pixels="yuv444p")
    found = probe(path)
    assert (found.height, found.width) == (35, 51)
    assert [frame.shape for frame in read_frames(found, 34)] == [(3, 34, 50)] * 5


def test_rotation_is_honored(tmp_path):
    path = write(tmp_path / "phone.mp4")
    upright = list(read_frames(probe(path), 48))
    turn_sideways(path)
    found = probe(path)
    assert (found.height, found.width) == (64, 48)
    for turned, frame in zip(read_frames(found, 48), upright, strict=True):
        assert torch.equal(turned, torch.rot90(frame, -1, (1, 2)))


def test_the_median_step_is_the_rate_if_it_varies(tmp_path):
    times = [0, 1, 2, 3, 10, 20, 30, 40, 41, 60]
    path = encode(tmp_path / "varying.mp4", "libx264", 10, times=times)
    assert probe(path).rate == Fraction(25, 7)


def test_the_largest_stream_counts(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = []
        for height, width in ((32, 48), (64, 96)):
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            streams.append(stream)
        for stream, frames in zip(streams, (9, 7), strict=True):
            for frame in moving_gradient(frames, stream.height, stream.width):
                image = frame.permute(1, 2, 0).contiguous().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    found = probe(path)
    assert (found.frames, found.height, found.width, found.stream) == (7, 64, 96, 1)


@pytest.mark.parametrize(
    "codec, suffix, copied",
    [
        ("aac", ".mp4", True),
        ("aac", ".avi", True),
        ("aac", ".webm", False),
        ("aac", ".gif", False),
        ("libopus", ".webm", True),
        ("libopus", ".mp4", True),
    ],
)
def test_sound_is_copied_or_a_warning_given(tmp_path, recwarn, codec, suffix, copied):
    source = tmp_path / "source.mp4"
    sound = add_tone(write(tmp_path / "silent.mp4", frames=25), source, codec)
    found = probe(source)
    assert found.has_audio
    path = write(tmp_path / f"out{suffix}", frames=25, source=found)
    messages = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    if copied:
        assert not messages
        copies = audio_packets(path)
        assert [packet for _, packet in copies] == [packet for _, packet in sound]
        if suffix == ".mp4":
            assert [time for time, _ in copies] == pytest.approx([time for time, _ in sound], abs=1e-3)
    else:
        assert not probe(path).has_audio
        assert len(messages) == 1 and "no sound" in messages[0] and str(source) in messages[0]
    assert probe(path).frames == 25


def test_a_video_may_replace_its_source(tmp_path):
    path = tmp_path / "clip.mp4"
    sound = add_tone(write(tmp_path / "silent.mp4", frames=25), path, "aac")
    found = probe(path)
    with VideoWriter(path, height=48, width=64, rate=found.rate, source=found) as writer:
        for frame in read_frames(found, 48):
            writer.write(255 - frame)
    assert probe(path).frames == 25
    assert len(audio_packets(path)) == len(sound)


def foreign_files(folder):
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{CLIP}\n")
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile {CLIP}\n")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        tone = av.AudioFrame.from_ndarray(np.zeros((2, 4096), np.float32), format="fltp", layout="stereo")
        tone.sample_rate = 48000
        container.mux([*sound.encode(tone), *sound.encode()])


@pytest.mark.parametrize("name", ["text", "random", "empty", "folder", "playlist", "list", "sound"])
def test_foreign_files_are_refused(tmp_path, name):
    foreign_files(tmp_path)
    path = tmp_path / f"{name}.mp4"
    with pytest.raises(ValueError, match="accepted: mp4, avi, gif and webm") as raised:
        probe(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        probe(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_one_frame_is_too_few(tmp_path, suffix):
    with pytest.raises(ValueError, match="has 1 frame; accepted"):
        probe(write(tmp_path / f"still{suffix}", frames=1))


def test_huge_frames_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setattr(video, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(ValueError, match="frames of 48x64; accepted: 1 to 3071 pixels"):
        probe(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm", ".gif"])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    path = write(tmp_path / f"clip{suffix}", frames=50)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="is damaged") as raised:
        probe(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm", ".gif"])
def test_wherever_a_file_breaks_off_no_tenth_of_it_is_missed(tmp_path, suffix):
    path = write(tmp_path / f"clip{suffix}", frames=50)
    content = path.read_bytes()
    for end in range(20, len(content), max(1, len(content) // 25)):
        path.write_bytes(content[:end])
        with contextlib.suppress(ValueError):
            assert probe(path).frames >= 45, end


def test_an_avi_that_went_into_a_pipe_states_no_length(tmp_path):
    class Pipe(io.RawIOBase):
        content = b""

        def write(self, data):
            self.content += bytes(data)
            return len(data)

        def writable(self):
            return True

    pipe = Pipe()
    with av.open(pipe, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in moving_gradient(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")))
        container.mux(stream.encode())
    assert pipe.content[4:8] == b"\xff" * 4
    (tmp_path / "clip.avi").write_bytes(pipe.content)
    assert probe(tmp_path / "clip.avi").frames == 20


def test_a_truncated_mp4_with_its_index_in_front_is_refused(tmp_path):
    path = encode(tmp_path / "clip.mp4", "libx264", 50, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    with pytest.raises(ValueError, match="breaks off"):
        probe(path)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm", ".gif"])
def test_files_damaged_in_the_middle_are_refused(tmp_path, suffix):
    path = write(tmp_path / f"clip{suffix}", frames=50)
    content = bytearray(path.read_bytes())
    middle, length = len(content) // 2, len(content) // 8
    # GIF has no checksum: random bytes in its picture data may decode, zeros never do.
    content[middle : middle + length] = bytes(length) if suffix == ".gif" else np.random.default_rng(3).bytes(length)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        probe(path)


@pytest.mark.parametrize("name", ["out.mkv", "out", "nowhere/out.mp4", "folder.mp4"])
def test_bad_outputs_are_refused(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        check_output(tmp_path / name)
    with pytest.raises(ValueError, match="cannot write"):
        VideoWriter(tmp_path / name, height=48, width=64, rate=25)


@pytest.mark.parametrize("height, width, rate", [(47, 64, 25), (48, 63, 25), (0, 64, 25), (48, 64, 0), (48, 64, -1)])
def test_bad_sizes_and_rates_are_refused(tmp_path, height, width, rate):
    with pytest.raises(ValueError, match="got"):
        VideoWriter(tmp_path / "out.mp4", height=height, width=width, rate=rate)


@pytest.mark.parametrize("frame", [torch.zeros(3, 48, 64), torch.zeros(3, 48, 62, dtype=torch.uint8)])
def test_a_wrong_frame_is_refused_and_nothing_is_left(tmp_path, frame):
    with pytest.raises(ValueError, match="accepted: torch.uint8"):
        with VideoWriter(tmp_path / "out.mp4", height=48, width=64, rate=25) as writer:
            writer.write(frame)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm", ".gif"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, suffix, error):
    path = tmp_path / f"out{suffix}"
    with pytest.raises(error), VideoWriter(path, height=48, width=64, rate=25) as writer:
        for i, frame in enumerate(moving_gradient()):
            if i == 6:
                raise error
            writer.write(frame)
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_older_file(tmp_path):
    path = write(tmp_path / "out.mp4")
    before = path.read_bytes()
    with pytest.raises(RuntimeError), VideoWriter(path, height=48, width=64, rate=25):
        raise RuntimeError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_no_frames_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="no frames"), VideoWriter(tmp_path / "o.mp4", height=48, width=64, rate=25):
        pass
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(video_writer._FORMATS, ".mp4", video_writer._Format("mp4", "nosuchcodec", "yuv420p", {}))
    with (
        pytest.raises(OSError, match="without nosuchcodec"),
        VideoWriter(tmp_path / "out.mp4", height=48, width=64, rate=25),
    ):
        pass
    assert not list(tmp_path.iterdir())


class FakeDecoder:
    """Stands for torchcodec's VideoDecoder: white frames, one less than `frames` if told to disagree."""

    missing = 0

    def __init__(self, source, *, stream_index, seek_mode):
        assert seek_mode == "exact"
        self.found = probe(source)
        assert stream_index == self.found.stream

    def __len__(self):
        return self.found.frames - self.missing

    def __getitem__(self, i):
        return torch.full((3, self.found.height, self.found.width), 255, dtype=torch.uint8)


def test_torchcodec_decodes_where_it_agrees(monkeypatch):
    found = probe(CLIP)
    monkeypatch.setattr(video, "torchcodec_decoder", lambda: FakeDecoder)
    assert all((frame == 255).all() for frame in read_frames(found, 64))
    monkeypatch.setattr(FakeDecoder, "missing", 1)
    frames = list(read_frames(found, 64))
    assert len(frames) == 32 and not (frames[0] == 255).all()


def test_torchcodec_decodes_as_pyav(monkeypatch):
    if video.torchcodec_decoder() is None:
        pytest.skip("torchcodec does not load here")
    found = probe(CLIP)
    frames = torch.stack(list(read_frames(found, 64))).int()
    monkeypatch.setattr(video, "torchcodec_decoder", lambda: None)
    assert (torch.stack(list(read_frames(found, 64))).int() - frames).abs().max() <= 2


class WindowMixer:
    """A stand-in purifier: each result depends on the frame, its place in the window, and the window's mean."""

    def __init__(self, max_frames, overlap):
        self.max_frames = max_frames
        self.config = SimpleNamespace(window_overlap=overlap)

    def __call__(self, window, *, generator=None, callback=None):
        assert window.ndim == 4 and window.dtype == torch.float32 and 0 <= window.min() <= window.max() <= 1
        place = torch.arange(window.shape[1])[:, None, None] / window.shape[1]
        return 0.5 * window + 0.3 * window.mean() + 0.2 * place


def random_frames(n, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


@settings(deadline=None)
@given(data=st.data(), total=st.integers(2, 40), max_frames=st.integers(2, 9))
def test_stream_equals_windows_of_the_whole(data, total, max_frames):
    overlap = data.draw(st.integers(0, max_frames - 1))
    purifier, frames = WindowMixer(max_frames, overlap), random_frames(total)
    length = min(total, max_frames)
    weights = window_weights(length, overlap).double()[:, None, None, None]
    blended, weight_sums = torch.zeros(total, 3, 4, 4, dtype=torch.float64), torch.zeros(total, 1, 1, 1)
    for start in window_starts(total, max_frames, overlap):
        window = slice(start, start + length)
        blended[window] += weights * purifier(frames[window].transpose(0, 1) / 255).transpose(0, 1)
        weight_sums[window] += weights

    handed_out = 0

    def source():
        nonlocal handed_out
        for frame in frames:
            handed_out += 1
            yield frame

    purified = []
    for frame in purify_stream(purifier, source(), total):
        assert handed_out - len(purified) <= max_frames  # bounded memory: nothing is read ahead of its window
        purified.append(frame)
    purified = torch.stack(purified)
    assert purified.shape == frames.shape and purified.dtype == torch.uint8
    # Rounding to uint8 gives half a level of difference; float32 arithmetic gives the rest.
    assert (purified - blended / weight_sums * 255).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("frames", [5, 8, 19])
def test_stream_equals_the_purifier_on_the_whole_clip(frames):
    purifier = build_purifier()
    clip = random_frames(frames, size=18).transpose(0, 1)
    streamed = torch.stack(list(purify_stream(purifier, clip.unbind(1), frames)), 1)
    assert (streamed.int() - purifier(clip).int()).abs().max() <= 1  # a rounding tie at most
    assert (streamed != purifier(clip)).float().mean() < 0.01


@pytest.mark.parametrize("given, message", [(9, "got 9"), (11, "got more")])
def test_stream_refuses_another_number_of_frames(given, message):
    with pytest.raises(ValueError, match=f"expected 10 frames, {message}"):
        list(purify_stream(WindowMixer(4, 1), random_frames(given), 10))


@pytest.mark.parametrize("total, error", [(0, ValueError), (-3, ValueError), (1, ValueError), (4.0, TypeError)])
def test_stream_refuses_a_bad_total_at_once(total, error):
    with pytest.raises(error, match="total must be"):
        purify_stream(WindowMixer(4, 1), random_frames(4), total)


@pytest.mark.parametrize("frames", [random_frames(4).float() / 255, random_frames(4)[:, 0], [None] * 4])
def test_stream_refuses_other_frames(frames):
    with pytest.raises(TypeError, match=r"frame 0 is .*; accepted: torch.uint8 \(3, H, W\)"):
        list(purify_stream(WindowMixer(4, 1), frames, 4))


def test_a_stream_leaves_the_callers_grad_mode_alone():
    frames = purify_stream(WindowMixer(4, 1), random_frames(10), 10)
    next(frames)
    assert torch.is_grad_enabled()


def test_stream_hands_its_callbacks_on():
    calls = []
    purifier = build_purifier()
    frames = random_frames(9, size=16)
    list(purify_stream(purifier, frames, 9, callback=lambda *call: calls.append(call[:3])))
    assert len(calls) == 2 * 2 * 2  # windows, walks, evaluations
