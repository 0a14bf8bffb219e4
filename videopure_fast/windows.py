"""Overlapping windows over a clip that is longer than the UNet sees at once, and their blend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def window_starts(frames: int, length: int, overlap: int) -> list[int]:
    """First frames of the windows that cover a clip; the last window is aligned to the clip's end."""
    if frames <= length:
        return [0]
    return [*range(0, frames - length, length - overlap), frames - length]


def window_weights(length: int, overlap: int) -> Tensor:
    """Blending weights (length,) of a window: ramps over the overlaps, so that neighbors cross-fade."""
    position = torch.arange(length)
    ramp = torch.minimum(position, length - 1 - position) + 1
    return ramp.clamp(max=overlap + 1) / (overlap + 1)


def cross_fade(windows: Iterable[Tensor], starts: Sequence[int], overlap: int) -> Iterator[Tensor]:
    """Blend windows (..., length, H, W), one for each of `starts`, in order.

    Yields the clip in pieces (..., frames, H, W), each before the next window is asked for. Frames that the next window
    reaches are held back, at most one window of them.
    """
    held: tuple[Tensor, Tensor] | None = None  # weighted sums of frames that the next window reaches, and their weights
    for i, window in enumerate(windows):
        length = window.shape[-3]
        weights = window_weights(length, overlap).to(window)[:, None, None]
        blended = weights * window
        if held is not None:
            shared = held[0].shape[-3]
            blended = torch.cat([held[0] + blended[..., :shared, :, :], blended[..., shared:, :, :]], -3)
            weights = torch.cat([held[1] + weights[:shared], weights[shared:]])
        finished = starts[i + 1] - starts[i] if i + 1 < len(starts) else length
        yield blended[..., :finished, :, :] / weights[:finished]
        held = blended[..., finished:, :, :], weights[finished:]
