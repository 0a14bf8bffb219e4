"""Attention over the frames of every pixel, with or without what precedes it. reference.py states the maths.

A tile of ROWS rows holds all frames of several pixels, row r frame r % F of pixel r // F, and scores between two pixels
are masked: so few frames still fill the matrix units, and no activation is permuted. A pixel that is not finite spoils
the other pixels of its tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """rows: of tokens, pixels x frames. block: channels multiplied at a time, of a head in the core, else of tokens."""

    rows: int
    warps: int
    block: int
    stages: int = 1


# Of 64 rows and more sm_90 makes its widest matrix instructions. float32 multiplies outside the matrix units: rows of
# other pixels are work for nothing there, and registers, not speed, set its blocks. No entry was measured; all compile
# without spills for sm_80 and sm_90.
CORE = Tile(64, 4, 64)
CORE_FLOAT32 = Tile(32, 4, 16)
CORE_FLOAT32_LONG = Tile(64, 8, 16)  # for clips of more than 32 frames
FUSED = Tile(128, 8, 32, 4)
FUSED_SMALL = Tile(64, 8, 32, 4)  # reads the weight twice as often: for grids that would leave a GPU half empty
FUSED_NARROW = Tile(64, 4, 32, 4)  # for heads of 32 channels at most, those of small models
ENOUGH_PROGRAMS = 108  # the multiprocessors of an A100; an H100 has 132
MOST_FUSED_HEAD = 64


@triton.jit
def _rows_of_tile(tiles, pixels, heads, FRAMES: tl.constexpr, ROWS: tl.constexpr):
    """The clip and head of this program, and of each row its place in the tile, pixel, frame and whether it exists.

    The heads of one tile run side by side, so that its tokens stay in the L2 cache.
    """
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads
    row = tl.arange(0, ROWS)
    slot = row // FRAMES
    pixel = tile % tiles * (ROWS // FRAMES) + slot
    exists = (slot < ROWS // FRAMES) & (pixel < pixels)
    return (tile // tiles).to(tl.int64), head, slot, pixel.to(tl.int64), (row % FRAMES).to(tl.int64), exists


@triton.jit
def _softmax_over_own(scores, slot, exponent):
    """Unnormalized weights of each row over the rows of its own pixel, and their sums. [ROWS, ROWS], [ROWS]

    exponent: log2(e) times the scale of the scores. Rows that do not exist share slots with none that do.
    """
    scores = tl.where(slot[:, None] == slot[None, :], scores * exponent, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, tl.sum(weights, 1)


@triton.jit(do_not_specialize=["tiles", "pixels"])
def _temporal_attention_kernel(
    qkv_ptr,
    output_ptr,  # (B, F, pixels, C), contiguous
    tiles,
    pixels,
    heads,
    exponent,
    s_clip,
    s_frame,
    s_pixel,
    FRAMES: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    clip, head, slot, pixel, frame, exists = _rows_of_tile(tiles, pixels, heads, FRAMES, ROWS)
    channels = heads * HEAD
    d = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + (clip * s_clip + frame * s_frame + pixel * s_pixel)[:, None] + head * HEAD + d[None, :]
    k_ptr = q_ptr + channels
    v_ptr = k_ptr + channels
    output_ptr += (((clip * FRAMES + frame) * pixels + pixel) * channels)[:, None] + head * HEAD + d[None, :]

    # The values are asked for before the scores, which hide the wait.
    v = tl.load(v_ptr, mask=exists[:, None] & (d < HEAD)[None, :], other=0.0)
    scores = tl.zeros([ROWS, ROWS], dtype=tl.float32)
    for start in tl.static_range(0, HEAD, BLOCK_D):
        mask = exists[:, None] & (start + d < HEAD)[None, :]
        q = tl.load(q_ptr + start, mask=mask, other=0.0)
        k = tl.load(k_ptr + start, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, scores, input_precision="ieee")
    weights, total = _softmax_over_own(scores, slot, exponent)
    weights = weights.to(v.dtype)
    for start in tl.static_range(0, HEAD, BLOCK_D):
        mask = exists[:, None] & (start + d < HEAD)[None, :]
        if start > 0:
            v = tl.load(v_ptr + start, mask=mask, other=0.0)
        output = tl.dot(weights, v, input_precision="ieee") / total[:, None]
        tl.store(output_ptr + start, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles", "pixels"])
def _norm_temporal_attention_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    position_ptr,
    output_ptr,  # (B, F, pixels, D), contiguous
    tiles,
    pixels,
    channels,
    heads,
    exponent,
    eps,
    s_clip,
    s_frame,
    s_pixel,
    s_weight,
    s_position,
    FRAMES: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    clip, head, slot, pixel, frame, exists = _rows_of_tile(tiles, pixels, heads, FRAMES, ROWS)
    inner = heads * HEAD
    x_ptr += (clip * s_clip + frame * s_frame + pixel * s_pixel)[:, None]
    lane = tl.arange(0, BLOCK_K)

    # Mean and sum of squared deviations, merged block by block (Chan et al. 1979): one pass, and exact at any mean.
    mean = tl.zeros([ROWS], dtype=tl.float32)
    deviation = tl.zeros([ROWS], dtype=tl.float32)
    for start in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
        k = start + lane
        x = tl.load(x_ptr + k[None, :], mask=exists[:, None] & (k < channels)[None, :], other=0.0).to(tl.float32)
        count = tl.minimum(channels - start, BLOCK_K).to(tl.float32)
        block_mean = tl.sum(x, 1) / count
        centered = tl.where((k < channels)[None, :], x - block_mean[:, None], 0.0)
        delta = block_mean - mean
        mean += delta * (count / (start + count))
        deviation += tl.sum(centered * centered, 1) + delta * delta * (start * count / (start + count))
    # Rows that do not exist become the bias: finite, whatever eps is.
    scale = tl.where(exists, 1.0 / tl.sqrt(deviation / channels + eps), 0.0)

    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD
    row = (head * HEAD + d).to(tl.int64)[None, :]  # [1, BLOCK_D]: the transpose of the weight is read
    q_ptr = weight_ptr + row * s_weight
    k_ptr = weight_ptr + (row + inner) * s_weight
    v_ptr = weight_ptr + (row + 2 * inner) * s_weight
    q = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    k = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    v = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for start in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
        c = start + lane
        within = c < channels
        x = tl.load(x_ptr + c[None, :], mask=exists[:, None] & within[None, :], other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + c, mask=within, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + c, mask=within, other=0.0).to(tl.float32)
        tokens = (x - mean[:, None]) * scale[:, None] * norm_weight[None, :] + norm_bias[None, :]
        if HAS_POSITION:
            position = position_ptr + (frame * s_position)[:, None] + c[None, :]
            tokens += tl.load(position, mask=within[None, :], other=0.0).to(tl.float32)
        tokens = tokens.to(x_ptr.dtype.element_ty)
        mask = within[:, None] & in_head[None, :]
        q = tl.dot(tokens, tl.load(q_ptr + c[:, None], mask=mask, other=0.0), q)
        k = tl.dot(tokens, tl.load(k_ptr + c[:, None], mask=mask, other=0.0), k)
        v = tl.dot(tokens, tl.load(v_ptr + c[:, None], mask=mask, other=0.0), v)

    # The storage dtype between projection and scores, as the unfused chain has it.
    dtype = x_ptr.dtype.element_ty
    weights, total = _softmax_over_own(tl.dot(q.to(dtype), k.to(dtype).T), slot, exponent)
    output = tl.dot(weights.to(dtype), v.to(dtype)) / total[:, None]
    output_ptr += (((clip * FRAMES + frame) * pixels + pixel) * inner)[:, None] + head * HEAD + d[None, :]
    tl.store(output_ptr, output.to(dtype), mask=exists[:, None] & in_head[None, :])


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """As reference.temporal_attention, for 64 frames at most. qkv: (B, F, H, W, 3C) -> (B, F, H, W, C)."""
    head = qkv.shape[-1] // 3 // heads
    output = qkv.new_empty(*qkv.shape[:-1], heads * head)
    qkv = _merge_pixels(qkv)
    clips, frames, pixels, _ = qkv.shape
    tile = CORE
    if qkv.dtype == torch.float32:
        tile = CORE_FLOAT32 if frames <= CORE_FLOAT32.rows else CORE_FLOAT32_LONG
    tiles = triton.cdiv(pixels, tile.rows // frames)
    with torch.cuda.device_of(qkv):
        _temporal_attention_kernel[(clips * tiles * heads,)](
            qkv,
            output,
            tiles,
            pixels,
            heads,
            math.log2(math.e) / math.sqrt(head),
            *qkv.stride()[:3],
            FRAMES=frames,
            HEAD=head,
            ROWS=tile.rows,
            BLOCK_D=min(_padded(head), tile.block),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return output


def norm_temporal_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: Tensor | None, heads: int, eps: float
) -> Tensor:
    """As reference.norm_temporal_attention, for 64 frames at most. x: (B, F, H, W, C) -> (B, F, H, W, D).

    One kernel for float16 and bfloat16, heads of 64 channels at most and multiples of 16 channels; others have no
    registers for it, or in float32 no matrix units, and come to the attention kernel by way of torch.
    """
    head = len(weight) // 3 // heads
    if x.dtype == torch.float32 or head > MOST_FUSED_HEAD or x.shape[-1] % 16:
        tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        if position is not None:
            tokens += position[:, None, None]
        return temporal_attention(F.linear(tokens, weight), heads)
    output = x.new_empty(*x.shape[:-1], heads * head)
    x, weight = _merge_pixels(x), _dense_rows(weight)
    position = None if position is None else _dense_rows(position)
    clips, frames, pixels, channels = x.shape
    tile = FUSED
    if head <= 32:
        tile = FUSED_NARROW
    elif clips * triton.cdiv(pixels, FUSED.rows // frames) * heads < ENOUGH_PROGRAMS:
        tile = FUSED_SMALL
    tiles = triton.cdiv(pixels, tile.rows // frames)
    with torch.cuda.device_of(x):
        _norm_temporal_attention_kernel[(clips * tiles * heads,)](
            x,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            weight,
            weight if position is None else position,
            output,
            tiles,
            pixels,
            channels,
            heads,
            math.log2(math.e) / math.sqrt(head),
            eps,
            *x.stride()[:3],
            weight.stride(0),
            0 if position is None else position.stride(0),
            FRAMES=frames,
            HEAD=head,
            HAS_POSITION=position is not None,
            ROWS=tile.rows,
            BLOCK_D=_padded(head),
            BLOCK_K=tile.block,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return output


def _merge_pixels(x: Tensor) -> Tensor:
    """(B, F, H, W, C) as (B, F, pixels, C) whose channels are neighbors: a view of a channels-last tensor."""
    return _dense_rows(x.flatten(2, 3))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(head: int) -> int:
    """A head's channels as the matrix units take them."""
    return max(16, triton.next_power_of_2(head))
