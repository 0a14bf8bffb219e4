"""The guided update of the votes' latents (arXiv 2501.14999, section 3) in Triton.

latents, noise: (V, B, C, F, h, w). target: (B, C, F, h, w). flow: (B, F-1, 2, h, w), in latent pixels.
coefficients: (V, B, 4): sqrt_alpha, sqrt_beta, update, predicts_x0. With

    x0(z) = (z - sqrt_beta * noise) / sqrt_alpha
    gradient = spatial * (x0(latents) - target) + temporal * sign(warp(the following frame's x0) - x0(latents))
    optimized = latents + update * gradient

it returns optimized (V, B, C, F, h, w), or x0(optimized) where predicts_x0 is not 0. The last frame has no second term.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import loadable, options, pixels_of_block

BLOCK = 512  # chosen by reasoning, not measured: a small op, bound by memory
NUM_WARPS = 4


@triton.jit
def _predict_x0(
    latents_ptr: tl.tensor, noise_ptr: tl.tensor, inside: tl.tensor, inverse_sqrt_alpha: tl.tensor, sqrt_beta: tl.tensor
) -> tl.tensor:
    latents = tl.load(latents_ptr, mask=inside, other=0.0)
    noise = tl.load(noise_ptr, mask=inside, other=0.0).to(tl.float32)
    return (latents - sqrt_beta * noise) * inverse_sqrt_alpha


# A batch of another size, or other loss weights, need no new compilation.
@triton.jit(do_not_specialize=["spatial", "temporal", "votes", "clips", "channels", "frames", "height", "width"])
def _guided_update_kernel(
    latents_ptr: tl.tensor,
    noise_ptr: tl.tensor,
    target_ptr: tl.tensor,
    flow_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    output_ptr: tl.tensor,  # contiguous
    spatial: tl.tensor,  # the factors of both losses' gradients
    temporal: tl.tensor,
    votes: tl.tensor,
    clips: tl.tensor,
    channels: tl.tensor,
    frames: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    latents_stride_vote: tl.tensor,
    latents_stride_clip: tl.tensor,
    latents_stride_channel: tl.tensor,
    latents_stride_frame: tl.tensor,
    latents_stride_y: tl.tensor,
    latents_stride_x: tl.tensor,
    noise_stride_vote: tl.tensor,
    noise_stride_clip: tl.tensor,
    noise_stride_channel: tl.tensor,
    noise_stride_frame: tl.tensor,
    noise_stride_y: tl.tensor,
    noise_stride_x: tl.tensor,
    target_stride_clip: tl.tensor,
    target_stride_channel: tl.tensor,
    target_stride_frame: tl.tensor,
    target_stride_y: tl.tensor,
    target_stride_x: tl.tensor,
    flow_stride_clip: tl.tensor,
    flow_stride_frame: tl.tensor,
    flow_stride_axis: tl.tensor,
    flow_stride_y: tl.tensor,
    flow_stride_x: tl.tensor,
    coefficients_stride_vote: tl.tensor,
    coefficients_stride_clip: tl.tensor,
    coefficients_stride_column: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    first, plane, pixel_y, pixel_x = pixels_of_block(height, width, BLOCK)
    inside = plane < votes * clips * channels * frames
    y = pixel_y.to(tl.int64)
    x = pixel_x.to(tl.int64)
    frame = (plane % frames).to(tl.int64)
    channel = (plane // frames % channels).to(tl.int64)
    clip = (plane // frames // channels % clips).to(tl.int64)
    vote = (plane // frames // channels // clips).to(tl.int64)

    coefficients_ptr += vote * coefficients_stride_vote + clip * coefficients_stride_clip
    # The operator / would not round to the nearest.
    inverse_sqrt_alpha = tl.div_rn(1.0, tl.load(coefficients_ptr, mask=inside, other=1.0))
    sqrt_beta = tl.load(coefficients_ptr + coefficients_stride_column, mask=inside, other=0.0)
    update = tl.load(coefficients_ptr + 2 * coefficients_stride_column, mask=inside, other=0.0)
    predicts_x0 = tl.load(coefficients_ptr + 3 * coefficients_stride_column, mask=inside, other=0.0)

    latents_ptr += vote * latents_stride_vote + clip * latents_stride_clip
    latents_ptr += channel * latents_stride_channel + frame * latents_stride_frame
    noise_ptr += vote * noise_stride_vote + clip * noise_stride_clip
    noise_ptr += channel * noise_stride_channel + frame * noise_stride_frame
    target_ptr += clip * target_stride_clip + channel * target_stride_channel + frame * target_stride_frame
    latents = tl.load(latents_ptr + y * latents_stride_y + x * latents_stride_x, mask=inside, other=0.0)
    noise = tl.load(noise_ptr + y * noise_stride_y + x * noise_stride_x, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + y * target_stride_y + x * target_stride_x, mask=inside, other=0.0)
    x0 = (latents - sqrt_beta * noise) * inverse_sqrt_alpha

    # Positions with no pixel in reach, NaN among them, become 0 before the integer cast and load nothing.
    has_following = inside & (frame + 1 < frames)
    flow_ptr += clip * flow_stride_clip + frame * flow_stride_frame + y * flow_stride_y + x * flow_stride_x
    sample_x = pixel_x.to(tl.float32) + tl.load(flow_ptr, mask=has_following, other=0.0)
    sample_y = pixel_y.to(tl.float32) + tl.load(flow_ptr + flow_stride_axis, mask=has_following, other=0.0)
    reached = has_following & (sample_x > -1.0) & (sample_x < width) & (sample_y > -1.0) & (sample_y < height)
    sample_x = tl.where(reached, sample_x, 0.0)
    sample_y = tl.where(reached, sample_y, 0.0)
    # The floor by a cast, which rounds towards zero: tl.floor takes a subnormal number for zero.
    left = sample_x.to(tl.int32)
    top = sample_y.to(tl.int32)
    left -= (sample_x < left.to(tl.float32)).to(tl.int32)
    top -= (sample_y < top.to(tl.float32)).to(tl.int32)
    right_weight = sample_x - left.to(tl.float32)
    bottom_weight = sample_y - top.to(tl.float32)
    warped = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(4):  # bilinear interpolation: the four pixels around a position
        tap_x = left.to(tl.int64) + i % 2
        tap_y = top.to(tl.int64) + i // 2
        weight_x = right_weight if i % 2 == 1 else 1.0 - right_weight
        weight_y = bottom_weight if i // 2 == 1 else 1.0 - bottom_weight
        tap_inside = reached & (tap_x >= 0) & (tap_x < width) & (tap_y >= 0) & (tap_y < height)
        latents_tap = latents_ptr + latents_stride_frame + tap_y * latents_stride_y + tap_x * latents_stride_x
        noise_tap = noise_ptr + noise_stride_frame + tap_y * noise_stride_y + tap_x * noise_stride_x
        sample = _predict_x0(latents_tap, noise_tap, tap_inside, inverse_sqrt_alpha, sqrt_beta)
        warped += tl.where(tap_inside, weight_x * weight_y * sample, 0.0)

    residual = warped - x0
    sign = (residual > 0.0).to(tl.float32) - (residual < 0.0).to(tl.float32)
    gradient = spatial * (x0 - target)
    gradient = tl.where(has_following, gradient + temporal * sign, gradient)
    optimized = latents + update * gradient
    result = tl.where(predicts_x0 != 0.0, (optimized - sqrt_beta * noise) * inverse_sqrt_alpha, optimized)
    tl.store(output_ptr + first + tl.arange(0, BLOCK), result, mask=inside)


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """As the op's reference, for float32 latents, target, flow and coefficients; all tensors of any strides."""
    noise = loadable(noise)
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
            **options(NUM_WARPS, contract=False),
        )
    return output
