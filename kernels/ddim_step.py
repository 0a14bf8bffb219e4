"""A sampler's step in Triton, also in place. reference.ddim_step states the maths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # reasoned, measured on no GPU: a small op, bound by memory
NUM_WARPS = 4


# A batch of another size needs no new compilation.
@triton.jit(do_not_specialize=["clips", "channels", "frames", "height", "width"])
def _ddim_step_kernel(
    latents_ptr,
    noise_ptr,
    coefficients_ptr,
    output_ptr,  # may be the latents
    clips,
    channels,
    frames,
    height,
    width,
    z_clip,
    z_channel,
    z_frame,
    z_row,
    z_column,
    e_clip,
    e_channel,
    e_frame,
    e_row,
    e_column,
    c_clip,
    c_column,
    o_clip,
    o_channel,
    o_frame,
    o_row,
    o_column,
    BLOCK: tl.constexpr,
):
    # One division takes 64 bits; the planes of all frames, and the pixels of one, are counted in 32.
    pixels = height * width
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = (first % pixels).to(tl.int32) + tl.arange(0, BLOCK)
    plane = (first // pixels).to(tl.int32) + offset // pixels
    mask = plane < clips * channels * frames
    pixel = offset % pixels
    y = (pixel // width).to(tl.int64)
    x = (pixel % width).to(tl.int64)
    frame = (plane % frames).to(tl.int64)
    channel = (plane // frames % channels).to(tl.int64)
    clip = (plane // frames // channels).to(tl.int64)

    z_at = clip * z_clip + channel * z_channel + frame * z_frame + y * z_row + x * z_column
    e_at = clip * e_clip + channel * e_channel + frame * e_frame + y * e_row + x * e_column
    o_at = clip * o_clip + channel * o_channel + frame * o_frame + y * o_row + x * o_column
    scale = tl.load(coefficients_ptr + clip * c_clip, mask=mask, other=0.0)
    noise_scale = tl.load(coefficients_ptr + clip * c_clip + c_column, mask=mask, other=0.0)
    z = tl.load(latents_ptr + z_at, mask=mask, other=0.0)
    e = tl.load(noise_ptr + e_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + o_at, scale * z + noise_scale * e, mask=mask)


def ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    """As reference.ddim_step, for float32 latents (B, C, F, h, w) and coefficients (B, 2) of any strides."""
    output = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
    return _launch(latents, noise, coefficients, first_frame_noise, output)


def ddim_step_(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    """`ddim_step` in place."""
    return _launch(latents, noise, coefficients, first_frame_noise, latents)


def _launch(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool, output: Tensor) -> Tensor:
    if noise.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        noise = noise.float()
    if first_frame_noise:
        noise = noise[:, :, :1].expand(noise.shape)
    with torch.cuda.device_of(latents):
        _ddim_step_kernel[(triton.cdiv(latents.numel(), BLOCK),)](
            latents,
            noise,
            coefficients,
            output,
            *latents.shape,
            *latents.stride(),
            *noise.stride(),
            *coefficients.stride(),
            *output.stride(),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return output
