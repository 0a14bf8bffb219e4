"""Procedural action clips: the class is the motion of a textured sprite, which no single frame shows.

Every clip shows one sprite (disc, square, triangle or plus) with a random 1/f texture over a random 1/f background.
The sprite makes one of eight motions, and its pose at the middle of the clip is drawn independently of the class. Both
layers also drift slowly at random, independently of the class.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("left", "right", "up", "down", "turn left", "turn right", "zoom in", "zoom out")
FRAMES, SIZE = 16, 32  # frames of a clip; its height and width in pixels

_CANVAS = 64  # texture side in pixels; drift and zoom stay inside it
_BACKGROUND_CONTRAST, _SPRITE_CONTRAST = 0.12, 0.15  # standard deviation of the textures
_BACKGROUND_EXPONENT, _SPRITE_EXPONENT = 1.0, 0.8  # textures have amplitudes of 1 / frequency**exponent
# Range of the motion per frame that makes the class.
_SPEED = (0.5, 1.0)  # pixels
_TURN = (math.radians(5.0), math.radians(10.0))  # radians
_ZOOM = (0.03, 0.05)  # change of the logarithm of the scale
# Largest random motion per frame: of the sprite, in pixels, radians and log scale; of the background, in pixels.
_DRIFT, _DRIFT_TURN, _DRIFT_ZOOM, _BACKGROUND_DRIFT = 0.12, math.radians(1.0), 0.005, 0.25
_ROLL_OFF = 0.3  # frequency at which textures are attenuated by 1/e, in cycles per pixel
_SCALARS = 32  # random numbers drawn for each clip: its class, pose and colors use the first ones


def sample_clips(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `n` clips. Clip i depends on (seed, i) alone: a larger n adds clips after those of a smaller one.

    Returns clips (n, 3, 16, 32, 32), float32 in [0, 1], and labels (n,), int64 indices into CLASSES. ValueError for
    n < 1.
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
    """Clips (n, 3, F, H, W) in [0, 1] from uniform scalars (n, _SCALARS), normal noise (n, 2, 4, K, K), labels (n,).

    The order in which scalars are used defines the clips: changing it changes every clip.
    """
    unused = iter(scalars.unbind(1)[1:])

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * next(unused)

    def is_class(index: int) -> Tensor:  # [n], 1 for clips of that class, else 0
        return (labels == index).float()

    def over_time(middle: Tensor, rate: Tensor) -> Tensor:  # [n], [n] -> [n, F, 1, 1], `middle` at time 0
        return (middle[:, None] + rate[:, None] * time)[..., None, None]

    time = torch.arange(FRAMES) - (FRAMES - 1) / 2  # [F], in frames, 0 at the middle of the clip
    speed, turn, zoom = uniform(*_SPEED), uniform(*_TURN), uniform(*_ZOOM)
    velocity_x = speed * (is_class(1) - is_class(0)) + uniform(-_DRIFT, _DRIFT)
    velocity_y = speed * (is_class(3) - is_class(2)) + uniform(-_DRIFT, _DRIFT)
    spin = turn * (is_class(5) - is_class(4)) + uniform(-_DRIFT_TURN, _DRIFT_TURN)
    growth = zoom * (is_class(6) - is_class(7)) + uniform(-_DRIFT_ZOOM, _DRIFT_ZOOM)

    center_x, center_y = over_time(uniform(-4, 4), velocity_x), over_time(uniform(-4, 4), velocity_y)
    angle, scale = over_time(uniform(0, 2 * math.pi), spin), over_time(uniform(-0.1, 0.1), growth).exp()
    radius = uniform(6.0, 9.0)[:, None, None, None]
    shape = (uniform(0, 1) * 4).long()

    pixels = torch.arange(SIZE) - (SIZE - 1) / 2
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")  # [H, W]
    dx, dy = (x - center_x) / scale, (y - center_y) / scale  # [n, F, H, W]
    local_x = angle.cos() * dx + angle.sin() * dy
    local_y = angle.cos() * dy - angle.sin() * dx
    mask = torch.sigmoid(-2.5 * scale * _signed_distance(local_x, local_y, radius, shape))

    shift_x = over_time(uniform(-4, 4), uniform(-_BACKGROUND_DRIFT, _BACKGROUND_DRIFT))
    shift_y = over_time(uniform(-4, 4), uniform(-_BACKGROUND_DRIFT, _BACKGROUND_DRIFT))
    colors = torch.stack([uniform(0.25, 0.75) for _ in range(6)], 1).view(-1, 2, 3, 1, 1, 1)
    background = colors[:, 0] + _BACKGROUND_CONTRAST * _sample(
        _texture(noise[:, 0], _BACKGROUND_EXPONENT), x - shift_x, y - shift_y
    )
    sprite = colors[:, 1] + _SPRITE_CONTRAST * _sample(_texture(noise[:, 1], _SPRITE_EXPONENT), local_x, local_y)
    return torch.lerp(background, sprite, mask[:, None]).clamp(0, 1)


def _signed_distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the outline of a disc, square, triangle or plus, in units of x; negative inside.

    x, y: (n, F, H, W); radius: (n, 1, 1, 1); shape: (n,) int64, 0 to 3. The four shapes have about the same area.
    """
    disc = torch.hypot(x, y) - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.886 * radius
    triangle = torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.78 * radius
    arm, thickness = 1.06 * radius, 0.42 * radius
    plus = torch.minimum(
        torch.maximum(x.abs() - arm, y.abs() - thickness), torch.maximum(x.abs() - thickness, y.abs() - arm)
    )
    distances = torch.stack([disc, square, triangle, plus])  # [4, n, F, H, W]
    return distances[shape, torch.arange(len(shape))]


def _texture(noise: Tensor, exponent: float) -> Tensor:
    """White noise (n, 4, K, K) -> RGB textures (n, 3, K, K) of unit variance, amplitudes of 1 / frequency**exponent.

    The first noise channel goes to all three colors, the others to one color each.
    """
    frequency = torch.hypot(torch.fft.fftfreq(_CANVAS)[:, None], torch.fft.rfftfreq(_CANVAS)[None])
    # Attenuate high frequencies: bilinear sampling would make them flicker under motion by fractions of a pixel.
    gain = frequency.clamp(min=1 / _CANVAS) ** -exponent * torch.exp(-((frequency / _ROLL_OFF) ** 2))
    gain[0, 0] = 0
    filtered = torch.fft.irfft2(torch.fft.rfft2(noise) * gain, s=noise.shape[-2:])
    colored = 0.8 * filtered[:, :1] + 0.6 * filtered[:, 1:]
    return colored / colored.std((-2, -1), keepdim=True)


def _sample(texture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples (n, 3, F, H, W) of textures (n, 3, K, K) at offsets x, y (n, F, H, W), in pixels, from the
    center."""
    n, frames, height, width = x.shape
    grid = torch.stack([x, y], -1) * (2 / _CANVAS)
    samples = F.grid_sample(
        texture, grid.view(n, frames * height, width, 2), padding_mode="reflection", align_corners=False
    )
    return samples.view(n, 3, frames, height, width)
