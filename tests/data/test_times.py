"""Times of pictures and of sound: read from any container, and kept by every format that can."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from media_files import audio_packets, encode, remux

from videopure_fast.data import video as video_module
from videopure_fast.data.timing import MISSING, FrameClock, median_rate, ordered
from videopure_fast.data.video import probe, read_frames
from videopure_fast.data.video_writer import VideoWriter

MS = Fraction(1, 1000)
STEADY = [40 * i for i in range(20)]
# A second of 10 frames a second, then a second of 30.
VARYING = [100 * i for i in range(10)] + [1000 + round(1000 * i / 30) for i in range(30)]


def rewrite(video, path):
    """Write a video's frames to `path`. Returns what `probe` finds there, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VideoWriter(path, height=48, width=64, rate=video.rate, source=video) as writer:
            for frame in read_frames(video, 48):
                writer.write(frame)
    return probe(path), [str(warning.message) for warning in caught]


def writing_nothing():
    return pytest.raises(ValueError, match="no frames")


def seconds(video):
    """Times of a video's frames, counted from the first."""
    return (video.stamps - video.stamps[0]) * float(video.time_base)


def offset(video):
    """Seconds from the first picture to the first packet of sound."""
    return audio_packets(video.path)[0][0] - float(video.start)


@pytest.mark.parametrize("source", [".mp4", ".mkv", ".webm", ".ts", ".mov"])
@pytest.mark.parametrize("suffix, tolerance", [(".mp4", 1e-5), (".webm", 6e-4), (".gif", 5.1e-3)])
def test_a_varying_rate_is_kept(tmp_path, source, suffix, tolerance):
    video = probe(encode(tmp_path / f"varying{source}", times=VARYING, sound=None))
    assert float(video.rate) == pytest.approx(30, rel=0.02)
    assert seconds(video) == pytest.approx(np.array(VARYING) / 1000, abs=1e-3)
    written, messages = rewrite(video, tmp_path / f"out{suffix}")
    assert written.frames == 40 and not messages
    assert seconds(written) == pytest.approx(seconds(video), abs=tolerance)


def test_sound_stays_beside_pictures_of_a_varying_rate(tmp_path):
    video = probe(encode(tmp_path / "varying.mp4", times=VARYING, sound="aac"))
    written, messages = rewrite(video, tmp_path / "out.mp4")
    assert not messages and seconds(written)[10] == pytest.approx(1, abs=1e-4)
    sound, copied = audio_packets(video.path), audio_packets(written.path)
    assert [time for time, _ in copied] == pytest.approx([time for time, _ in sound], abs=1e-3)


def test_avi_warns_of_the_largest_shift(tmp_path):
    video = probe(encode(tmp_path / "varying.mp4", times=VARYING))
    written, messages = rewrite(video, tmp_path / "out.avi")
    assert written.frames == 40 and written.rate == video.rate == 30
    # At 30 frames a second, the 11th picture is shown after a third of a second, not after one.
    assert len(messages) == 1 and "move by up to 0.667 s" in messages[0] and "avi is constant" in messages[0]


def test_a_steady_rate_is_written_to_avi_without_a_warning(tmp_path):
    for name, times in (
        ("ms.mkv", [round(1001 * i / 30) for i in range(40)]),
        ("waver.mp4", [t + t % 3 for t in STEADY]),
    ):
        assert not rewrite(probe(encode(tmp_path / name, times=times)), tmp_path / "out.avi")[1]


def test_sound_with_priming_moves_no_pictures_of_an_avi(tmp_path):
    video = probe(encode(tmp_path / "clip.mkv", times=STEADY, sound="aac"))
    assert offset(video) < 0
    written, messages = rewrite(video, tmp_path / "out.avi")
    assert not messages and written.start == 0 and seconds(written) == pytest.approx(seconds(video))
    assert len(audio_packets(written.path)) == len(audio_packets(video.path))


def test_times_are_those_of_the_source_only_at_its_rate(tmp_path):
    video = probe(encode(tmp_path / "varying.mp4", times=VARYING))
    with VideoWriter(tmp_path / "out.mp4", height=48, width=64, rate=10, source=video) as writer:
        for frame in read_frames(video, 48):
            writer.write(frame)
    assert seconds(probe(tmp_path / "out.mp4")) == pytest.approx(np.arange(40) / 10)


def test_frames_beyond_those_of_the_source_follow_at_its_rate(tmp_path):
    video = probe(encode(tmp_path / "short.mp4", times=[0, 100, 140]))
    with VideoWriter(tmp_path / "out.mp4", height=48, width=64, source=video) as writer:
        for frame in [*read_frames(video, 48)] * 2:
            writer.write(frame)
    times = seconds(probe(tmp_path / "out.mp4"))
    assert times[:3] == pytest.approx([0, 0.1, 0.14]) and np.diff(times[3:]) == pytest.approx(
        1 / float(video.rate), 1e-3
    )


def test_a_rate_is_needed_without_a_source(tmp_path):
    with pytest.raises(ValueError, match="rate must be given"):
        VideoWriter(tmp_path / "out.mp4", height=48, width=64)


@pytest.mark.parametrize(
    "suffix, start",
    [(suffix, start) for suffix in (".mkv", ".webm", ".ts", ".mp4") for start in (400, 40000)] + [(".mkv", -400)],
)
def test_pictures_may_start_late_or_early(tmp_path, suffix, start):
    steady = encode(tmp_path / f"steady{'.webm' if suffix == '.webm' else '.mp4'}", times=STEADY)
    video = probe(remux(steady, tmp_path / f"late{suffix}", [time + start for time in STEADY]))
    assert (video.frames, video.rate) == (20, 25)
    assert float(video.start) == pytest.approx(start / 1000, abs=1e-3)
    written, messages = rewrite(video, tmp_path / "out.mp4")
    assert written.start == 0 and not messages and seconds(written) == pytest.approx(seconds(video))


def test_a_truncated_late_track_is_refused(tmp_path):
    path = encode(tmp_path / "late.mkv", times=[time + 2000 for time in STEADY], noise=True)
    assert probe(path).start == 2
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 7 // 10])
    with pytest.raises(ValueError, match="is damaged"):
        probe(path)


def test_reordered_time_stamps_are_sorted(tmp_path):
    # AVI stores the order of decoding: stamps of B-frames come out shuffled, and the last is not the latest.
    options = {"bf": "3", "x264-params": "b-pyramid=normal:scenecut=0:b-adapt=0"}
    video = probe(encode(tmp_path / "b.avi", times=[40 * i for i in range(60)], codec="libx264", options=options))
    assert (video.frames, video.rate) == (60, 25)
    assert (np.diff(seconds(video)) > 0).all() and seconds(video) == pytest.approx(np.arange(60) / 25)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_bogus_last_time_stamp_changes_no_rate(tmp_path, suffix):
    steady = encode(tmp_path / "steady.mp4", times=STEADY)
    video = probe(remux(steady, tmp_path / f"bogus{suffix}", [*STEADY[:-1], 3600_000]))
    assert (video.frames, video.rate) == (20, 25)
    for name in ("out.mp4", "out.webm", "out.gif"):
        written, messages = rewrite(video, tmp_path / name)
        assert (written.frames, written.rate) == (20, 25)
        assert seconds(written)[:-1] == pytest.approx(seconds(video)[:-1])
        assert len(messages) == (name == "out.gif")  # its longest delay is 655 s


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_bogus_last_duration_changes_no_rate(tmp_path, suffix):
    steady = encode(tmp_path / "steady.mp4", times=STEADY)
    video = probe(remux(steady, tmp_path / f"hour{suffix}", STEADY, last=3600_000))
    assert (video.frames, video.rate, video.last_duration) == (20, 25, 3600)
    written, messages = rewrite(video, tmp_path / "out.mp4")
    assert written.rate == 25 and not messages and seconds(written) == pytest.approx(seconds(video))


@pytest.mark.parametrize("suffix", [".webm", ".gif"])
def test_the_last_frame_is_shown_as_long_as_before(tmp_path, suffix):
    steady = encode(tmp_path / "steady.mp4", times=STEADY)
    video = probe(remux(steady, tmp_path / "long.mkv", STEADY, last=2000))
    assert rewrite(video, tmp_path / f"out{suffix}")[0].last_duration == 2


def test_repeated_time_stamps_keep_all_frames(tmp_path):
    steady = encode(tmp_path / "steady.mp4", times=STEADY)
    video = probe(remux(steady, tmp_path / "repeated.mkv", [0, 40, 40, 40, *STEADY[4:]]))
    assert video.frames == 20 and video.rate == 25
    assert video.stamps.tolist() == [0, 40, 41, 42, *STEADY[4:]]
    written, _ = rewrite(video, tmp_path / "out.mp4")
    assert written.frames == 20 and seconds(written) == pytest.approx(seconds(video), abs=1e-4)


def test_times_of_centuries_are_refused(tmp_path):
    steady = encode(tmp_path / "steady.mp4", times=STEADY)
    path = remux(steady, tmp_path / "far.mkv", [*STEADY[:-1], 10**14])
    with pytest.raises(ValueError, match="its time stamps exceed 10000000000 s"):
        probe(path)


@pytest.mark.parametrize(
    "stamps, base, expected, expected_base",
    [
        ([3, 1, 2, 0], MS, [0, 1, 2, 3], MS),
        ([5, 5, 5, 9], MS, [5, 6, 7, 9], MS),
        ([0, 1, 1, 2], Fraction(1, 25), [0, 40, 41, 80], MS),
        ([0, 0, 1, 1], Fraction(1, 90000), [0, 1, 2, 3], Fraction(1, 90000)),
        ([MISSING] * 3, MS, [0, 1, 2], Fraction(1, 20)),
        ([MISSING, 200, MISSING, MISSING, 400], MS, [150, 200, 250, 300, 400], MS),
        ([-7, MISSING], MS, [-7, 43], MS),
    ],
)
def test_order(stamps, base, expected, expected_base):
    found, time_base = ordered(np.array(stamps), base, Fraction(20))
    assert (found.tolist(), time_base) == (expected, expected_base)


@pytest.mark.parametrize(
    "stamps, base, headers, expected",
    [
        (range(50), Fraction(1001, 30000), [Fraction(30000, 1001)], Fraction(30000, 1001)),
        ([round(i * 1001 / 30) for i in range(50)], MS, [Fraction(30), Fraction(30000, 1001)], Fraction(30000, 1001)),
        ([0, 33, 67, 100, 5000], MS, [Fraction(1), None], Fraction(30)),  # the header's mean is of no frame
        ([100, 0, 200, 300, 200], MS, [None], Fraction(10)),
        ([0, 1, 2, 4, 5, 6], Fraction(1, 25), [], Fraction(25)),
        ([0, 4, 8, 13, 17, 21], MS, [Fraction(240)], Fraction(240)),
        ([t + [0, 5, -4, 3][t % 4] for t in range(0, 2000, 33)], MS, [Fraction(1000, 33)], Fraction(1000, 33)),
        ([7, 7, 7], MS, [None, Fraction(12)], Fraction(12)),
        ([MISSING, MISSING], MS, [None], Fraction(25)),
        ([0, 10**6], MS, [], Fraction(1, 1000)),
    ],
)
def test_rate(stamps, base, headers, expected):
    assert median_rate(np.array(stamps), base, headers) == pytest.approx(expected, rel=1e-9)


def test_a_clock_spaces_frames_and_catches_up():
    clock = FrameClock.placed(np.array([0.0, 0.001, 0.002, 0.5, 9.0]), Fraction(1, 100), Fraction(25), 2, 4)
    assert [clock(i) for i in range(7)] == [0, 2, 4, 50, 450, 454, 458]
    assert clock.largest_shift(np.array([0.0, 0.001, 0.002, 0.5])) == pytest.approx(0.038)


def test_a_fast_gif_warns_and_has_no_delay_that_players_ignore(tmp_path):
    video = probe(encode(tmp_path / "fast.mp4", times=[round(i * 1000 / 60) for i in range(60)]))
    written, messages = rewrite(video, tmp_path / "out.gif")
    assert np.diff(seconds(written)).min() == pytest.approx(0.02)
    assert len(messages) == 1 and "move by up to 0.19" in messages[0]
    with (
        pytest.warns(UserWarning, match="plays slower: gif has 50 frames a second at most") as caught,
        writing_nothing(),
    ):
        with VideoWriter(tmp_path / "fast.gif", height=48, width=64, rate=60):
            pass
    assert caught[0].filename == __file__
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        VideoWriter(tmp_path / "raised.gif", height=48, width=64, rate=60).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast.mp4", "out.gif"]


@pytest.mark.parametrize("pictures, sound", [(0.4, 0), (0, 0.5), (2, 0), (0, 0)])
@pytest.mark.parametrize("codec, suffix", [("aac", ".mp4"), ("libopus", ".webm"), ("libopus", ".mp4")])
def test_the_offset_of_sound_is_kept(tmp_path, pictures, sound, codec, suffix):
    times = [time + round(1000 * pictures) for time in STEADY]
    video = probe(encode(tmp_path / "in.mkv", times=times, sound=codec, sound_start=sound))
    assert offset(video) == pytest.approx(sound - pictures, abs=0.03)
    written, messages = rewrite(video, tmp_path / f"out{suffix}")
    assert not messages and offset(written) == pytest.approx(offset(video), abs=2e-3)
    assert seconds(written) == pytest.approx(seconds(video), abs=1e-3)
    assert len(audio_packets(written.path)) == len(audio_packets(video.path))


def test_the_offset_of_sound_is_kept_at_another_rate(tmp_path):
    video = probe(encode(tmp_path / "in.mkv", times=[time + 400 for time in STEADY], sound="aac"))
    with VideoWriter(tmp_path / "out.mp4", height=48, width=64, rate=10, source=video) as writer:
        for frame in read_frames(video, 48):
            writer.write(frame)
    written = probe(tmp_path / "out.mp4")
    assert written.rate == 10 and offset(written) == pytest.approx(offset(video), abs=2e-3)


@pytest.mark.parametrize("rate", [Fraction(120000, 1001), Fraction(1, 7), Fraction(99991, 1000), 200])
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm"])
def test_unusual_rates_are_written(tmp_path, suffix, rate):
    with VideoWriter(tmp_path / f"out{suffix}", height=48, width=64, rate=rate) as writer:
        for _ in range(20):
            writer.write(torch.zeros(3, 48, 64, dtype=torch.uint8))
    # Stamps of whole milliseconds, 20 of them, say no more.
    assert float(probe(writer.path).rate) == pytest.approx(float(rate), rel=0.01 if suffix == ".webm" else 1e-3)


@pytest.mark.parametrize("frames", [2, 3, 6, 7, 9])
@pytest.mark.parametrize("suffix", [".avi", ".webm"])
def test_short_videos_of_a_fast_rate_are_read_again(tmp_path, suffix, frames):
    """These containers leave out how long the last frame is shown, here more than a tenth of all."""
    path = tmp_path / f"fast{suffix}"
    with VideoWriter(path, height=32, width=32, rate=1000) as writer:
        for _ in range(frames):
            writer.write(torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert probe(path).frames == frames


@pytest.mark.parametrize(
    "pictures, sound, message", [(0.4, 0, "is without the 0.42.* s of sound"), (0, 0.5, "0.4.* s early"), (0, 0, None)]
)
def test_avi_warns_where_sound_does_not_start_with_the_pictures(tmp_path, pictures, sound, message):
    times = [time + round(1000 * pictures) for time in STEADY]
    video = probe(encode(tmp_path / "in.mkv", times=times, sound="aac", sound_start=sound))
    if message:
        with pytest.warns(UserWarning, match=message), writing_nothing():
            with VideoWriter(tmp_path / "out.avi", height=48, width=64, source=video):
                pass
    written, messages = rewrite(video, tmp_path / "out.avi")
    assert len(messages) == bool(message) and written.has_audio
    if pictures:  # the sound that is left starts with the pictures
        assert len(audio_packets(written.path)) < len(audio_packets(video.path))


def test_sound_that_only_its_packets_describe_is_copied_or_warned_of(tmp_path):
    video = probe(encode(tmp_path / "in.ts", times=STEADY, sound="aac"))
    written, messages = rewrite(video, tmp_path / "out.mp4")
    assert written.has_audio and not messages
    written, messages = rewrite(video, tmp_path / "out.avi")
    assert not written.has_audio and len(messages) == 1 and "no sound" in messages[0]


def test_sound_with_a_damaged_header_is_left_out_before_the_first_frame(tmp_path):
    path = encode(tmp_path / "in.mkv", times=STEADY, sound="libopus")
    content = bytearray(path.read_bytes())
    content[content.index(b"OpusHead") - 2] ^= 1  # the identifier of the codec's header becomes an unknown one
    path.write_bytes(content)
    video = probe(path)
    assert video.has_audio
    written, messages = rewrite(video, tmp_path / "out.mp4")
    assert written.frames == 20 and not written.has_audio and len(messages) == 1 and "no sound" in messages[0]


def test_frames_without_time_stamps_follow_at_the_rate_of_the_header(tmp_path, monkeypatch):
    decode = video_module._decode

    def unstamped(path, *bound):
        for frame in decode(path, *bound):
            frame.pts = None
            yield frame

    monkeypatch.setattr(video_module, "_decode", unstamped)
    video = probe(encode(tmp_path / "clip.mp4", times=STEADY))
    assert (video.frames, video.rate) == (20, 25) and seconds(video) == pytest.approx(np.arange(20) / 25)


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mov"])
def test_other_containers_are_read(tmp_path, suffix):
    video = probe(encode(tmp_path / f"clip{suffix}", times=STEADY, sound="aac"))
    assert (video.frames, video.rate, video.height, video.width, video.has_audio) == (20, 25, 48, 64, True)
    assert len(list(read_frames(video, 48))) == 20


def test_a_damaged_transport_stream_is_refused(tmp_path):
    path = encode(tmp_path / "clip.ts", times=STEADY, noise=True)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        probe(path)


@pytest.mark.parametrize(
    "suffix, container, codec, name",
    [
        ("wmv", "asf", "wmv2", "Windows Media"),
        ("mpg", "mpeg", "mpeg1video", "an MPEG program stream"),
        ("m1v", "mpeg1video", "mpeg1video", "an MPEG video stream"),
        ("nut", "nut", "mpeg4", "NUT"),
        ("ivf", "ivf", "libvpx-vp9", "IVF"),
        ("mxf", "mxf", "mpeg2video", "MXF"),
        ("264", "h264", "libx264", "a stream of H.264 or HEVC without a container"),
        ("apng", "apng", "apng", "a PNG"),
        ("y4m", "yuv4mpegpipe", "wrapped_avframe", "YUV4MPEG2"),
    ],
)
def test_other_containers_are_named_with_the_way_to_convert(tmp_path, suffix, container, codec, name):
    path = encode(tmp_path / f"clip.{suffix}", times=STEADY, codec=codec, container=container)
    remuxed = suffix not in ("264", "apng", "y4m")  # these have no times, or a codec of their own
    command = f"`ffmpeg -i clip.{suffix} {'-c copy clip.mkv' if remuxed else '-crf 10 clip.mp4'}`"
    with pytest.raises(ValueError, match="which is not read; accepted: mp4") as raised:
        probe(path)
    assert name in str(raised.value) and command in str(raised.value)


@pytest.mark.parametrize("start, name", [(b"FLV\x01\5", "Flash video"), (b"OggS\0\2", "Ogg"), (b".RMF\0", "RealMedia")])
def test_containers_that_cannot_be_written_here_are_named(tmp_path, start, name):
    (tmp_path / "clip.mp4").write_bytes(start + bytes(200))
    with pytest.raises(ValueError, match=f"clip.mp4 is {name}.* -c copy clip.mkv"):
        probe(tmp_path / "clip.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_sound_whose_times_go_back_is_written(tmp_path, suffix):
    path = encode(tmp_path / "in.mkv", times=STEADY, sound="libopus")
    content = bytearray(path.read_bytes())
    # A block begins with its identifier, its size, its track and its time, 16 bits.
    blocks = [i for i in range(len(content) - 3) if content[i] == 0xA3 and content[i + 2] == 0x82]
    assert len(blocks) > 30
    content[blocks[20] + 3 : blocks[20] + 5] = bytes(2)
    path.write_bytes(content)
    times = [time for time, _ in audio_packets(path)]
    assert times != sorted(times)
    written, messages = rewrite(probe(path), tmp_path / f"out{suffix}")
    assert written.frames == 20 and not messages
    assert [sound for _, sound in audio_packets(written.path)] == [sound for _, sound in audio_packets(path)]
