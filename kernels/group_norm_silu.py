"""GroupNorm, SiLU and the embedding before them in Triton, channels last. reference.group_norm_silu states the maths.

A small sample takes one kernel, whose programs hold a few groups of it in registers. A larger one takes two: mean and
sum of squared deviations of each chunk of its rows (pixels), which the second kernel combines (Chan, Golub and LeVeque,
1979) and applies. Both measure values from the first of their group, so that a large mean costs no precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Reasoned and compiled for sm_80 and sm_90, not measured: 16 to 64 values a thread, and rows of whole 128-byte lines.
LANES = 128  # channels side by side where groups are reduced, more if a group is larger
STATISTICS_TILE = 8192
STATISTICS_WARPS = 8
APPLY_LANES = 64
APPLY_TILE = 4096
APPLY_WARPS = 8
ONE_PASS_TILE = 8192  # values, where that leaves lanes enough
ONE_PASS_LANES = 64  # fewest, unless there are fewer channels
MOST_ONE_PASS_BYTES, MOST_ONE_PASS_ROWS = 65536, 512  # more values or rows spill registers
MOST_CHUNKS = 128  # each program of the second kernel combines them all
PROGRAMS = 2048  # enough to fill a GPU


@triton.jit
def _from_first(x_ptr, embedding_ptr, channel, inside, SIZE: tl.constexpr):
    """What to add to x of one sample: its embedding, less the first value of the channel's group."""
    first = channel // SIZE * SIZE
    x = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    if embedding_ptr is None:
        return -x
    else:
        x += tl.load(embedding_ptr + first, mask=inside, other=0.0).to(tl.float32)
        return tl.load(embedding_ptr + channel, mask=inside, other=0.0).to(tl.float32) - x


@triton.jit
def _group_sums(values, owner, GROUPS: tl.constexpr):
    """Sums of the values [LANES] of each owner [GROUPS]."""
    owned = owner[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.sum(tl.where(owned, values[:, None], 0.0), 0)


@triton.jit
def _scale_and_activate(deviation, scale, bias, SILU: tl.constexpr):
    y = deviation * scale + bias
    return y / (1.0 + tl.exp(-y)) if SILU else y


@triton.jit(do_not_specialize=["rows", "blocks", "clip_samples"])
def _one_pass_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    embedding_ptr,
    output_ptr,
    rows,
    channels,
    blocks,
    clip_samples,
    x_sample,
    x_row,
    eps,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels of a program, whole groups
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, LANES)
    channel = tl.program_id(0) % blocks * BLOCK_C + lane
    inside = (lane < BLOCK_C) & (channel < channels)
    row = tl.arange(0, ROWS).to(tl.int64)
    mask = (row < rows)[:, None] & inside[None, :]
    x_ptr += sample * x_sample
    if embedding_ptr is not None:
        embedding_ptr += sample // clip_samples * channels

    x = tl.load(x_ptr + row[:, None] * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x + _from_first(x_ptr, embedding_ptr, channel, inside, SIZE)[None, :], 0.0)
    owner = lane // SIZE
    count = 1.0 * SIZE * rows
    mean = tl.gather(_group_sums(tl.sum(x, 0), owner, GROUPS) / count, owner, 0)
    x = tl.where(mask, x - mean[None, :], 0.0)
    variance = _group_sums(tl.sum(x * x, 0), owner, GROUPS) / count
    scale = tl.gather(tl.rsqrt(variance + eps), owner, 0)
    scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    y = _scale_and_activate(x, scale[None, :], bias[None, :], SILU)
    tl.store(output_ptr + (sample * rows + row)[:, None] * channels + channel[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "groups", "blocks", "clip_samples"])
def _statistics_kernel(
    x_ptr,
    embedding_ptr,
    mean_ptr,  # (samples, chunks, groups), as is m2
    m2_ptr,
    rows,
    chunk_rows,
    chunks,
    channels,
    groups,
    blocks,
    clip_samples,
    x_sample,
    x_row,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks  # of all samples
    sample = (chunk // chunks).to(tl.int64)
    lane = tl.arange(0, LANES)
    channel = block * BLOCK_C + lane
    inside = (lane < BLOCK_C) & (channel < channels)
    x_ptr += sample * x_sample
    if embedding_ptr is not None:
        embedding_ptr += sample // clip_samples * channels
    offset = _from_first(x_ptr, embedding_ptr, channel, inside, SIZE)[None, :]

    # Every place of the tile keeps its own mean, of the tiles so far (Welford, 1962): no exchange until the end.
    mean = tl.zeros([ROWS, LANES], tl.float32)
    m2 = tl.zeros([ROWS, LANES], tl.float32)
    start = chunk % chunks * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    place = tl.arange(0, ROWS)
    tiles = 0.0
    for first in range(start, stop, ROWS):
        tiles += 1.0
        row = (first + place).to(tl.int64)
        mask = (row < stop)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32) + offset
        step = tl.where(mask, x - mean, 0.0)
        mean += step * (1.0 / tiles)
        m2 += step * (x - mean)

    owner = lane // SIZE
    seen = (tl.maximum(stop - start - place + ROWS - 1, 0) // ROWS).to(tl.float32)[:, None]
    count = (stop - start).to(tl.float32) * SIZE
    group_mean = _group_sums(tl.sum(seen * mean, 0), owner, GROUPS) / count
    deviation = mean - tl.gather(group_mean, owner, 0)[None, :]
    group_m2 = _group_sums(tl.sum(m2 + seen * deviation * deviation, 0), owner, GROUPS)
    group = tl.arange(0, GROUPS)
    mine = (group < BLOCK_C // SIZE) & (block * (BLOCK_C // SIZE) + group < groups)
    at = chunk.to(tl.int64) * groups + block * (BLOCK_C // SIZE) + group
    tl.store(mean_ptr + at, group_mean, mask=mine)
    tl.store(m2_ptr + at, group_m2, mask=mine)


@triton.jit
def _combined(
    weight_ptr,
    bias_ptr,
    mean_ptr,
    m2_ptr,
    sample,
    channel,
    inside,
    first_group,
    rows,
    chunk_rows,
    chunks,
    groups,
    eps,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of one sample, for each channel: its group's mean over all chunks, what to multiply by, and the bias."""
    group = first_group + tl.arange(0, GROUPS)[None, :]
    part = tl.arange(0, CHUNKS)[:, None]
    at = (sample * chunks + part) * groups + group
    known = (part < chunks) & (group < groups)
    means = tl.load(mean_ptr + at, mask=known, other=0.0)
    m2 = tl.load(m2_ptr + at, mask=known, other=0.0)
    weights = tl.minimum(tl.maximum(rows - part * chunk_rows, 0), chunk_rows).to(tl.float32) / (1.0 * rows)
    mean = tl.sum(weights * means, 0)
    deviation = means - mean[None, :]
    variance = tl.sum(m2, 0) / (1.0 * SIZE * rows) + tl.sum(weights * deviation * deviation, 0)
    owner = channel // SIZE - first_group
    mean = tl.gather(mean, owner, 0)
    scale = tl.gather(tl.rsqrt(variance + eps), owner, 0)
    scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "groups", "clip_samples"])
def _apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    embedding_ptr,
    mean_ptr,
    m2_ptr,
    output_ptr,
    rows,
    chunk_rows,
    chunks,
    channels,
    groups,
    clip_samples,
    x_sample,
    x_row,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,  # no fewer than a block of LANES channels has a part in
    CHUNKS: tl.constexpr,
    SILU: tl.constexpr,
):
    blocks = tl.cdiv(channels, LANES)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    sample = (chunk // chunks).to(tl.int64)
    channel = block * LANES + tl.arange(0, LANES)
    inside = channel < channels
    x_ptr += sample * x_sample
    if embedding_ptr is not None:
        embedding_ptr += sample // clip_samples * channels
    offset = _from_first(x_ptr, embedding_ptr, channel, inside, SIZE)

    first_group = block * LANES // SIZE
    mean, scale, bias = _combined(
        weight_ptr,
        bias_ptr,
        mean_ptr,
        m2_ptr,
        sample,
        channel,
        inside,
        first_group,
        rows,
        chunk_rows,
        chunks,
        groups,
        eps,
        SIZE,
        GROUPS,
        CHUNKS,
    )

    output_ptr += sample * rows * channels
    start = chunk % chunks * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < stop)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        y = _scale_and_activate(x + offset[None, :] - mean[None, :], scale[None, :], bias[None, :], SILU)
        tl.store(output_ptr + row[:, None] * channels + channel[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "groups"])
def _coefficients_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    m2_ptr,
    center_ptr,  # (samples, channels), as are scale and shift
    scale_ptr,
    shift_ptr,
    rows,
    chunk_rows,
    chunks,
    channels,
    groups,
    x_sample,
    eps,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    blocks = tl.cdiv(channels, LANES)
    block = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = block * LANES + tl.arange(0, LANES)
    inside = channel < channels
    center = -_from_first(x_ptr + sample * x_sample, None, channel, inside, SIZE)
    first_group = block * LANES // SIZE
    mean, scale, bias = _combined(
        weight_ptr,
        bias_ptr,
        mean_ptr,
        m2_ptr,
        sample,
        channel,
        inside,
        first_group,
        rows,
        chunk_rows,
        chunks,
        groups,
        eps,
        SIZE,
        GROUPS,
        CHUNKS,
    )
    at = sample * channels + channel
    tl.store(center_ptr + at, center, mask=inside)
    tl.store(scale_ptr + at, scale, mask=inside)
    tl.store(shift_ptr + at, bias - mean * scale, mask=inside)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> Tensor:
    """As reference.group_norm_silu, for float16, bfloat16 and float32."""
    clips, frames, height, width, channels = x.shape
    clip_samples = 1 if over_frames else frames
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = x.reshape(clips * clip_samples, -1, channels)
    x = x if x.stride(-1) == 1 else x.contiguous()
    samples, rows, _ = x.shape
    weight, bias = weight.contiguous(), bias.contiguous()
    embedding = None if embedding is None else embedding.contiguous()
    size = channels // groups
    tile_rows = triton.next_power_of_2(rows)

    lanes = max(min(LANES, ONE_PASS_TILE // tile_rows), ONE_PASS_LANES, triton.next_power_of_2(size))
    lanes = min(lanes, triton.next_power_of_2(channels))
    shared = {"SIZE": size, "enable_fp_fusion": True}  # Triton's default changes between versions
    with torch.cuda.device_of(x):
        if tile_rows <= MOST_ONE_PASS_ROWS and tile_rows * lanes * x.element_size() <= MOST_ONE_PASS_BYTES:
            tile, blocks = _whole_groups(tile_rows, lanes, groups, size)
            _one_pass_kernel[(samples * blocks,)](
                x,
                weight,
                bias,
                embedding,
                output,
                rows,
                channels,
                blocks,
                clip_samples,
                x.stride(0),
                x.stride(1),
                eps,
                **tile,
                SILU=silu,
                num_warps=min(max(tile_rows * lanes // 1024, 1), 16),
                **shared,
            )
            return output

        statistics, chunk_rows = _statistics(x, embedding, groups, clip_samples)
        chunks = statistics.shape[2]
        combined = _channels_of_a_program(channels, size, chunks)
        lanes = combined["LANES"]
        _apply_kernel[(samples * chunks * triton.cdiv(channels, lanes),)](
            x,
            weight,
            bias,
            embedding,
            *statistics,
            output,
            rows,
            chunk_rows,
            chunks,
            channels,
            groups,
            clip_samples,
            x.stride(0),
            x.stride(1),
            eps,
            ROWS=APPLY_TILE // lanes,
            **combined,
            SILU=silu,
            num_warps=APPLY_WARPS,
            **shared,
        )
    return output


def coefficients(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """What normalizes values, as (x - center) * scale + shift: (3, samples, channels) in float32.

    x: (samples, rows, channels), channels contiguous. The center is a value of x, so that a large mean costs nothing.
    """
    samples, rows, channels = x.shape
    size = channels // groups
    result = torch.empty(3, samples, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        statistics, chunk_rows = _statistics(x, None, groups, 1)
        chunks = statistics.shape[2]
        combined = _channels_of_a_program(channels, size, chunks)
        _coefficients_kernel[(samples * triton.cdiv(channels, combined["LANES"]),)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            *statistics,
            *result,
            rows,
            chunk_rows,
            chunks,
            channels,
            groups,
            x.stride(0),
            eps,
            SIZE=size,
            **combined,
            num_warps=APPLY_WARPS,
            enable_fp_fusion=True,
        )
    return result


def _statistics(x: Tensor, embedding: Tensor | None, groups: int, clip_samples: int) -> tuple[Tensor, int]:
    """Mean and sum of squared deviations of each chunk of rows, (2, samples, chunks, groups); and a chunk's rows."""
    samples, rows, channels = x.shape
    size = channels // groups
    lanes = min(max(LANES, triton.next_power_of_2(size)), triton.next_power_of_2(channels))
    tile_rows = max(STATISTICS_TILE // lanes, 1)
    tile, blocks = _whole_groups(tile_rows, lanes, groups, size)
    chunks = min(triton.cdiv(rows, tile_rows), MOST_CHUNKS, max(PROGRAMS // (samples * blocks), 1))
    chunk_rows = triton.cdiv(triton.cdiv(rows, chunks), tile_rows) * tile_rows
    chunks = triton.cdiv(rows, chunk_rows)
    statistics = torch.empty(2, samples, chunks, groups, dtype=torch.float32, device=x.device)
    _statistics_kernel[(samples * chunks * blocks,)](
        x,
        embedding,
        *statistics,
        rows,
        chunk_rows,
        chunks,
        channels,
        groups,
        blocks,
        clip_samples,
        x.stride(0),
        x.stride(1),
        SIZE=size,
        **tile,
        num_warps=STATISTICS_WARPS,
        enable_fp_fusion=True,
    )
    return statistics, chunk_rows


def _whole_groups(tile_rows: int, lanes: int, groups: int, size: int) -> tuple[dict[str, int], int]:
    """Tile of a kernel that reduces groups, and how many of them hold all channels."""
    block = min(lanes // size, groups) * size
    most_groups = triton.next_power_of_2(triton.cdiv(lanes, size))
    tile = {"BLOCK_C": block, "ROWS": tile_rows, "LANES": lanes, "GROUPS": most_groups}
    return tile, triton.cdiv(groups * size, block)


def _channels_of_a_program(channels: int, size: int, chunks: int) -> dict[str, int]:
    """Of a kernel that combines chunks: channels, the groups that so many have a part in, chunks."""
    lanes = min(APPLY_LANES, triton.next_power_of_2(channels))
    touched = lanes // size if lanes % size == 0 else (lanes - 2) // size + 2
    return {"LANES": lanes, "GROUPS": triton.next_power_of_2(touched), "CHUNKS": triton.next_power_of_2(chunks)}
