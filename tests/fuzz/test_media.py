"""Damaged video files, probed, read and written again: each ends by frames or by a sentence."""

import random
import struct
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
from isolated import run_isolated

from videopure_fast.data.video import probe, read_frames, working_size
from videopure_fast.data.video_writer import VideoWriter

MUTANTS = 200
SECONDS = 10  # for each
MEMORY = 4 << 30  # bytes of address space
CODECS = {
    "mp4": ("libx264", "aac"),
    "mov": ("mpeg4", "aac"),
    "avi": ("mpeg4", "aac"),
    "gif": ("gif", None),
    "webm": ("libvpx-vp9", "libopus"),
    "mkv": ("libx264", "aac"),
    "ts": ("libx264", "aac"),
}
LENGTHS = (0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def encode(path, picture_codec, sound_codec, frames=10):
    kind = {"ts": "mpegts", "mkv": "matroska"}.get(path.suffix[1:])
    with av.open(str(path), "w", format=kind, options={"fflags": "+bitexact"}) as container:
        pictures = container.add_stream(picture_codec, rate=25)
        pictures.height, pictures.width = 48, 64
        pictures.codec_context.thread_count = 1  # the same file in each run
        pictures.pix_fmt = "rgb8" if picture_codec == "gif" else "yuv420p"
        sound = container.add_stream(sound_codec, rate=48000, layout="mono") if sound_codec else None
        noise = np.random.default_rng(0)
        for _ in range(frames):
            image = noise.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if sound:
            kind = sound.codec_context.format.name
            samples = np.zeros((1, 48000 * frames // 25), np.int16 if kind == "s16" else np.float32)
            tone = av.AudioFrame.from_ndarray(samples, format=kind, layout="mono")
            tone.sample_rate = 48000
            container.mux([*sound.encode(tone), *sound.encode()])
        container.mux(pictures.encode())
    return path.read_bytes()


def boxes(content, start, end):
    """Places (start, end) of the boxes of an mp4 in a range, those of the index included."""
    while start + 8 <= end:
        length, kind = struct.unpack(">I4s", content[start : start + 8])
        if not 8 <= length <= end - start:
            return
        yield start, start + length
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf"):
            yield from boxes(content, start + 8, start + length)
        start += length


def mutate(content, rng):
    """Content with one kind of damage; most of it is in the headers, where it does not end at a checksum."""
    content = bytearray(content)
    size = len(content)
    parts = list(boxes(content, 0, size))
    if not parts or parts[-1][1] != size:  # other containers are cut anywhere
        cuts = sorted(rng.sample(range(size), 20))
        parts = list(zip(cuts, cuts[1:], strict=False))
    headers = [part for part in parts if part[1] - part[0] < 400] or parts

    def place():
        return rng.randrange(*rng.choice(headers)) if rng.random() < 0.7 else rng.randrange(size)

    kind = rng.choice(["flip", "swap", "cut", "length", "repeat"])
    if kind == "flip":
        for _ in range(rng.choice([1, 3, 20])):
            content[place()] = rng.randrange(256)
    elif kind == "swap":
        (a, b), (c, d) = sorted(rng.sample(parts, 2))
        if b <= c:
            content[a:d] = content[c:d] + content[b:c] + content[a:b]
        else:  # one is inside the other
            content[a:b] = content[c:d]
    elif kind == "cut":
        del content[rng.randrange(size) :]
    elif kind == "length":
        at = rng.choice(headers)[0] if rng.random() < 0.5 else place()
        content[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(LENGTHS))
    else:
        a, b = rng.choice(parts)
        content[a:a] = content[a:b]
    return bytes(content)


def rewrite(paths):
    """Read a video and write it, as the command `purify` does, with frames that stay as they are."""
    source, output = map(Path, paths)
    warnings.simplefilter("ignore")
    video = probe(source)
    height, width = working_size(video.height, video.width, 16)
    with VideoWriter(output, height=height, width=width, rate=video.rate, source=video) as writer:
        for frame in read_frames(video, 16):
            writer.write(frame)
    output.unlink()
    return video.frames


@pytest.mark.fuzz
def test_damaged_files_end_by_frames_or_a_sentence(tmp_path):
    intact = {suffix: encode(tmp_path / f"intact.{suffix}", *codecs) for suffix, codecs in CODECS.items()}
    arguments = []
    for i in range(MUTANTS):
        suffix = list(CODECS)[i % len(CODECS)]
        path = tmp_path / f"{i}.{suffix}"
        path.write_bytes(mutate(intact[suffix], random.Random(i)))
        arguments.append((path, tmp_path / f"out.{('mp4', 'avi', 'gif', 'webm')[i % 4]}"))
    whole = [(tmp_path / f"intact.{suffix}", tmp_path / "out.mp4") for suffix in CODECS]
    before = sorted(tmp_path.iterdir())
    outcomes = list(run_isolated(rewrite, whole + arguments, seconds=SECONDS, memory=MEMORY))
    assert [outcome.value for outcome in outcomes[: len(whole)]] == [10] * len(whole)
    bad = [
        (path.name, outcome)
        for (path, _), outcome in zip(arguments, outcomes[len(whole) :], strict=True)
        if outcome.kind != "result"
        and not (outcome.kind == "ValueError" and str(path) in outcome.value and "\n" not in outcome.value)
    ]
    assert not bad
    assert 10 < sum(outcome.kind == "ValueError" for outcome in outcomes) < MUTANTS - 10  # both ends are met
    assert sorted(tmp_path.iterdir()) == before
