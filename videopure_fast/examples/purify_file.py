"""Purify a video file of any length, window by window: probe, read, purify, and write it with its times and sound.

    python -m videopure_fast.examples.purify_file clip.mp4 purified.mp4

At most two windows of frames are in memory. All windows have one shape, so that from the second window on a CPU replays
the recorded loop, and a GPU its captured graph. The progress bar counts frames, which leaves that as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from videopure_fast import Purifier
from videopure_fast.data.video import probe, read_frames, working_size
from videopure_fast.data.video_writer import VideoWriter
from videopure_fast.streaming import purify_stream


def purify_file(source: Path, output: Path, purifier: Purifier, *, size: int = 64) -> None:
    """Purify a video, resized to a short side of `size` pixels; the output's extension chooses its format."""
    video = probe(source)  # decodes the whole file once: a damaged one is refused here, before any work
    height, width = working_size(video.height, video.width, size)
    purified = purify_stream(purifier, read_frames(video, size), video.frames)
    with VideoWriter(output, height=height, width=width, rate=video.rate, source=video) as writer:
        for frame in tqdm(purified, total=video.frames, unit="frame"):  # (3, height, width) uint8
            writer.write(frame)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="video to read: mp4, mov, avi, gif, webm, mkv or ts")
    parser.add_argument("output", type=Path, help="video to write: mp4, avi, gif or webm")
    parser.add_argument("--model", default="tiny", help="a prior: tiny, a folder or a Hugging Face repository")
    parser.add_argument("--size", type=int, default=64, help="short side in pixels, even, 16 or more")
    parser.add_argument("--steps", type=int, default=5, help="depth T of the inversion")
    options = parser.parse_args(argv)
    purifier = Purifier.from_pretrained(options.model, inversion_steps=options.steps)
    purify_file(options.source, options.output, purifier, size=options.size)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # a sentence says what is wrong
        raise SystemExit(f"error: {error}") from error
