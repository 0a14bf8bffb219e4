"""Attention over the frames of every pixel in Triton, alone or after the norm and the projection that torch computes.

temporal_attention: qkv (B, F, H, W, 3C) -> (B, F, H, W, C), heads of C / heads channels.
norm_temporal_attention: x (B, F, H, W, C), weight (3D, C), position (F, C) or None -> (B, F, H, W, D), the attention of
linear(layer_norm(x) + position). Both have 64 frames at most, and return the dtype of their input.

A tile of BLOCK_M rows holds all frames of several pixels, and scores between two pixels are masked: so few frames still
fill the matrix units, and no activation is permuted. A pixel that is not finite spoils the other pixels of its tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense_rows, options, precision


class AttentionTile(NamedTuple):
    """What one program computes of one head: block_m tokens, all frames of as many pixels as there is room for.

    block_k: channels multiplied at a time, of a head, or of tokens where a projection is in the same kernel.
    """

    block_m: int
    block_k: int
    warps: int
    stages: int = 1

    def block(self, frames: int) -> tuple[int, int]:
        """The tokens as frames x pixels, powers of two. A tile's row is frame * pixels + pixel."""
        block_frames = triton.next_power_of_2(frames)
        return block_frames, self.block_m // block_frames

    def programs(self, pixels: int, frames: int) -> int:
        """How many programs, one a tile, cover the pixels of a clip for one head."""
        return triton.cdiv(pixels, self.block(frames)[1])


# With 64 rows and more sm_90 has its widest matrix instructions; on an H200 32 and 128 rows took as long, within 5 %.
# float32 multiplies outside the matrix units, where the scores between two pixels are wasted work, and its blocks are
# as large as the registers allow. All compile without spills for sm_80 and sm_90.
CORE = AttentionTile(64, 64, 4)
CORE_FLOAT32 = AttentionTile(32, 16, 4)
CORE_FLOAT32_LONG = AttentionTile(64, 16, 8)  # for clips of more than 32 frames


@triton.jit
def rows_of_tile(
    tiles: tl.tensor, pixels: tl.tensor, heads: tl.tensor, FRAMES: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The clip, head and first pixel of this program; and of each row its slots, pixel, frame and mask.

    A row's slot is its pixel's place in the tile; as a key it has none where the clip has no such frame. Pixel and
    frame are the last ones in rows outside the clip, which thus load what is there. The heads of one tile run side by
    side, so that its tokens stay in the L2 cache.
    """
    BLOCK_F: tl.constexpr = triton.next_power_of_2(FRAMES)
    BLOCK_PIXELS: tl.constexpr = BLOCK_M // BLOCK_F
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    clip = tile // tiles
    first = tile % tiles * BLOCK_PIXELS
    slot = tl.arange(0, BLOCK_M) % BLOCK_PIXELS
    frame = tl.arange(0, BLOCK_M) // BLOCK_PIXELS
    key_slot = tl.where(frame < FRAMES, slot, -1)
    rows_inside = (frame < FRAMES) & (first + slot < pixels)
    pixel = tl.minimum(first + slot, pixels - 1).to(tl.int64)
    return clip, head, first, slot, key_slot, pixel, tl.minimum(frame, FRAMES - 1).to(tl.int64), rows_inside


@triton.jit
def softmax_within_pixels(
    scores: tl.tensor, slot: tl.tensor, key_slot: tl.tensor, exponent: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Unnormalized weights of each row over the rows of its own pixel, and their sums. [BLOCK_M, BLOCK_M], [BLOCK_M]

    exponent: log2(e) times the scale of the scores.
    """
    scores = tl.where(slot[:, None] == key_slot[None, :], scores, float("-inf"))
    weights = tl.exp2(scores * exponent - (tl.max(scores, 1) * exponent)[:, None])
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
    clip, head, _, slot, key_slot, pixel, frame, rows_inside = rows_of_tile(tiles, pixels, heads, FRAMES, BLOCK_M)
    clip = clip.to(tl.int64)
    channels = heads * HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    row_offset = clip * qkv_stride_clip + frame * qkv_stride_frame + pixel * qkv_stride_pixel
    q_ptr = qkv_ptr + row_offset[:, None] + head * HEAD_DIM + d[None, :]
    k_ptr = q_ptr + channels
    v_ptr = k_ptr + channels
    output_ptr += (((clip * FRAMES + frame) * pixels + pixel) * channels)[:, None] + head * HEAD_DIM + d[None, :]

    # The values are loaded before the scores are computed, which takes as long as the load.
    v = tl.load(v_ptr, mask=(d < HEAD_DIM)[None, :], other=0.0)
    scores = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    # A loop that is not unrolled: unrolled, the loads of large heads in float32 spill.
    for start in tl.range(0, HEAD_DIM, BLOCK_D):
        inside = (start + d < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + start, mask=inside, other=0.0)
        k = tl.load(k_ptr + start, mask=inside, other=0.0)
        scores = tl.dot(q, k.T, scores, input_precision="ieee")
    weights, total = softmax_within_pixels(scores, slot, key_slot, exponent)
    weights = weights.to(v.dtype)
    scale = (1.0 / total)[:, None]
    for start in tl.static_range(0, HEAD_DIM, BLOCK_D):
        inside = (start + d < HEAD_DIM)[None, :]
        if start > 0:
            v = tl.load(v_ptr + start, mask=inside, other=0.0)
        output = tl.dot(weights, v, input_precision="ieee") * scale
        tl.store(output_ptr + start, output.to(output_ptr.dtype.element_ty), mask=rows_inside[:, None] & inside)


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32 and 64 frames at most."""
    head_dim = qkv.shape[-1] // 3 // heads
    output = qkv.new_empty(*qkv.shape[:-1], heads * head_dim)
    qkv = merge_pixels(qkv)
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
            exponent_of(head_dim),
            *qkv.stride()[:3],
            FRAMES=frames,
            HEAD_DIM=head_dim,
            BLOCK_M=tile.block_m,
            BLOCK_D=min(padded(head_dim), tile.block_k),
            **options(tile.warps, tile.stages),
        )
    return output


def norm_temporal_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: Tensor | None, heads: int, eps: float
) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32 and 64 frames at most."""
    tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if position is not None:
        tokens += position[:, None, None]
    return temporal_attention(F.linear(tokens, weight), heads)


def merge_pixels(x: Tensor) -> Tensor:
    """(B, F, H, W, C) as (B, F, pixels, C) whose channels are contiguous: a view of a channels-last tensor."""
    return dense_rows(x.flatten(2, 3))


def exponent_of(head_dim: int) -> float:
    """What the scores are multiplied by under a power of two: attention scales them by head_dim ** -0.5."""
    return math.log2(math.e) / math.sqrt(head_dim)


def padded(head_dim: int) -> int:
    """A head's channels as the matrix units take them: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))
