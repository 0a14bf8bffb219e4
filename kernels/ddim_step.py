"""One step of the DDIM sampler in Triton, out of place and in place.

latents, noise: (B, C, F, h, w). coefficients: (B, 2), a scale of the latents and one of the noise for each clip.
Returns scale * latents + noise_scale * noise, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import loadable, options, pixels_of_block

BLOCK = 512  # chosen by reasoning, not measured: a small op, bound by memory
NUM_WARPS = 4


# A batch of another size needs no new compilation.
@triton.jit(do_not_specialize=["clips", "channels", "frames", "height", "width"])
def _ddim_step_kernel(
    latents_ptr: tl.tensor,
    noise_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    output_ptr: tl.tensor,  # may be the latents
    clips: tl.tensor,
    channels: tl.tensor,
    frames: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    latents_stride_clip: tl.tensor,
    latents_stride_channel: tl.tensor,
    latents_stride_frame: tl.tensor,
    latents_stride_y: tl.tensor,
    latents_stride_x: tl.tensor,
    noise_stride_clip: tl.tensor,
    noise_stride_channel: tl.tensor,
    noise_stride_frame: tl.tensor,
    noise_stride_y: tl.tensor,
    noise_stride_x: tl.tensor,
    coefficients_stride_clip: tl.tensor,
    coefficients_stride_column: tl.tensor,
    output_stride_clip: tl.tensor,
    output_stride_channel: tl.tensor,
    output_stride_frame: tl.tensor,
    output_stride_y: tl.tensor,
    output_stride_x: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    _, plane, y, x = pixels_of_block(height, width, BLOCK)
    inside = plane < clips * channels * frames
    y = y.to(tl.int64)
    x = x.to(tl.int64)
    frame = (plane % frames).to(tl.int64)
    channel = (plane // frames % channels).to(tl.int64)
    clip = (plane // frames // channels).to(tl.int64)

    latents_offset = clip * latents_stride_clip + channel * latents_stride_channel + frame * latents_stride_frame
    latents_offset += y * latents_stride_y + x * latents_stride_x
    noise_offset = clip * noise_stride_clip + channel * noise_stride_channel + frame * noise_stride_frame
    noise_offset += y * noise_stride_y + x * noise_stride_x
    output_offset = clip * output_stride_clip + channel * output_stride_channel + frame * output_stride_frame
    output_offset += y * output_stride_y + x * output_stride_x
    coefficients_ptr += clip * coefficients_stride_clip
    scale = tl.load(coefficients_ptr, mask=inside, other=0.0)
    noise_scale = tl.load(coefficients_ptr + coefficients_stride_column, mask=inside, other=0.0)
    latents = tl.load(latents_ptr + latents_offset, mask=inside, other=0.0)
    noise = tl.load(noise_ptr + noise_offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + output_offset, scale * latents + noise_scale * noise, mask=inside)


def ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    """As the op's reference, for float32 latents (B, C, F, h, w) and coefficients (B, 2) of any strides."""
    output = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
    return _launch(latents, noise, coefficients, first_frame_noise, output)


def ddim_step_(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    """`ddim_step` in place."""
    return _launch(latents, noise, coefficients, first_frame_noise, latents)


def _launch(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool, output: Tensor) -> Tensor:
    noise = loadable(noise)
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
            **options(NUM_WARPS, contract=False),
        )
    return output
