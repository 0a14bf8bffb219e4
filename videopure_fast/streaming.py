"""A video of any length through a purifier, window by window."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .purifier import Callback, Purifier
from .windows import window_starts, window_weights


def purify_stream(
    purifier: Purifier,
    frames: Iterable[Tensor],
    total: int,
    *,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Purify a video of any length window by window, holding two windows of frames at most.

    frames: `total` frames (3, H, W) uint8. Yields as many; they equal `purifier` on the whole clip, up to the last
    bit of float32 before rounding. The random baselines draw new noise for every window, as the seed of `generator`
    says, and so differ from the whole clip's draws.

    callback: handed to the purifier.

    ValueError if there are more or fewer frames than `total`.
    """
    source = iter(frames)
    starts = window_starts(total, purifier.max_frames, purifier.config.window_overlap)
    length = min(total, purifier.max_frames)
    weights = window_weights(length, purifier.config.window_overlap)[:, None, None, None]
    given: deque[Tensor] = deque()  # the current window's frames
    blended: deque[Tensor] = deque()  # weighted sums, from the current window's first frame on
    weight_sums: deque[Tensor] = deque()
    read = 0
    for i, start in enumerate(starts):
        for frame in _take(source, start + length - read):
            given.append(frame)
            read += 1
        if read < start + length:
            raise ValueError(f"expected {total} frames, got {read}")
        window = torch.stack(tuple(given), 1).float() / 255  # [3, length, H, W]
        with torch.no_grad():
            purified = purifier(window, generator=generator, callback=callback).transpose(0, 1)
        for j, (weight, frame) in enumerate(zip(weights, purified.float(), strict=True)):
            if j < len(blended):
                blended[j] += weight * frame
                weight_sums[j] += weight
            else:
                blended.append(weight * frame)
                weight_sums.append(weight.clone())
        following = starts[i + 1] if i + 1 < len(starts) else total
        for _ in range(following - start):
            given.popleft()
            yield (blended.popleft() / weight_sums.popleft() * 255).round().clamp(0, 255).to(torch.uint8)
    if next(source, None) is not None:
        raise ValueError(f"expected {total} frames, got more")


def _take(source: Iterator[Tensor], n: int) -> Iterator[Tensor]:
    for _, frame in zip(range(n), source, strict=False):
        yield frame
