"""Procedural action clips: the class is the motion of a textured sprite, so that no single frame tells it.

Every clip shows one sprite (disc, square, triangle or plus) with a 1/f texture of its own over a 1/f background.
The sprite makes one of eight motions, and its pose at the middle of the clip is drawn independently of the class;
both layers also drift slowly at random, a nuisance that carries no label.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("left", "right", "up", "down", "turn left", "turn right", "zoom in", "zoom out")
FRAMES, SIZE = 16, 32

_CANVAS = 64  # texture side in pixels; drift and zoom stay inside it
_BACKGROUND_CONTRAST, _SPRITE_CONTRAST = 0.12, 0.15
_BACKGROUND_EXPONENT, _SPRITE_EXPONENT = 1.0, 0.8
# Motion per frame, (least, most): pixels, radians, log scale.
_SPEED = (0.5, 1.0)
_TURN = (math.radians(5.0), math.radians(10.0))
_ZOOM = (0.03, 0.05)
# Nuisance per frame, at most: pixels, radians, log scale; and the background's, in pixels.
_DRIFT, _DRIFT_TURN, _DRIFT_ZOOM, _BACKGROUND_DRIFT = 0.12, math.radians(1.0), 0.005, 0.25
_ROLL_OFF = 0.3  # cycles per pixel
_SCALARS = 32  # random numbers a clip may use for its pose, colors and class


def sample_clips(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `n` clips; clip i depends on (seed, i) alone, so a longer draw begins with the shorter one.

    Returns clips (n, 3, 16, 32, 32), float32 in [0, 1], and labels (n,), int64 indices into CLASSES.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    scalars = torch.empty(n, _SCALARS)
    noise = torch.empty(n, 2, 4, _CANVAS, _CANVAS)  # (background, sprite) x (shared luminance, r, g, b)
    for i in range(n):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
        scalars[i].uniform_(generator=generator)
        noise[i].normal_(generator=generator)
    labels = (scalars[:, 0] * len(CLASSES)).long()
    return _render(scalars, noise, labels), labels


def _render(scalars: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
    unused = iter(scalars.unbind(1)[1:])

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * next(unused)

    def either(of_class: int) -> Tensor:  # 1 for clips of that class, else 0
        return (labels == of_class).float()

    time = torch.arange(FRAMES) - (FRAMES - 1) / 2  # [F], zero in the middle
    speed, turn, zoom = uniform(*_SPEED), uniform(*_TURN), uniform(*_ZOOM)
    velocity_x = speed * (either(1) - either(0)) + uniform(-_DRIFT, _DRIFT)
    velocity_y = speed * (either(3) - either(2)) + uniform(-_DRIFT, _DRIFT)
    spin = turn * (either(5) - either(4)) + uniform(-_DRIFT_TURN, _DRIFT_TURN)
    growth = zoom * (either(6) - either(7)) + uniform(-_DRIFT_ZOOM, _DRIFT_ZOOM)

    at = lambda middle, rate: (middle[:, None] + rate[:, None] * time)[..., None, None]  # noqa: E731  [n, F, 1, 1]
    center_x, center_y = at(uniform(-4, 4), velocity_x), at(uniform(-4, 4), velocity_y)
    angle, scale = at(uniform(0, 2 * math.pi), spin), at(uniform(-0.1, 0.1), growth).exp()
    radius = uniform(6.0, 9.0)[:, None, None, None]
    shape = (uniform(0, 1) * 4).long()

    pixels = torch.arange(SIZE) - (SIZE - 1) / 2
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")  # [H, W]
    dx, dy = (x - center_x) / scale, (y - center_y) / scale  # [n, F, H, W]
    local_x = angle.cos() * dx + angle.sin() * dy
    local_y = angle.cos() * dy - angle.sin() * dx
    mask = torch.sigmoid(-2.5 * scale * _signed_distance(local_x, local_y, radius, shape))

    shift_x = at(uniform(-4, 4), uniform(-_BACKGROUND_DRIFT, _BACKGROUND_DRIFT))
    shift_y = at(uniform(-4, 4), uniform(-_BACKGROUND_DRIFT, _BACKGROUND_DRIFT))
    colors = torch.stack([uniform(0.25, 0.75) for _ in range(6)], 1).view(-1, 2, 3, 1, 1, 1)
    background = colors[:, 0] + _BACKGROUND_CONTRAST * _sample(
        _texture(noise[:, 0], _BACKGROUND_EXPONENT), x - shift_x, y - shift_y
    )
    sprite = colors[:, 1] + _SPRITE_CONTRAST * _sample(_texture(noise[:, 1], _SPRITE_EXPONENT), local_x, local_y)
    return torch.lerp(background, sprite, mask[:, None]).clamp(0, 1)


def _signed_distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Distance to the outline of disc, square, triangle or plus, negative inside; all of about one area."""
    disc = torch.hypot(x, y) - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    triangle = torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.78 * radius
    arm, thickness = 1.06 * radius, 0.42 * radius
    plus = torch.minimum(
        torch.maximum(x.abs() - arm, y.abs() - thickness), torch.maximum(x.abs() - thickness, y.abs() - arm)
    )
    every = torch.stack([disc, square, triangle, plus])  # [4, n, F, H, W]
    return every[shape, torch.arange(len(shape))]


def _texture(noise: Tensor, exponent: float) -> Tensor:
    """White noise (n, 4, K, K) -> 1/f^exponent textures (n, 3, K, K) of unit variance with mostly shared luminance."""
    frequency = torch.hypot(torch.fft.fftfreq(_CANVAS)[:, None], torch.fft.rfftfreq(_CANVAS)[None])
    # The roll-off keeps motion by a fraction of a pixel from shimmering under bilinear sampling.
    gain = frequency.clamp(min=1 / _CANVAS) ** -exponent * torch.exp(-((frequency / _ROLL_OFF) ** 2))
    gain[0, 0] = 0
    filtered = torch.fft.irfft2(torch.fft.rfft2(noise) * gain, s=noise.shape[-2:])
    colored = 0.8 * filtered[:, :1] + 0.6 * filtered[:, 1:]
    return colored / colored.std((-2, -1), keepdim=True)


def _sample(texture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples of (n, 3, K, K) at pixel offsets (n, F, H, W) from the canvas center: (n, 3, F, H, W)."""
    n, frames, height, width = x.shape
    grid = torch.stack([x, y], -1) * (2 / _CANVAS)
    samples = F.grid_sample(
        texture, grid.view(n, frames * height, width, 2), padding_mode="reflection", align_corners=False
    )
    return samples.view(n, 3, frames, height, width)
