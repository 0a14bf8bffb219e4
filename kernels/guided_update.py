"""The guided update in Triton, for GPUs on machines without nvcc. reference.guided_update states the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # reasoned, measured on no GPU: a small op, bound by memory
NUM_WARPS = 4


@triton.jit
def _predict_x0(z_ptr, e_ptr, mask, inverse_sqrt_alpha, sqrt_beta):
    z = tl.load(z_ptr, mask=mask, other=0.0)
    e = tl.load(e_ptr, mask=mask, other=0.0).to(tl.float32)
    return (z - sqrt_beta * e) * inverse_sqrt_alpha


# A batch of another size, or other weights, need no new compilation.
@triton.jit(do_not_specialize=["spatial", "temporal", "votes", "clips", "channels", "frames", "height", "width"])
def _guided_update_kernel(
    latents_ptr,
    noise_ptr,
    target_ptr,
    flow_ptr,
    coefficients_ptr,
    output_ptr,  # contiguous
    spatial,
    temporal,
    votes,
    clips,
    channels,
    frames,
    height,
    width,
    z_vote,
    z_clip,
    z_channel,
    z_frame,
    z_row,
    z_column,
    e_vote,
    e_clip,
    e_channel,
    e_frame,
    e_row,
    e_column,
    t_clip,
    t_channel,
    t_frame,
    t_row,
    t_column,
    f_clip,
    f_frame,
    f_axis,
    f_row,
    f_column,
    c_vote,
    c_clip,
    c_column,
    BLOCK: tl.constexpr,
):
    # One division takes 64 bits; the planes of all frames, and the pixels of one, are counted in 32.
    pixels = height * width
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = (first % pixels).to(tl.int32) + tl.arange(0, BLOCK)
    plane = (first // pixels).to(tl.int32) + offset // pixels
    mask = plane < votes * clips * channels * frames
    pixel = offset % pixels
    pixel_y = pixel // width
    pixel_x = pixel % width
    y = pixel_y.to(tl.int64)
    x = pixel_x.to(tl.int64)
    frame = (plane % frames).to(tl.int64)
    channel = (plane // frames % channels).to(tl.int64)
    clip = (plane // frames // channels % clips).to(tl.int64)
    vote = (plane // frames // channels // clips).to(tl.int64)

    c_ptr = coefficients_ptr + vote * c_vote + clip * c_clip
    inverse_sqrt_alpha = 1.0 / tl.load(c_ptr, mask=mask, other=1.0)
    sqrt_beta = tl.load(c_ptr + c_column, mask=mask, other=0.0)
    update = tl.load(c_ptr + 2 * c_column, mask=mask, other=0.0)
    predicts_x0 = tl.load(c_ptr + 3 * c_column, mask=mask, other=0.0)

    z_ptr = latents_ptr + vote * z_vote + clip * z_clip + channel * z_channel + frame * z_frame
    e_ptr = noise_ptr + vote * e_vote + clip * e_clip + channel * e_channel + frame * e_frame
    t_ptr = target_ptr + clip * t_clip + channel * t_channel + frame * t_frame
    z = tl.load(z_ptr + y * z_row + x * z_column, mask=mask, other=0.0)
    e = tl.load(e_ptr + y * e_row + x * e_column, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(t_ptr + y * t_row + x * t_column, mask=mask, other=0.0)
    p = (z - sqrt_beta * e) * inverse_sqrt_alpha

    # Positions with no pixel in reach, NaN with them, become 0 before the integer cast and load nothing.
    has_following = mask & (frame + 1 < frames)
    f_ptr = flow_ptr + clip * f_clip + frame * f_frame + y * f_row + x * f_column
    sample_x = pixel_x.to(tl.float32) + tl.load(f_ptr, mask=has_following, other=0.0)
    sample_y = pixel_y.to(tl.float32) + tl.load(f_ptr + f_axis, mask=has_following, other=0.0)
    inside = has_following & (sample_x > -1.0) & (sample_x < width) & (sample_y > -1.0) & (sample_y < height)
    sample_x = tl.where(inside, sample_x, 0.0)
    sample_y = tl.where(inside, sample_y, 0.0)
    left = tl.floor(sample_x)
    top = tl.floor(sample_y)
    warped = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(4):
        tap_x = left.to(tl.int64) + i % 2
        tap_y = top.to(tl.int64) + i // 2
        weight_x = sample_x - left if i % 2 == 1 else 1.0 - (sample_x - left)
        weight_y = sample_y - top if i // 2 == 1 else 1.0 - (sample_y - top)
        within = inside & (tap_x >= 0) & (tap_x < width) & (tap_y >= 0) & (tap_y < height)
        z_tap = z_ptr + z_frame + tap_y * z_row + tap_x * z_column
        e_tap = e_ptr + e_frame + tap_y * e_row + tap_x * e_column
        sample = _predict_x0(z_tap, e_tap, within, inverse_sqrt_alpha, sqrt_beta)
        warped += tl.where(within, weight_x * weight_y * sample, 0.0)

    residual = warped - p
    sign = (residual > 0.0).to(tl.float32) - (residual < 0.0).to(tl.float32)
    gradient = spatial * (p - target) + tl.where(has_following, temporal * sign, 0.0)
    optimized = z + update * gradient
    result = tl.where(predicts_x0 != 0.0, (optimized - sqrt_beta * e) * inverse_sqrt_alpha, optimized)
    tl.store(output_ptr + first + tl.arange(0, BLOCK), result, mask=mask)


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """As reference.guided_update, for float32 latents, target, flow and coefficients; all tensors of any strides."""
    if noise.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        noise = noise.float()
    _, _, channels, frames, height, width = latents.shape
    frame_values = channels * height * width
    output = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
    with torch.cuda.device_of(latents):
        _guided_update_kernel[(triton.cdiv(output.numel(), BLOCK),)](
            latents,
            noise,
            target,
            flow,
            coefficients,
            output,
            2 * spatial_weight / (frames * frame_values),
            temporal_weight / frame_values,
            *latents.shape,
            *latents.stride(),
            *noise.stride(),
            *target.stride(),
            *flow.stride(),
            *coefficients.stride(),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return output
