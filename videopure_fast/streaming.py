"""A video of any length through a purifier, window by window."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .inputs import check_count
from .purifier import Purifier
from .sampling import Callback
from .windows import cross_fade, window_starts


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
