"""Attention over the frames of every pixel in Triton, its folded LayerNorm and projection in the same kernel or before.

x: (B, F, H, W, C), 64 frames at most. moments: of the rows of x. weight: (3D, C), folded. Returns (B, F, H, W, D).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .folded_linear import folded_linear
from .launch import aligned, has_wgmma, options, precision
from .moments import part_columns, row_norm
from .temporal_attention import (
    AttentionTile,
    exponent_of,
    merge_pixels,
    padded,
    rows_of_tile,
    softmax_within_pixels,
    temporal_attention,
)
from .tuned import choose, nearby

# Chosen by reasoning, not measured; the first is taken where nothing is. All compile without spills by triton 3.6 and
# 3.9. On sm_90, whose tiles are loaded by tensor descriptors, 171 to 198 registers and 88 KiB of shared memory let two
# programs share a multiprocessor, so that one computes a softmax while the other multiplies. Twice the rows halve what
# is read of the weight, but leave room for one program alone.
DESCRIBED_TILES = (AttentionTile(64, 64, 4, 3), AttentionTile(64, 64, 4, 2), AttentionTile(128, 64, 8, 3))
POINTER_TILES = (AttentionTile(64, 32, 4, 4),)
# In place of a tile: the projection is a kernel of its own.
UNFUSED = "unfused"
# The fewest columns of a head that are multiplied at a time on sm_90: for 16, ptxas waits after each instruction.
MIN_DESCRIBED_COLUMNS = 32
# Heads of more channels have too few registers in one kernel.
MAX_FUSED_HEAD_DIM = 64
# The width from which on the projection is a kernel of its own, where nothing was measured. The fused kernel reads 8 C
# bytes of x and the weight for each token and head from the L2 cache: C^2 / 8 bytes a token for heads of 64, which at
# 8 TB/s takes as long as their products at 384 TFLOP/s. Two kernels multiply at 550 TFLOP/s, but write and read 6 C
# bytes a token and write 2 C, at 3.4 TB/s: C^2 / 64e12 seconds against 6 C^2 / 550e12 + 8 C / 3.4e12, equal at C = 500.
UNFUSED_CHANNELS = 512


@triton.jit
def _normalized(
    total: tl.tensor,  # [BLOCK_M, BLOCK_D], tokens times folded weight
    mean: tl.tensor,
    rstd: tl.tensor,
    weight_sums_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    column: tl.tensor,
    HEAD_DIM: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Queries, keys or values of a head in the storage dtype, as the unfused chain has them; zero beyond the head."""
    weight_sums = tl.load(weight_sums_ptr + column)
    bias = tl.load(bias_ptr + column).to(tl.float32)
    total = total * rstd[:, None] + (bias[None, :] - (mean * rstd)[:, None] * weight_sums[None, :])
    if HEAD_DIM < total.shape[1]:
        total = tl.where((tl.arange(0, total.shape[1]) < HEAD_DIM)[None, :], total, 0.0)
    return total.to(dtype)


@triton.jit(do_not_specialize=["tiles", "pixels"])
def _folded_temporal_attention_kernel(
    x: tl.tensor,  # (B, F, pixels, C); a descriptor or a pointer, as is weight
    moments_ptr: tl.tensor,  # (B, F, pixels, parts, 2), contiguous
    weight: tl.tensor,  # (3D, C)
    weight_sums_ptr: tl.tensor,
    bias_ptr: tl.tensor,
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
    FRAMES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # all channels of a head, padded
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    # Where the loop over channels may not run at all, ptxas waits after each matrix instruction of sm_90.
    tl.assume(channels > 0)
    clip, head, first, slot, key_slot, pixel, frame, rows_inside = rows_of_tile(tiles, pixels, heads, FRAMES, BLOCK_M)
    inner = heads * HEAD_DIM
    start_of_head = head * HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    column = start_of_head + (d if HEAD_DIM == BLOCK_D else tl.minimum(d, HEAD_DIM - 1))

    q = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    k = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    v = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if TMA:
        # Frames, pixels and channels outside are zero. Columns beyond the head are the next one's.
        for start in tl.range(0, channels, BLOCK_K, num_stages=NUM_STAGES):
            tokens = x.load([clip, 0, first, start]).reshape(BLOCK_M, BLOCK_K)
            q = tl.dot(tokens, weight.load([start_of_head, start]).T, q)
            k = tl.dot(tokens, weight.load([start_of_head + inner, start]).T, k)
            v = tl.dot(tokens, weight.load([start_of_head + 2 * inner, start]).T, v)
    else:
        offset = tl.arange(0, BLOCK_K)
        row_offset = clip.to(tl.int64) * x_stride_clip + frame * x_stride_frame + pixel * x_stride_pixel
        x_ptr = x + row_offset[:, None] + offset[None, :]
        # One block of addresses, which moves on: three would spill.
        q_ptr = weight + (column.to(tl.int64) * weight_stride_row)[None, :] + offset[:, None]
        k_offset = tl.cast(inner, tl.int64) * weight_stride_row
        for start in tl.range(0, channels, BLOCK_K, num_stages=NUM_STAGES):
            inside = start + offset < channels
            tokens = tl.load(x_ptr, mask=inside[None, :], other=0.0)
            q_weight = tl.load(q_ptr, mask=inside[:, None], other=0.0)
            k_weight = tl.load(q_ptr + k_offset, mask=inside[:, None], other=0.0)
            v_weight = tl.load(q_ptr + 2 * k_offset, mask=inside[:, None], other=0.0)
            q = tl.dot(tokens, q_weight, q)
            k = tl.dot(tokens, k_weight, k)
            v = tl.dot(tokens, v_weight, v)
            x_ptr += BLOCK_K
            q_ptr += BLOCK_K

    token = (clip.to(tl.int64) * FRAMES + frame) * pixels + pixel
    mean, rstd = row_norm(moments_ptr, token, channels, eps, PART, PARTS)
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    queries = _normalized(q, mean, rstd, weight_sums_ptr, bias_ptr, column, HEAD_DIM, dtype)
    keys = _normalized(k, mean, rstd, weight_sums_ptr, bias_ptr, column + inner, HEAD_DIM, dtype)
    values = _normalized(v, mean, rstd, weight_sums_ptr, bias_ptr, column + 2 * inner, HEAD_DIM, dtype)
    weights, total = softmax_within_pixels(tl.dot(queries, keys.T), slot, key_slot, exponent)
    output = tl.dot(weights.to(dtype), values) * (1.0 / total)[:, None]
    output_ptr += (token * inner)[:, None] + (start_of_head + d)[None, :]
    tl.store(output_ptr, output.to(dtype), mask=rows_inside[:, None] & (d < HEAD_DIM)[None, :])


def folded_temporal_attention(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, heads: int, eps: float
) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32 and 64 frames at most."""
    tokens = merge_pixels(x)
    clips, frames, pixels, channels = tokens.shape
    with torch.cuda.device_of(x):
        tma = has_wgmma()
        tile = _choose(tokens, weight, heads, DESCRIBED_TILES if tma else POINTER_TILES)
        if isinstance(tile, str):
            return temporal_attention(folded_linear(x, moments, weight, weight_sums, bias, eps), heads)
        head_dim = len(weight) // 3 // heads
        block_d = max(padded(head_dim), MIN_DESCRIBED_COLUMNS if tma else 0)
        output = x.new_empty(*x.shape[:-1], heads * head_dim)
        tiles = tile.programs(pixels, frames)
        _folded_temporal_attention_kernel[(clips * tiles * heads,)](
            TensorDescriptor.from_tensor(tokens, [1, *tile.block(frames), tile.block_k]) if tma else tokens,
            moments.contiguous(),
            TensorDescriptor.from_tensor(weight, [block_d, tile.block_k]) if tma else weight,
            weight_sums.contiguous(),
            bias.contiguous(),
            output,
            tiles,
            pixels,
            channels,
            heads,
            exponent_of(head_dim),
            eps,
            *(0, 0, 0, 0) if tma else (*tokens.stride()[:3], weight.stride(0)),
            FRAMES=frames,
            HEAD_DIM=head_dim,
            PART=part_columns(channels),
            PARTS=triton.next_power_of_2(moments.shape[-2]),
            TMA=tma,
            BLOCK_M=tile.block_m,
            BLOCK_D=block_d,
            BLOCK_K=tile.block_k,
            NUM_STAGES=tile.stages,
            **options(tile.warps, tile.stages),
        )
    return output


def _choose(x: Tensor, weight: Tensor, heads: int, tiles: tuple[AttentionTile, ...]) -> AttentionTile | str:
    """The tile for tokens (B, F, pixels, C), or UNFUSED."""
    if not fusable(x, weight, heads):
        return UNFUSED
    clips, frames, pixels, channels = x.shape
    candidates: tuple[AttentionTile | str, ...] = (*tiles, UNFUSED)
    reasoned = candidates[0] if channels < UNFUSED_CHANNELS else UNFUSED
    return choose("folded_temporal_attention", (nearby(clips * pixels), frames, channels, heads), candidates, reasoned)


def fusable(x: Tensor, weight: Tensor, heads: int) -> bool:
    """Whether one kernel can do all of it. Descriptors need aligned rows that do not overlap."""
    if precision(x.dtype) == "float32" or len(weight) // 3 // heads > MAX_FUSED_HEAD_DIM:
        return False
    strides = *x.stride()[:-1], weight.stride(0)
    is_aligned = aligned(x.shape[-1], *strides) and not (x.data_ptr() % 16 or weight.data_ptr() % 16)
    return is_aligned and min(strides) > 0 and weight.stride(1) == 1
