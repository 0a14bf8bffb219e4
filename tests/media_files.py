"""Video files of any times, containers and codecs, for tests."""

from fractions import Fraction

import av
import numpy as np

MS = Fraction(1, 1000)
CONTAINERS = {".mkv": "matroska", ".ts": "mpegts"}
CODECS = {".webm": "libvpx-vp9", ".avi": "mpeg4"}


def encode(
    path, *, times, codec=None, container=None, options=None, sound=None, sound_start=0, picture=None, noise=False
):
    """Write 48x64 pictures at times in milliseconds, and sound as long from `sound_start` seconds on. Returns path.

    picture: colors of the quarters of each frame; by default a red one top left, and gray that grows lighter.
    """
    codec = codec or CODECS.get(path.suffix, "libx264")
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", format=container or CONTAINERS.get(path.suffix)) as target:
        options = options or ({"bf": "0"} if codec == "libx264" else {})
        pictures = target.add_stream(codec, rate=25, options=options)
        pictures.height, pictures.width = 48, 64
        pictures.pix_fmt = "rgb24" if codec == "apng" else "yuv420p"
        if codec not in ("mpeg4", "mpeg1video", "mpeg2video"):  # these have rates of their own
            pictures.codec_context.time_base = MS if path.suffix != ".avi" else Fraction(1, 25)
        track = target.add_stream(sound, rate=48000, layout="mono") if sound else None
        for i, time in enumerate(times):
            image = np.full((48, 64, 3), 10 * i % 256, np.uint8)
            image[:24, :32] = (220, 30, 30)
            if picture:
                image = np.repeat(np.repeat(np.array(picture, np.uint8), 24, 0), 32, 1)
            if noise:
                image = generator.integers(0, 256, image.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, MS
            target.mux(pictures.encode(frame))
        target.mux(pictures.encode())
        if track:
            kind = track.codec_context.format.name
            samples = np.zeros((1, 48 * (times[-1] - times[0])), np.int16 if kind == "s16" else np.float32)
            tone = av.AudioFrame.from_ndarray(samples, format=kind, layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = 48000, round(48000 * sound_start), Fraction(1, 48000)
            target.mux([*track.encode(tone), *track.encode()])
    return path


def remux(source, path, times, last=40):
    """Copy the pictures of a file that has no B-frames to times in milliseconds, whatever these are."""
    options = {"avoid_negative_ts": "disabled"}
    with (
        av.open(str(source)) as old,
        av.open(str(path), "w", format=CONTAINERS.get(path.suffix), options=options) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for packet, time, following in zip(packets, times, [*times[1:], times[-1] + last], strict=True):
            packet.stream, packet.time_base = stream, MS
            packet.pts = packet.dts = time
            packet.duration = following - time
            new.mux(packet)
    return path


def audio_packets(path):
    """(time in seconds, content) of each packet of sound."""
    with av.open(str(path)) as container:
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(audio=0) if p.size]
