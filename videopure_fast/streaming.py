"""A video of any length through a purifier, window by window: its frames, or a file."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .data.video import VideoInfo, probe, read_frames, working_size
from .data.video_writer import Quality, VideoWriter
from .inputs import check_count
from .purifier import Purifier
from .sampling import Callback
from .windows import cross_fade, window_starts


def purify_file(
    purifier: Purifier,
    source: str | os.PathLike[str] | VideoInfo,
    output: str | os.PathLike[str],
    *,
    size: int,
    seed: int = 0,
    quality: Quality | None = None,
) -> VideoInfo:
    """Purify a video file of any length in bounded memory; its times and sound are kept. Returns what it was.

    source: a path, or what `probe` found. output: replaced when it is complete, as by a `VideoWriter`, which takes
    `quality`. size, seed: as for `purified_frames`.

    FileNotFoundError or ValueError for a file that `probe` refuses, and for what cannot be written, before any work.
    """
    video = source if isinstance(source, VideoInfo) else probe(source)
    height, width = working_size(video.height, video.width, size)
    with VideoWriter(output, height=height, width=width, rate=video.rate, source=video, quality=quality) as writer:
        for frame in purified_frames(purifier, video, size=size, seed=seed):
            writer.write(frame)
    return video


def purified_frames(purifier: Purifier, video: VideoInfo, *, size: int, seed: int = 0) -> Iterator[Tensor]:
    """The purified frames of a video file, as many as it has, (3, h, w) uint8.

    size: short side of these frames in pixels, as for `working_size`. seed: of methods that draw noise.
    ValueError if the file is damaged, or a window does not fit in the accelerator's memory.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        yield from purify_stream(purifier, read_frames(video, size), video.frames, generator=generator)
    except torch.OutOfMemoryError as error:
        height, width = working_size(video.height, video.width, size)
        raise ValueError(f"{width}x{height} does not fit in the accelerator's memory; try a smaller --size") from error


def purify_stream(
    purifier: Purifier,
    frames: Iterable[Tensor],
    total: int,
    *,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Purify a video of any length, holding two windows of frames at most.

    frames: `total` frames (3, H, W) uint8, 2 or more. Yields as many; they equal `purifier` on the whole clip, up to
    the last bit of float32 before rounding. The random baselines draw new noise for every window, as the seed of
    `generator` says, and so differ from the whole clip's draws.

    callback: passed to the purifier, which then captures nothing.

    TypeError or ValueError for a bad `total` at once, for frames that differ from the above or from `total` in number
    when they are reached.
    """
    check_count("total", total, least=2)
    return _purified_frames(purifier, iter(frames), total, callback, generator)


def _purified_frames(
    purifier: Purifier,
    source: Iterator[Tensor],
    total: int,
    callback: Callback | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    overlap = purifier.config.window_overlap
    starts = window_starts(total, purifier.max_frames, overlap)
    length = min(total, purifier.max_frames)

    def windows() -> Iterator[Tensor]:
        held: deque[Tensor] = deque(maxlen=length)  # the current window's frames
        read = 0
        for start in starts:
            for _, frame in zip(range(start + length - read), source, strict=False):
                if not isinstance(frame, Tensor) or frame.dtype != torch.uint8 or frame.ndim != 3:
                    seen = f"{frame.dtype} {tuple(frame.shape)}" if isinstance(frame, Tensor) else type(frame).__name__
                    raise TypeError(f"frame {read} is {seen}; accepted: torch.uint8 (3, H, W)")
                held.append(frame)
                read += 1
            if read < start + length:
                raise ValueError(f"expected {total} frames, got {read}")
            window = torch.stack(tuple(held), 1).float() / 255  # [3, length, H, W]
            with torch.no_grad():
                purified = purifier(window, generator=generator, callback=callback)
            yield purified.float()

    for piece in cross_fade(windows(), starts, overlap):
        yield from (piece * 255).round().clamp(0, 255).to(torch.uint8).unbind(1)
    if next(source, None) is not None:
        raise ValueError(f"expected {total} frames, got more")
