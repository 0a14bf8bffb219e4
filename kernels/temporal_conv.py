"""The convolution of SiLU(GroupNorm) over frames in Triton, channels last.

x: (B, F, H, W, C). weight: (3, N, C). residual: (B, F, H, W, N) or None. Returns the convolution of 3 frames, zeros
before the first and after the last, plus bias and residual: (B, F, H, W, N) in the dtype of x; sums are in float32.

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
from .launch import Tile, aligned, architecture, choose_tile, options, precision, rows_within_32_bits

# The largest first: the first of which there are enough to fill a GPU is taken, or else the last. Chosen by reasoning
# and compiled without spills for sm_80 and sm_90, not measured.
TILES = {
    "half, sm_80": (Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4), Tile(64, 64, 64, 4, 3)),
    "half, sm_90": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4)),
    "half, unaligned": (Tile(64, 64, 32, 8, 2),),  # channels are loaded one by one
    "float32": (Tile(64, 64, 32, 8, 3), Tile(32, 64, 32, 4, 3)),
}
# An activation computed on load is computed for each tap and each block of outputs, at two special functions: 1/8 of a
# multiprocessor's cycle, in which its tensor cores do 256 multiply-adds on sm_90 and 128 on sm_80. Written out, it
# costs four bytes more traffic, about 1/4 of a cycle. So three times pay where the product itself waits for memory,
# with few outputs; six and more do not. Chosen by reasoning, not measured.
MAX_ACTIVATIONS_PER_VALUE = 3


@triton.jit(do_not_specialize=["rows", "pixels", "frames"])
def _temporal_conv_kernel(
    x_ptr: tl.tensor,
    center_ptr: tl.tensor | None,  # (samples, inputs), as are scale and shift; None where x is normalized already
    scale_ptr: tl.tensor | None,
    shift_ptr: tl.tensor | None,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor | None,
    output_ptr: tl.tensor,  # contiguous
    rows: tl.tensor,  # of a sample: a tile has rows of one sample only
    pixels: tl.tensor,
    frames: tl.tensor,
    inputs: tl.tensor,
    columns: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    weight_stride_tap: tl.tensor,
    weight_stride_row: tl.tensor,
    weight_stride_input: tl.tensor,
    residual_stride_row: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    blocks = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) // blocks
    tiles = tl.cdiv(rows, BLOCK_M)
    sample = (tile // tiles).to(tl.int64)
    first_row = (tile % tiles).to(tl.int64) * BLOCK_M
    first_column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N
    # Offsets within a tile fit in 32 bits: addresses take half the registers.
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows_inside = row < rows - first_row
    columns_inside = column < columns - first_column
    frame = ((first_row + row) // pixels % frames).to(tl.int32)
    x_offset = row[:, None] * x_stride_row + k[None, :]
    weight_offset = column[None, :] * weight_stride_row + k[:, None] * weight_stride_input
    x_ptr += sample * x_stride_sample + first_row * x_stride_row
    weight_ptr += first_column * weight_stride_row
    x_stride_frame = tl.cast(pixels, tl.int64) * x_stride_row
    weight_stride_tap = tl.cast(weight_stride_tap, tl.int64)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(3 * tl.cdiv(inputs, BLOCK_K)):
        tap = step % 3
        start = step // 3 * BLOCK_K
        k_inside = k < inputs - start
        tap_inside = rows_inside & (frame + tap >= 1) & (frame + tap <= frames)
        x_tap_ptr = x_ptr + (tap - 1) * x_stride_frame + start
        x = tl.load(x_tap_ptr + x_offset, mask=tap_inside[:, None] & k_inside[None, :], other=0.0)
        if center_ptr is not None:
            channel = sample * inputs + start + k
            center = tl.load(center_ptr + channel, mask=k_inside, other=0.0)[None, :]
            scale = tl.load(scale_ptr + channel, mask=k_inside, other=0.0)[None, :]
            shift = tl.load(shift_ptr + channel, mask=k_inside, other=0.0)[None, :]
            y = (x.to(tl.float32) - center) * scale + shift
            x = tl.where(tap_inside[:, None], y / (1.0 + tl.exp(-y)), 0.0).to(x.dtype)
        weight_tap_ptr = weight_ptr + tap * weight_stride_tap + start * weight_stride_input
        weight = tl.load(weight_tap_ptr + weight_offset, mask=k_inside[:, None] & columns_inside[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")

    total += tl.load(bias_ptr + first_column + column, mask=columns_inside, other=0.0).to(tl.float32)[None, :]
    inside = rows_inside[:, None] & columns_inside[None, :]
    first_row += sample * rows
    if residual_ptr is not None:
        residual_ptr += first_row * residual_stride_row + first_column
        residual_ptr = residual_ptr + row[:, None] * residual_stride_row + column[None, :]
        total += tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
    output_ptr += first_row * columns + first_column
    tl.store(output_ptr + row[:, None] * columns + column[None, :], total, mask=inside)


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
    """As the op's reference, for float16, bfloat16 and float32."""
    clips, frames, height, width, inputs = x.shape
    rows, columns = clips * frames * height * width, len(bias)
    output = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if residual is not None:
        residual = rows_within_32_bits(residual.reshape(rows, columns))
    with torch.cuda.device_of(x):
        tile = _tile(x.dtype, rows, inputs, columns)
    center: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    if normalizes_on_load(columns, tile.block_n):
        x = rows_within_32_bits(x.reshape(clips, -1, inputs))
        center, scale, shift = coefficients(x, norm_weight, norm_bias, groups, eps)
    else:
        # All clips are one sample: the product tells them apart by their first and last frames alone.
        x = group_norm_silu(x, norm_weight, norm_bias, None, groups, eps, True, True).view(1, rows, inputs)
        center = scale = shift = None
    samples, rows, _ = x.shape
    with torch.cuda.device_of(x):
        _temporal_conv_kernel[(samples * tile.programs(rows, columns),)](
            x,
            center,
            scale,
            shift,
            weight,
            bias.contiguous(),
            residual,
            output,
            rows,
            height * width,
            frames,
            inputs,
            columns,
            x.stride(0),
            x.stride(1),
            *weight.stride(),
            0 if residual is None else residual.stride(0),
            **tile.blocks(),
            **options(tile.warps, tile.stages),
        )
    return output


def normalizes_on_load(columns: int, block_n: int) -> bool:
    """Whether a convolution to so many channels, in blocks of block_n, computes activations as it loads x."""
    return 3 * triton.cdiv(columns, block_n) <= MAX_ACTIVATIONS_PER_VALUE


def _tile(dtype: torch.dtype, rows: int, inputs: int, columns: int) -> Tile:
    kind = precision(dtype)
    if kind == "half":
        kind = "half, unaligned" if not aligned(inputs) else "half, sm_90" if architecture() >= 90 else "half, sm_80"
    return choose_tile(TILES[kind], rows, columns)
