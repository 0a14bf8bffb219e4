"""Attention over the frames of every pixel in Triton, alone or with the norm and the projection before it.

temporal_attention: qkv (B, F, H, W, 3C) -> (B, F, H, W, C), heads of C / heads channels.
norm_temporal_attention: x (B, F, H, W, C), weight (3D, C), position (F, C) or None -> (B, F, H, W, D), the attention of
linear(layer_norm(x) + position). Both have 64 frames at most, and return the dtype of their input.

A tile of BLOCK_M rows holds all frames of several pixels, row r frame r % F of pixel r // F, and scores between two
pixels are masked: so few frames still fill the matrix units, and no activation is permuted. A pixel that is not finite
spoils the other pixels of its tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense_rows, fills_gpu, options, precision


class AttentionTile(NamedTuple):
    """What one program computes of one head: block_m tokens, pixels x frames.

    block_k: channels multiplied at a time, of a head for temporal_attention, of tokens for norm_temporal_attention.
    """

    block_m: int
    block_k: int
    warps: int
    stages: int = 1

    def programs(self, pixels: int, frames: int) -> int:
        """How many programs, one a tile, cover the pixels of a clip for one head."""
        return triton.cdiv(pixels, self.block_m // frames)


# With 64 rows and more sm_90 has its widest matrix instructions. float32 multiplies outside the matrix units, where the
# scores between two pixels are wasted work, and its blocks are as large as the registers allow. None was measured; all
# compile without spills for sm_80 and sm_90.
CORE = AttentionTile(64, 64, 4)
CORE_FLOAT32 = AttentionTile(32, 16, 4)
CORE_FLOAT32_LONG = AttentionTile(64, 16, 8)  # for clips of more than 32 frames
FUSED = AttentionTile(128, 32, 8, 4)
FUSED_SMALL = AttentionTile(64, 32, 8, 4)  # reads the weight twice as often: for grids that do not fill a GPU
FUSED_NARROW = AttentionTile(64, 32, 4, 4)  # for heads of 32 channels at most, those of small models
MAX_FUSED_HEAD_DIM = 64


@triton.jit
def _rows_of_tile(
    tiles: tl.tensor, pixels: tl.tensor, heads: tl.tensor, FRAMES: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The clip and head of this program, and of each row its place in the tile, pixel, frame and mask.

    The heads of one tile run side by side, so that its tokens stay in the L2 cache.
    """
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads
    row = tl.arange(0, BLOCK_M)
    slot = row // FRAMES
    pixel = tile % tiles * (BLOCK_M // FRAMES) + slot
    rows_inside = (slot < BLOCK_M // FRAMES) & (pixel < pixels)
    return (tile // tiles).to(tl.int64), head, slot, pixel.to(tl.int64), (row % FRAMES).to(tl.int64), rows_inside


@triton.jit
def _softmax_within_pixels(scores: tl.tensor, slot: tl.tensor, exponent: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Unnormalized weights of each row over the rows of its own pixel, and their sums. [BLOCK_M, BLOCK_M], [BLOCK_M]

    slot: the pixel's place in the tile; the rows outside the tensor share theirs with none inside.
    exponent: log2(e) times the scale of the scores.
    """
    scores = tl.where(slot[:, None] == slot[None, :], scores * exponent, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit(do_not_specialize=["tiles", "pixels"])
def _temporal_attention_kernel(
    qkv_ptr: tl.tensor,
    output_ptr: tl.tensor,  # (B, F, pixels, C), contiguous
    tiles: tl.tensor,
    pixels: tl.tensor,
    heads: tl.tensor,
    exponent: tl.tensor,
    qkv_stride_clip: tl.tensor,
    qkv_stride_frame: tl.tensor,
    qkv_stride_pixel: tl.tensor,
    FRAMES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # channels of a head at a time
) -> None:
    clip, head, slot, pixel, frame, rows_inside = _rows_of_tile(tiles, pixels, heads, FRAMES, BLOCK_M)
    channels = heads * HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    row_offset = clip * qkv_stride_clip + frame * qkv_stride_frame + pixel * qkv_stride_pixel
    q_ptr = qkv_ptr + row_offset[:, None] + head * HEAD_DIM + d[None, :]
    k_ptr = q_ptr + channels
    v_ptr = k_ptr + channels
    output_ptr += (((clip * FRAMES + frame) * pixels + pixel) * channels)[:, None] + head * HEAD_DIM + d[None, :]

    # The values are loaded before the scores are computed, which takes as long as the load.
    v = tl.load(v_ptr, mask=rows_inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    scores = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    for start in tl.static_range(0, HEAD_DIM, BLOCK_D):
        inside = rows_inside[:, None] & (start + d < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + start, mask=inside, other=0.0)
        k = tl.load(k_ptr + start, mask=inside, other=0.0)
        scores = tl.dot(q, k.T, scores, input_precision="ieee")
    weights, total = _softmax_within_pixels(scores, slot, exponent)
    weights = weights.to(v.dtype)
    for start in tl.static_range(0, HEAD_DIM, BLOCK_D):
        inside = rows_inside[:, None] & (start + d < HEAD_DIM)[None, :]
        if start > 0:
            v = tl.load(v_ptr + start, mask=inside, other=0.0)
        output = tl.dot(weights, v, input_precision="ieee") / total[:, None]
        tl.store(output_ptr + start, output.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles", "pixels"])
def _norm_temporal_attention_kernel(
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    norm_bias_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    position_ptr: tl.tensor | None,
    output_ptr: tl.tensor,  # (B, F, pixels, D), contiguous
    tiles: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    heads: tl.tensor,
    exponent: tl.tensor,
    eps: tl.tensor,
    x_stride_clip: tl.tensor,
    x_stride_frame: tl.tensor,
    x_stride_pixel: tl.tensor,
    weight_stride_row: tl.tensor,
    position_stride_frame: tl.tensor,
    FRAMES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # all channels of a head, padded
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    clip, head, slot, pixel, frame, rows_inside = _rows_of_tile(tiles, pixels, heads, FRAMES, BLOCK_M)
    inner = heads * HEAD_DIM
    x_ptr += (clip * x_stride_clip + frame * x_stride_frame + pixel * x_stride_pixel)[:, None]
    offset = tl.arange(0, BLOCK_K)
    # Where a loop may not run at all, ptxas waits after each matrix instruction.
    tl.assume(channels > 0)

    # Mean and sum of squared deviations, merged block by block (Chan et al. 1979): one pass, and exact at any mean.
    mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    deviation = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in tl.range(0, channels, BLOCK_K, num_stages=NUM_STAGES):
        channel = start + offset
        channels_inside = channel < channels
        inside = rows_inside[:, None] & channels_inside[None, :]
        x = tl.load(x_ptr + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(channels - start, BLOCK_K).to(tl.float32)
        block_mean = tl.sum(x, 1) / count
        centered = tl.where(channels_inside[None, :], x - block_mean[:, None], 0.0)
        delta = block_mean - mean
        mean += delta * (count / (start + count))
        deviation += tl.sum(centered * centered, 1) + delta * delta * (start * count / (start + count))
    # The rows outside become the bias: finite, whatever eps is.
    scale = tl.where(rows_inside, 1.0 / tl.sqrt(deviation / channels + eps), 0.0)

    d = tl.arange(0, BLOCK_D)
    columns_inside = d < HEAD_DIM
    row = (head * HEAD_DIM + d).to(tl.int64)[None, :]  # [1, BLOCK_D]: the transpose of the weight is read
    q_ptr = weight_ptr + row * weight_stride_row
    k_ptr = weight_ptr + (row + inner) * weight_stride_row
    v_ptr = weight_ptr + (row + 2 * inner) * weight_stride_row
    q = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    k = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    v = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in tl.range(0, channels, BLOCK_K, num_stages=NUM_STAGES):
        channel = start + offset
        channels_inside = channel < channels
        inside = rows_inside[:, None] & channels_inside[None, :]
        x = tl.load(x_ptr + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + channel, mask=channels_inside, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + channel, mask=channels_inside, other=0.0).to(tl.float32)
        tokens = (x - mean[:, None]) * scale[:, None] * norm_weight[None, :] + norm_bias[None, :]
        if position_ptr is not None:
            position = position_ptr + (frame * position_stride_frame)[:, None] + channel[None, :]
            tokens += tl.load(position, mask=channels_inside[None, :], other=0.0).to(tl.float32)
        tokens = tokens.to(x_ptr.dtype.element_ty)
        weight_inside = channels_inside[:, None] & columns_inside[None, :]
        q = tl.dot(tokens, tl.load(q_ptr + channel[:, None], mask=weight_inside, other=0.0), q)
        k = tl.dot(tokens, tl.load(k_ptr + channel[:, None], mask=weight_inside, other=0.0), k)
        v = tl.dot(tokens, tl.load(v_ptr + channel[:, None], mask=weight_inside, other=0.0), v)

    # The storage dtype between projection and scores, as in the unfused chain.
    dtype = x_ptr.dtype.element_ty
    weights, total = _softmax_within_pixels(tl.dot(q.to(dtype), k.to(dtype).T), slot, exponent)
    output = tl.dot(weights.to(dtype), v.to(dtype)) / total[:, None]
    output_ptr += (((clip * FRAMES + frame) * pixels + pixel) * inner)[:, None] + head * HEAD_DIM + d[None, :]
    tl.store(output_ptr, output.to(dtype), mask=rows_inside[:, None] & columns_inside[None, :])


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32 and 64 frames at most."""
    head_dim = qkv.shape[-1] // 3 // heads
    output = qkv.new_empty(*qkv.shape[:-1], heads * head_dim)
    qkv = _merge_pixels(qkv)
    clips, frames, pixels, _ = qkv.shape
    tile = CORE
    if precision(qkv.dtype) == "float32":
        tile = CORE_FLOAT32 if frames <= CORE_FLOAT32.block_m else CORE_FLOAT32_LONG
    tiles = tile.programs(pixels, frames)
    with torch.cuda.device_of(qkv):
        _temporal_attention_kernel[(clips * tiles * heads,)](
            qkv,
            output,
            tiles,
            pixels,
            heads,
            _exponent(head_dim),
            *qkv.stride()[:3],
            FRAMES=frames,
            HEAD_DIM=head_dim,
            BLOCK_M=tile.block_m,
            BLOCK_D=min(_padded(head_dim), tile.block_k),
            **options(tile.warps, tile.stages),
        )
    return output


def norm_temporal_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: Tensor | None, heads: int, eps: float
) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32 and 64 frames at most.

    One kernel for float16 and bfloat16, heads of 64 channels at most and multiples of 16 channels. Larger heads have
    too few registers for it, and float32 no matrix units: they call the attention kernel after torch's norm and linear.
    """
    head_dim = len(weight) // 3 // heads
    if precision(x.dtype) == "float32" or head_dim > MAX_FUSED_HEAD_DIM or x.shape[-1] % 16:
        tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        if position is not None:
            tokens += position[:, None, None]
        return temporal_attention(F.linear(tokens, weight), heads)
    output = x.new_empty(*x.shape[:-1], heads * head_dim)
    x, weight = _merge_pixels(x), dense_rows(weight)
    position = None if position is None else dense_rows(position)
    clips, frames, pixels, channels = x.shape
    tile = FUSED
    if head_dim <= 32:
        tile = FUSED_NARROW
    elif not fills_gpu(clips * FUSED.programs(pixels, frames) * heads):
        tile = FUSED_SMALL
    tiles = tile.programs(pixels, frames)
    with torch.cuda.device_of(x):
        _norm_temporal_attention_kernel[(clips * tiles * heads,)](
            x,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            weight,
            position,
            output,
            tiles,
            pixels,
            channels,
            heads,
            _exponent(head_dim),
            eps,
            *x.stride()[:3],
            weight.stride(0),
            0 if position is None else position.stride(0),
            FRAMES=frames,
            HEAD_DIM=head_dim,
            BLOCK_M=tile.block_m,
            BLOCK_D=_padded(head_dim),
            BLOCK_K=tile.block_k,
            NUM_STAGES=tile.stages,
            **options(tile.warps, tile.stages),
        )
    return output


def _merge_pixels(x: Tensor) -> Tensor:
    """(B, F, H, W, C) as (B, F, pixels, C) whose channels are contiguous: a view of a channels-last tensor."""
    return dense_rows(x.flatten(2, 3))


def _exponent(head_dim: int) -> float:
    """What the scores are multiplied by under a power of two: attention scales them by head_dim ** -0.5."""
    return math.log2(math.e) / math.sqrt(head_dim)


def _padded(head_dim: int) -> int:
    """A head's channels as the matrix units take them: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))
