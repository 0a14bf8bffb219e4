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


class CrossFade:
    """Blends overlapping windows (..., length, H, W), one after another, holding the frames that are not released.

    A window begins at the first frame that is held: what is before it is released first.
    """

    def __init__(self, overlap: int) -> None:
        self._overlap = overlap
        self._held: tuple[Tensor, Tensor] | None = None  # weighted sums of frames, and their weights

    def __len__(self) -> int:
        """The number of frames that are held."""
        return 0 if self._held is None else len(self._held[1])

    def add(self, window: Tensor, skip: int = 0) -> None:
        """Blend in a window whose first frame is the first that is held; `skip` of its frames were released before."""
        weights = window_weights(window.shape[-3], self._overlap).to(window)[skip:, None, None]
        blended = weights * window[..., skip:, :, :]
        if self._held is not None:
            shared = self._held[0].shape[-3]
            blended = torch.cat([self._held[0] + blended[..., :shared, :, :], blended[..., shared:, :, :]], -3)
            weights = torch.cat([self._held[1] + weights[:shared], weights[shared:]])
        self._held = blended, weights

    def release(self, frames: int) -> Tensor:
        """The first frames (..., frames, H, W), which no later window reaches; fewer if fewer are held."""
        assert self._held is not None
        blended, weights = self._held
        self._held = blended[..., frames:, :, :], weights[frames:]
        return blended[..., :frames, :, :] / weights[:frames]


def cross_fade(windows: Iterable[Tensor], starts: Sequence[int], overlap: int) -> Iterator[Tensor]:
    """Blend windows (..., length, H, W), one for each of `starts`, in order.

    Yields the clip in pieces (..., frames, H, W), each before the next window is asked for. Frames that the next window
    reaches are held back, at most one window of them.
    """
    fade = CrossFade(overlap)
    for i, window in enumerate(windows):
        fade.add(window)
        yield fade.release(starts[i + 1] - starts[i] if i + 1 < len(starts) else len(fade))
