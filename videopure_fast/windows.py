"""Overlapping windows over a clip that is longer than the UNet sees at once."""

from __future__ import annotations

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
