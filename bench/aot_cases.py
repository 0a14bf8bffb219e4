"""The calls that the models make of the ops with a Triton form, on tensors of the meta device: what aot.py compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from videopure_fast.ops.linear_moments import moments_shape
from videopure_fast.tiny.models import UNET_CONFIG, VAE_CONFIG

HALF, SINGLE = (torch.float16,), (torch.float16, torch.float32)
DTYPES = (*SINGLE, torch.bfloat16)
# The default window, shorter clips, a first frame alone, and as many as an attention tile holds; dtypes for each.
# A kernel for bfloat16 is that for float16 but for its types.
FRAMES = {32: DTYPES, 24: HALF, 16: HALF, 1: SINGLE, 64: SINGLE}
# So many clips make tensors of more than 2^31 values, whose sizes are int64 arguments.
MANY_CLIPS = 384


class Level(NamedTuple):
    """One resolution of a model: pixels a side, channels, and the other widths that its resnets normalize there.

    skips: the widths of x and of a skip connection, whose norm takes both.
    """

    side: int
    channels: int
    head_size: int
    groups: int
    others: tuple[int, ...] = ()
    skips: tuple[tuple[int, int], ...] = ()


# text-to-video-ms-1.7b on latents of 28x28. The other widths are those of the level above and of skip connections
# concatenated.
UNET = (
    Level(28, 320, 64, 32, (640, 960), ((640, 320), (320, 320))),
    Level(14, 640, 64, 32, (320, 960, 1280, 1920), ((1280, 640), (640, 640), (640, 320))),
    Level(7, 1280, 64, 32, (640, 1920, 2560), ((1280, 1280), (1280, 640))),
    Level(4, 1280, 64, 32, (2560,), ((1280, 1280),)),
)
TRANSFORMER_IN = Level(28, 512, 64, 32)
# In no model: heads of 32, and channels that are no multiple of 16.
SMALL_HEADS, ODD = Level(14, 320, 32, 32), Level(7, 150, 50, 5)
# AnimateDiff's motion modules, on Stable Diffusion's UNet: eight heads everywhere.
ANIMATEDIFF = tuple(Level(level.side, level.channels, level.channels // 8, 32) for level in UNET)
# (side, channels) of the VAE, encoder and decoder, for frames of 224x224.
VAE = ((28, 512), (56, 256), (56, 512), (112, 128), (112, 256), (112, 512), (224, 128), (224, 256))
_narrow, _wide = cast("tuple[int, int]", UNET_CONFIG["block_out_channels"])
_heads_and_groups = cast(int, UNET_CONFIG["attention_head_dim"]), cast(int, UNET_CONFIG["norm_num_groups"])
_concatenated = _narrow + _wide
TINY_UNET = (
    Level(16, _narrow, *_heads_and_groups, (2 * _narrow, _concatenated)),
    Level(8, _wide, *_heads_and_groups, (_narrow, _concatenated, 2 * _wide)),
)
_vae_channels = cast("tuple[int, ...]", VAE_CONFIG["block_out_channels"])
TINY_VAE = tuple((side, channels) for side in (16, 32) for channels in _vae_channels)
TINY_VAE_GROUPS = cast(int, VAE_CONFIG["norm_num_groups"])


class Case(NamedTuple):
    """A call of an op's launcher, its tensors on the meta device."""

    op: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        shown = (tuple(value.shape) if isinstance(value, Tensor) else value for value in self.arguments)
        return f"{self.op}({', '.join(map(str, shown))})"

    def shape(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.arguments[0].shape))}"

    def dtype(self) -> str:
        dtypes = dict.fromkeys(value.dtype for value in self.arguments if isinstance(value, Tensor))
        return "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def cases() -> Iterator[Case]:
    """Every op at every width and length, the real UNet's first level in half precision first."""
    for frames, dtypes in FRAMES.items():
        yield from latent_cases(frames)
        for dtype in dtypes:
            levels = [(1, level) for level in (*UNET, TRANSFORMER_IN, SMALL_HEADS, ODD, *TINY_UNET)]
            for clips, level in [*levels, (MANY_CLIPS, UNET[0])]:
                yield from temporal_cases(clips, frames, level, dtype)
                yield from norm_cases(clips, frames, level, dtype)
            for level in ANIMATEDIFF:
                yield from attention_cases(1, frames, level, dtype, with_position=True)
            yield from vae_cases(frames, VAE, 32, dtype)
            yield from vae_cases(frames, TINY_VAE, TINY_VAE_GROUPS, dtype)


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def latent_cases(frames: int) -> Iterator[Case]:
    """float32 latents of the real and the tiny VAE, seven and three votes, noise of any dtype."""
    single = torch.float32
    for votes, clips, side in ((7, 1, 28), (3, 4, 16), (7, 2**17, 28)):
        latents, target = meta(single, votes, clips, 4, frames, side, side), meta(single, clips, 4, frames, side, side)
        flow = meta(single, clips, frames - 1, 2, side, side)
        for dtype in DTYPES:
            noise = meta(dtype, *latents.shape)
            yield Case("guided_update", (latents, noise, target, flow, meta(single, votes, clips, 4), 1.0, 0.1))
            noise = meta(dtype, *target.shape)
            for op in ("ddim_step", "ddim_step_"):
                for first_frame_noise in (False, True):
                    yield Case(op, (target, noise, meta(single, clips, 2), first_frame_noise))


def temporal_cases(clips: int, frames: int, level: Level, dtype: torch.dtype) -> Iterator[Case]:
    """The calls of a temporal transformer and of a temporal convolution."""
    side, channels = level.side, level.channels
    yield from attention_cases(clips, frames, level, dtype, with_position=False)
    tokens = clips * frames * side * side
    x = meta(dtype, tokens, channels)
    yield from folded_cases(x)
    for bias in (meta(dtype, 8 * channels), None):
        yield Case("linear_geglu", (x, meta(dtype, 8 * channels, channels), bias))
    yield Case("geglu", (meta(dtype, tokens, 8 * channels),))
    first, last = (meta(dtype, 8 * channels, channels), meta(dtype, 8 * channels)), meta(dtype, channels, 4 * channels)
    vector = meta(dtype, channels)
    yield Case("feed_forward", (x, vector, vector, *first, last, vector, 1e-5))
    # After an attention and a feed-forward, without a bias, and in the shortcut of a resnet.
    yield linear_residual(tokens, channels, channels, dtype)
    yield linear_residual(tokens, channels, channels, dtype, bias=False)
    yield linear_residual(tokens, 4 * channels, channels, dtype)
    for inputs in level.others:
        yield linear_residual(tokens, inputs, channels, dtype)
        if inputs > channels:
            yield linear_residual(tokens, channels, channels, dtype, skip=inputs - channels)
    if level is TRANSFORMER_IN:
        yield linear_residual(tokens, channels, UNET[0].channels, dtype)
    else:
        x = meta(dtype, clips, frames, side, side, channels)
        for residual in (None, x):
            yield Case("temporal_conv", (x, meta(dtype, 3, channels, channels), meta(dtype, channels), residual))


def folded_cases(x: Tensor) -> Iterator[Case]:
    """A layer that measures its rows, with a residual and without, and the layers after the norms that follow.

    Those are the projection to queries, keys and values, that to queries, and the first of a feed-forward.
    """
    channels, dtype = x.shape[-1], x.dtype
    weight, bias = meta(dtype, channels, channels), meta(dtype, channels)
    for residual in (x, None):
        yield Case("linear_moments", (x, weight, bias, residual))
    moments = meta(torch.float32, *moments_shape(x, channels))
    for op, outputs in (("folded_linear", 3), ("folded_linear", 1), ("folded_linear_geglu", 8)):
        layer = meta(dtype, outputs * channels, channels), meta(torch.float32, outputs * channels)
        yield Case(op, (x, moments, *layer, meta(dtype, outputs * channels), 1e-5))


def linear_residual(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True, skip: int = 0
) -> Case:
    weight, biases = meta(dtype, outputs, inputs + skip), meta(dtype, outputs) if bias else None
    residual, further = meta(dtype, tokens, outputs), meta(dtype, tokens, skip) if skip else None
    return Case("linear_residual", (meta(dtype, tokens, inputs), weight, biases, residual, further))


def attention_cases(
    clips: int, frames: int, level: Level, dtype: torch.dtype, *, with_position: bool
) -> Iterator[Case]:
    """The attention over frames of a transformer, alone and with its norm; with the positions of motion modules."""
    side, channels, heads = level.side, level.channels, level.channels // level.head_size
    yield Case("temporal_attention", (meta(dtype, clips, frames, side, side, 3 * channels), heads))
    x, vector, weight = (
        meta(dtype, clips, frames, side, side, channels),
        meta(dtype, channels),
        meta(dtype, 3 * channels, channels),
    )
    position = meta(dtype, frames, channels) if with_position else None
    yield Case("norm_temporal_attention", (x, vector, vector, weight, position, heads, 1e-5))
    if not with_position:
        single = torch.float32
        sums, bias, moments = meta(single, 3 * channels), meta(dtype, 3 * channels), moments_shape(x, channels)
        yield Case("folded_temporal_attention", (x, meta(single, *moments), weight, sums, bias, heads, 1e-5))


def norm_cases(clips: int, frames: int, level: Level, dtype: torch.dtype) -> Iterator[Case]:
    """The norms of resnets, with the time embedding, with a skip connection and without; of both transformers, without
    SiLU; and of temporal convolutions, over all frames."""

    def case(channels: int, embedding: Tensor | None, eps: float, over_frames: bool, silu: bool, skip: int = 0) -> Case:
        x, second = (meta(dtype, clips, frames, level.side, level.side, n) for n in (channels, skip))
        affine = meta(dtype, channels + skip), meta(dtype, channels + skip)
        sources = embedding, second if skip else None
        return Case("group_norm_silu", (x, *affine, *sources, level.groups, eps, over_frames, silu))

    for channels in (level.channels, *level.others):
        yield case(channels, None, 1e-5, False, True)
    for channels, skip in level.skips:
        yield case(channels, None, 1e-5, False, True, skip)
    # An embedding is a slice of one matrix that holds those of all resnets.
    yield case(level.channels, meta(dtype, clips, 2 * level.channels)[:, : level.channels], 1e-5, False, True)
    yield case(level.channels, None, 1e-6, False, False)
    for silu in (False, True):
        yield case(level.channels, None, 1e-6, True, silu)


def vae_cases(frames: int, sizes: tuple[tuple[int, int], ...], groups: int, dtype: torch.dtype) -> Iterator[Case]:
    """The norms of a VAE and the shortcuts of its resnets. sizes: (side, channels), the smallest side first."""
    for side, channels in sizes:
        x = meta(dtype, 1, frames, side, side, channels)
        affine = meta(dtype, channels), meta(dtype, channels)
        # The norm before the attention has no activation. The attention is at the smallest side.
        for silu in (True, False) if side == sizes[0][0] else (True,):
            yield Case("group_norm_silu", (x, *affine, None, None, groups, 1e-6, False, silu))
            for bias in (affine[1], None):
                yield Case("add_group_norm_silu", (x, x, bias, *affine, groups, 1e-6, False, silu))
        for bias in (affine[1], None):
            yield Case("residual_add", (x, x, bias))
        for outputs in {channels, channels // 2, 2 * channels} & {channels for _, channels in sizes}:
            yield linear_residual(frames * side * side, channels, outputs, dtype)
