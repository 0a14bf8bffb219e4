"""The guided update in Triton, for GPUs on machines without nvcc. reference.guided_update states the maths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # not tuned: the op is bound by memory and a small part of a purification
NUM_WARPS = 4


@triton.jit
def _predict_x0(z_ptr, e_ptr, mask, sqrt_alpha, sqrt_beta):
    z = tl.load(z_ptr, mask=mask, other=0.0)
    e = tl.load(e_ptr, mask=mask, other=0.0).to(tl.float32)
    return (z - sqrt_beta * e) / sqrt_alpha


@triton.jit
def _guided_update_kernel(
    latents_ptr,
    noise_ptr,
    target_ptr,
    flow_ptr,
    output_ptr,
    coefficients_ptr,  # (V, 4) float32: sqrt_alpha, sqrt_beta, update, predicts_x0
    spatial,
    temporal,
    values,
    clips,
    channels,
    frames,
    height,
    width,
    z_vote,
    z_clip,
    z_channel,
    z_frame,
    e_vote,
    e_clip,
    e_channel,
    e_frame,
    t_clip,
    t_channel,
    t_frame,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < values
    pixels = height * width
    pixel = index % pixels
    rest = index // pixels
    frame = rest % frames
    rest = rest // frames
    channel = rest % channels
    rest = rest // channels
    clip = rest % clips
    vote = rest // clips

    sqrt_alpha = tl.load(coefficients_ptr + vote * 4, mask=mask, other=1.0)
    sqrt_beta = tl.load(coefficients_ptr + vote * 4 + 1, mask=mask, other=0.0)
    update = tl.load(coefficients_ptr + vote * 4 + 2, mask=mask, other=0.0)
    predicts_x0 = tl.load(coefficients_ptr + vote * 4 + 3, mask=mask, other=0.0)

    z_ptr = latents_ptr + vote * z_vote + clip * z_clip + channel * z_channel + frame * z_frame
    e_ptr = noise_ptr + vote * e_vote + clip * e_clip + channel * e_channel + frame * e_frame
    t_ptr = target_ptr + clip * t_clip + channel * t_channel + frame * t_frame
    z = tl.load(z_ptr + pixel, mask=mask, other=0.0)
    e = tl.load(e_ptr + pixel, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(t_ptr + pixel, mask=mask, other=0.0)
    p = (z - sqrt_beta * e) / sqrt_alpha

    # Positions with no pixel in reach, NaN with them, become 0 before the integer cast and load nothing.
    has_following = mask & (frame + 1 < frames)
    f_ptr = flow_ptr + (clip * (frames - 1) + frame) * 2 * pixels + pixel
    x = (pixel % width).to(tl.float32) + tl.load(f_ptr, mask=has_following, other=0.0)
    y = (pixel // width).to(tl.float32) + tl.load(f_ptr + pixels, mask=has_following, other=0.0)
    inside = has_following & (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    warped = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(4):
        tap_x = left.to(tl.int64) + i % 2
        tap_y = top.to(tl.int64) + i // 2
        weight_x = x - left if i % 2 == 1 else 1.0 - (x - left)
        weight_y = y - top if i // 2 == 1 else 1.0 - (y - top)
        within = inside & (tap_x >= 0) & (tap_x < width) & (tap_y >= 0) & (tap_y < height)
        at = tap_y * width + tap_x
        sample = _predict_x0(z_ptr + z_frame + at, e_ptr + e_frame + at, within, sqrt_alpha, sqrt_beta)
        warped += tl.where(within, weight_x * weight_y * sample, 0.0)

    residual = warped - p
    sign = (residual > 0.0).to(tl.float32) - (residual < 0.0).to(tl.float32)
    gradient = spatial * (p - target) + tl.where(has_following, temporal * sign, 0.0)
    optimised = z + update * gradient
    result = tl.where(predicts_x0 != 0.0, (optimised - sqrt_beta * e) / sqrt_alpha, optimised)
    tl.store(output_ptr + index, result, mask=mask)


@lru_cache(maxsize=16)
def _on_device(coefficients: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """The coefficients as a (V, 4) tensor. Kept, because a copy to the GPU would make every later call wait for it."""
    return torch.tensor(coefficients, dtype=torch.float32, device=device)


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Sequence[tuple[float, ...]],
    *,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """As reference.guided_update, for float32 latents, target and flow, and float32, float16 or bfloat16 noise.

    Frames (h, w) of latents, noise and target must be contiguous, and all of flow; ops.guided_update sees to it.
    """
    _, clips, channels, frames, height, width = latents.shape
    frame_values = channels * height * width
    output = torch.empty(latents.shape, dtype=torch.float32, device=latents.device)
    with torch.cuda.device_of(latents):
        _guided_update_kernel[(triton.cdiv(output.numel(), BLOCK),)](
            latents,
            noise,
            target,
            flow,
            output,
            _on_device(tuple(tuple(map(float, step)) for step in coefficients), latents.device),
            2 * spatial_weight / (frames * frame_values),
            temporal_weight / frame_values,
            output.numel(),
            clips,
            channels,
            frames,
            height,
            width,
            *latents.stride()[:4],
            *noise.stride()[:4],
            *target.stride()[:3],
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return output
