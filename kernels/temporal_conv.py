"""The convolution of SiLU(GroupNorm) over frames in Triton, channels last. reference.temporal_conv states the maths.

With channels last and frames above pixels, the three taps are one product of matrices: a row is a pixel of a frame, and
the taps before and after read the rows one frame up and down. The activations are either written out first, by
`group_norm_silu`, or computed as the product loads x, from a clip's coefficients of each channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu import coefficients, group_norm_silu
from .launch import architecture

# Reasoned and compiled for sm_80 and sm_90, not measured: rows, outputs and channels of a tile, warps, stages.
# The first that makes ENOUGH_TILES, or else the last.
ENOUGH_TILES = 96  # most SMs of a large GPU
TILES = {
    "half, sm_80": ((128, 128, 32, 8, 4), (64, 128, 32, 4, 4), (64, 64, 64, 4, 3)),
    "half, sm_90": ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4)),
    "half, odd channels": ((64, 64, 32, 8, 2),),  # not a multiple of 16: loaded one by one
    "float32": ((64, 64, 32, 8, 3), (32, 64, 32, 4, 3)),
}
# On load, an activation is computed for each tap and each block of outputs, at two special functions: 1/8 of an SM's
# cycle, in which its tensor cores do 256 multiply-adds on sm_90 and 128 on sm_80. Written out, it costs four bytes more
# traffic, about 1/4 of a cycle. So three times pay where the product itself waits for memory, with few outputs; six and
# more do not. Reasoned, not measured.
MOST_ON_LOAD = 3


@triton.jit(do_not_specialize=["rows", "pixels", "frames"])
def _temporal_conv_kernel(
    x_ptr,
    center_ptr,  # (samples, channels), as are scale and shift; None where x is normalized already
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    rows,  # of a sample, no part of a tile is in another
    pixels,
    frames,
    channels,
    outputs,
    x_sample,
    x_row,
    weight_tap,
    weight_output,
    weight_channel,
    residual_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(outputs, BLOCK_N)
    tile = tl.program_id(0) // blocks
    tiles = tl.cdiv(rows, BLOCK_M)
    sample = (tile // tiles).to(tl.int64)
    first_row = (tile % tiles).to(tl.int64) * BLOCK_M
    first_output = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N
    # Offsets within a tile fit 32 bits: half the registers of addresses.
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row = m < rows - first_row
    is_output = n < outputs - first_output
    frame = ((first_row + m) // pixels % frames).to(tl.int32)
    x_at = m[:, None] * x_row + k[None, :]
    weight_at = n[None, :] * weight_output + k[:, None] * weight_channel
    x_ptr += sample * x_sample + first_row * x_row
    weight_ptr += first_output * weight_output
    x_frame = tl.cast(pixels, tl.int64) * x_row
    weight_tap = tl.cast(weight_tap, tl.int64)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(3 * tl.cdiv(channels, BLOCK_K)):
        tap = step % 3
        channel = step // 3 * BLOCK_K
        is_channel = k < channels - channel
        inside = is_row & (frame + tap >= 1) & (frame + tap <= frames)
        x_tile_ptr = x_ptr + (tap - 1) * x_frame + channel
        x = tl.load(x_tile_ptr + x_at, mask=inside[:, None] & is_channel[None, :], other=0.0)
        if center_ptr is not None:
            at = sample * channels + channel + k
            center = tl.load(center_ptr + at, mask=is_channel, other=0.0)[None, :]
            scale = tl.load(scale_ptr + at, mask=is_channel, other=0.0)[None, :]
            shift = tl.load(shift_ptr + at, mask=is_channel, other=0.0)[None, :]
            y = (x.to(tl.float32) - center) * scale + shift
            x = tl.where(inside[:, None], y / (1.0 + tl.exp(-y)), 0.0).to(x.dtype)
        weight_tile_ptr = weight_ptr + tap * weight_tap + channel * weight_channel
        weight = tl.load(weight_tile_ptr + weight_at, mask=is_channel[:, None] & is_output[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")

    total += tl.load(bias_ptr + first_output + n, mask=is_output, other=0.0).to(tl.float32)[None, :]
    mask = is_row[:, None] & is_output[None, :]
    first_row += sample * rows
    if residual_ptr is not None:
        residual_ptr += first_row * residual_row + first_output
        total += tl.load(residual_ptr + m[:, None] * residual_row + n[None, :], mask=mask, other=0.0).to(tl.float32)
    output_ptr += first_row * outputs + first_output
    tl.store(output_ptr + m[:, None] * outputs + n[None, :], total, mask=mask)


def temporal_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    """As reference.temporal_conv, for float16, bfloat16 and float32."""
    clips, frames, height, width, channels = x.shape
    rows, outputs = clips * frames * height * width, len(bias)
    result = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if residual is not None:
        residual = _within_32_bits(residual.reshape(rows, outputs))
    with torch.cuda.device_of(x):
        block_m, block_n, block_k, warps, stages = _tile(x.dtype, rows, channels, outputs)
    if normalizes_on_load(outputs, block_n):
        x = _within_32_bits(x.reshape(clips, -1, channels))
        center, scale, shift = coefficients(x, norm_weight, norm_bias, groups, eps)
    else:
        # Clips need not be told apart, beyond their first and last frames.
        x = group_norm_silu(x, norm_weight, norm_bias, None, groups, eps, True, True).view(1, rows, channels)
        center = scale = shift = None
    samples, rows, _ = x.shape
    with torch.cuda.device_of(x):
        _temporal_conv_kernel[(samples * triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n),)](
            x,
            center,
            scale,
            shift,
            weight,
            bias.contiguous(),
            residual,
            result,
            rows,
            height * width,
            frames,
            channels,
            outputs,
            x.stride(0),
            x.stride(1),
            *weight.stride(),
            0 if residual is None else residual.stride(0),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return result


def normalizes_on_load(outputs: int, block_n: int) -> bool:
    """Whether a convolution with blocks of so many outputs computes activations as it loads x."""
    return 3 * triton.cdiv(outputs, block_n) <= MOST_ON_LOAD


def _tile(dtype: torch.dtype, rows: int, channels: int, outputs: int) -> tuple[int, ...]:
    if dtype == torch.float32:
        tiles = TILES["float32"]
    elif channels % 16:
        tiles = TILES["half, odd channels"]
    else:
        tiles = TILES["half, sm_90" if architecture() >= 90 else "half, sm_80"]
    for tile in tiles:
        if triton.cdiv(rows, tile[0]) * triton.cdiv(outputs, tile[1]) >= ENOUGH_TILES:
            break
    return tile


def _within_32_bits(x: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous, and its rows near enough for offsets of 32 bits within a tile."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**24 else x.contiguous()
