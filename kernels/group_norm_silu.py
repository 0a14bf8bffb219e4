"""GroupNorm, SiLU and the embedding before them in Triton, channels last.

x: (B, F, H, W, C). weight, bias: (C,). embedding: (B, C), added to x, or None. Returns GroupNorm of each frame, or over
all frames of a clip, with SiLU or without, in the shape and dtype of x.

A sample is what a group's mean is taken over: a frame or a clip; its rows are its pixels. A small sample takes one
kernel, whose programs hold a few groups of it in registers. A larger one takes two: mean and sum of squared deviations
of each chunk of its rows, which the second kernel combines (Chan, Golub and LeVeque, 1979) and applies. Both measure
values from the first of their group, so that a large mean costs no precision.

The file is long because its three kernels share their tiles and the rule that chooses between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense_rows, options

# Chosen by reasoning and compiled for sm_80 and sm_90, not measured: 16 to 64 values a thread, and rows of whole
# 128-byte lines. BLOCK_C is in channels, a TILE in values (rows x channels).
REDUCE_BLOCK_C = 128  # where groups are reduced; more if a group is larger
STATISTICS_TILE = 8192
STATISTICS_WARPS = 8
APPLY_BLOCK_C = 64
APPLY_TILE = 4096
APPLY_WARPS = 8
ONE_PASS_TILE = 8192  # as far as MIN_ONE_PASS_BLOCK_C allows
MIN_ONE_PASS_BLOCK_C = 64  # unless there are fewer channels
MAX_ONE_PASS_BYTES, MAX_ONE_PASS_ROWS = 65536, 512  # more values or rows spill registers
MAX_CHUNKS = 128  # each program of the second kernel combines them all
PROGRAMS = 2048  # of the statistics kernel, as far as there are chunks: several for each multiprocessor of a GPU


@triton.jit
def _offset_from_first(
    x_ptr: tl.tensor,
    embedding_ptr: tl.tensor | None,
    channel: tl.tensor,
    channels_inside: tl.tensor,
    GROUP_SIZE: tl.constexpr,
) -> tl.tensor:
    """What to add to each channel of a sample's x: its embedding, less the first value of the channel's group."""
    first = channel // GROUP_SIZE * GROUP_SIZE
    x = tl.load(x_ptr + first, mask=channels_inside, other=0.0).to(tl.float32)
    if embedding_ptr is None:
        return -x
    else:
        x += tl.load(embedding_ptr + first, mask=channels_inside, other=0.0).to(tl.float32)
        return tl.load(embedding_ptr + channel, mask=channels_inside, other=0.0).to(tl.float32) - x


@triton.jit
def _group_sums(values: tl.tensor, group_of_channel: tl.tensor, BLOCK_G: tl.constexpr) -> tl.tensor:
    """Sums [BLOCK_G] over the channels of each group of the values [BLOCK_C]."""
    in_group = group_of_channel[:, None] == tl.arange(0, BLOCK_G)[None, :]
    return tl.sum(tl.where(in_group, values[:, None], 0.0), 0)


@triton.jit
def _scale_and_activate(deviation: tl.tensor, scale: tl.tensor, bias: tl.tensor, SILU: tl.constexpr) -> tl.tensor:
    y = deviation * scale + bias
    return y / (1.0 + tl.exp(-y)) if SILU else y


@triton.jit(do_not_specialize=["rows", "blocks", "samples_per_clip"])
def _one_pass_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    embedding_ptr: tl.tensor | None,
    output_ptr: tl.tensor,  # contiguous
    rows: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    samples_per_clip: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    eps: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,  # channels of a program: the whole groups of its BLOCK_C
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % blocks * GROUP_CHANNELS + column
    channels_inside = (column < GROUP_CHANNELS) & (channel < channels)
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    inside = (row < rows)[:, None] & channels_inside[None, :]
    x_ptr += sample * x_stride_sample
    if embedding_ptr is not None:
        embedding_ptr += sample // samples_per_clip * channels

    x = tl.load(x_ptr + row[:, None] * x_stride_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    offset = _offset_from_first(x_ptr, embedding_ptr, channel, channels_inside, GROUP_SIZE)
    x = tl.where(inside, x + offset[None, :], 0.0)
    group_of_channel = column // GROUP_SIZE
    count = 1.0 * GROUP_SIZE * rows
    mean = tl.gather(_group_sums(tl.sum(x, 0), group_of_channel, BLOCK_G) / count, group_of_channel, 0)
    x = tl.where(inside, x - mean[None, :], 0.0)
    variance = _group_sums(tl.sum(x * x, 0), group_of_channel, BLOCK_G) / count
    scale = tl.gather(tl.rsqrt(variance + eps), group_of_channel, 0)
    scale *= tl.load(weight_ptr + channel, mask=channels_inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channels_inside, other=0.0).to(tl.float32)
    y = _scale_and_activate(x, scale[None, :], bias[None, :], SILU)
    tl.store(output_ptr + (sample * rows + row)[:, None] * channels + channel[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "groups", "blocks", "samples_per_clip"])
def _statistics_kernel(
    x_ptr: tl.tensor,
    embedding_ptr: tl.tensor | None,
    mean_ptr: tl.tensor,  # (samples, chunks, groups), as is m2
    m2_ptr: tl.tensor,
    rows: tl.tensor,
    chunk_rows: tl.tensor,
    chunks: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    blocks: tl.tensor,
    samples_per_clip: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks  # counted over all samples
    sample = (chunk // chunks).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    channel = block * GROUP_CHANNELS + column
    channels_inside = (column < GROUP_CHANNELS) & (channel < channels)
    x_ptr += sample * x_stride_sample
    if embedding_ptr is not None:
        embedding_ptr += sample // samples_per_clip * channels
    offset = _offset_from_first(x_ptr, embedding_ptr, channel, channels_inside, GROUP_SIZE)[None, :]

    # Each element of the tile keeps its own mean, over the tiles so far (Welford, 1962): threads exchange values at the
    # end only.
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    start = chunk % chunks * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    tile_row = tl.arange(0, BLOCK_M)
    tiles = 0.0
    for first in range(start, stop, BLOCK_M):
        tiles += 1.0
        row = (first + tile_row).to(tl.int64)
        inside = (row < stop)[:, None] & channels_inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        x += offset
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / tiles)
        m2 += delta * (x - mean)

    group_of_channel = column // GROUP_SIZE
    rows_seen = (tl.maximum(stop - start - tile_row + BLOCK_M - 1, 0) // BLOCK_M).to(tl.float32)[:, None]
    count = (stop - start).to(tl.float32) * GROUP_SIZE
    group_mean = _group_sums(tl.sum(rows_seen * mean, 0), group_of_channel, BLOCK_G) / count
    deviation = mean - tl.gather(group_mean, group_of_channel, 0)[None, :]
    group_m2 = _group_sums(tl.sum(m2 + rows_seen * deviation * deviation, 0), group_of_channel, BLOCK_G)
    group = tl.arange(0, BLOCK_G)
    block_groups = GROUP_CHANNELS // GROUP_SIZE
    groups_inside = (group < block_groups) & (block * block_groups + group < groups)
    result_offset = chunk.to(tl.int64) * groups + block * block_groups + group
    tl.store(mean_ptr + result_offset, group_mean, mask=groups_inside)
    tl.store(m2_ptr + result_offset, group_m2, mask=groups_inside)


@triton.jit
def _combine_chunks(
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    m2_ptr: tl.tensor,
    sample: tl.tensor,
    channel: tl.tensor,
    channels_inside: tl.tensor,
    first_group: tl.tensor,
    rows: tl.tensor,
    chunk_rows: tl.tensor,
    chunks: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """For each channel of a sample: its group's mean over all chunks, what to multiply by, and the bias. [BLOCK_C]"""
    group = first_group + tl.arange(0, BLOCK_G)[None, :]
    chunk = tl.arange(0, BLOCK_CHUNKS)[:, None]
    offset = (sample * chunks + chunk) * groups + group
    inside = (chunk < chunks) & (group < groups)
    means = tl.load(mean_ptr + offset, mask=inside, other=0.0)
    m2 = tl.load(m2_ptr + offset, mask=inside, other=0.0)
    shares = tl.minimum(tl.maximum(rows - chunk * chunk_rows, 0), chunk_rows).to(tl.float32) / (1.0 * rows)
    mean = tl.sum(shares * means, 0)
    deviation = means - mean[None, :]
    variance = tl.sum(m2, 0) / (1.0 * GROUP_SIZE * rows) + tl.sum(shares * deviation * deviation, 0)
    group_of_channel = channel // GROUP_SIZE - first_group
    mean = tl.gather(mean, group_of_channel, 0)
    scale = tl.gather(tl.rsqrt(variance + eps), group_of_channel, 0)
    scale *= tl.load(weight_ptr + channel, mask=channels_inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channels_inside, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "groups", "samples_per_clip"])
def _apply_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    embedding_ptr: tl.tensor | None,
    mean_ptr: tl.tensor,
    m2_ptr: tl.tensor,
    output_ptr: tl.tensor,  # contiguous
    rows: tl.tensor,
    chunk_rows: tl.tensor,
    chunks: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    samples_per_clip: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    eps: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,  # no fewer than the groups that a block of channels has a part in
    BLOCK_CHUNKS: tl.constexpr,  # no fewer than the chunks
    SILU: tl.constexpr,
) -> None:
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks  # counted over all samples
    sample = (chunk // chunks).to(tl.int64)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    channels_inside = channel < channels
    x_ptr += sample * x_stride_sample
    if embedding_ptr is not None:
        embedding_ptr += sample // samples_per_clip * channels
    offset = _offset_from_first(x_ptr, embedding_ptr, channel, channels_inside, GROUP_SIZE)

    first_group = block * BLOCK_C // GROUP_SIZE
    mean, scale, bias = _combine_chunks(
        *(weight_ptr, bias_ptr, mean_ptr, m2_ptr, sample, channel, channels_inside, first_group),
        *(rows, chunk_rows, chunks, groups, eps, GROUP_SIZE, BLOCK_G, BLOCK_CHUNKS),
    )

    output_ptr += sample * rows * channels
    start = chunk % chunks * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    for first in range(start, stop, BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (row < stop)[:, None] & channels_inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        y = _scale_and_activate(x + offset[None, :] - mean[None, :], scale[None, :], bias[None, :], SILU)
        tl.store(output_ptr + row[:, None] * channels + channel[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "groups"])
def _coefficients_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    m2_ptr: tl.tensor,
    center_ptr: tl.tensor,  # (samples, channels), as are scale and shift
    scale_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    rows: tl.tensor,
    chunk_rows: tl.tensor,
    chunks: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    x_stride_sample: tl.tensor,
    eps: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
) -> None:
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    channels_inside = channel < channels
    center = -_offset_from_first(x_ptr + sample * x_stride_sample, None, channel, channels_inside, GROUP_SIZE)
    first_group = block * BLOCK_C // GROUP_SIZE
    mean, scale, bias = _combine_chunks(
        *(weight_ptr, bias_ptr, mean_ptr, m2_ptr, sample, channel, channels_inside, first_group),
        *(rows, chunk_rows, chunks, groups, eps, GROUP_SIZE, BLOCK_G, BLOCK_CHUNKS),
    )
    offset = sample * channels + channel
    tl.store(center_ptr + offset, center, mask=channels_inside)
    tl.store(scale_ptr + offset, scale, mask=channels_inside)
    tl.store(shift_ptr + offset, bias - mean * scale, mask=channels_inside)


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
    """As the op's reference, for float16, bfloat16 and float32."""
    clips, frames, height, width, channels = x.shape
    samples_per_clip = 1 if over_frames else frames
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = dense_rows(x.reshape(clips * samples_per_clip, -1, channels))
    samples, rows, _ = x.shape
    weight, bias = weight.contiguous(), bias.contiguous()
    embedding = None if embedding is None else embedding.contiguous()
    group_size = channels // groups
    block_m = triton.next_power_of_2(rows)

    block_c = max(
        min(REDUCE_BLOCK_C, ONE_PASS_TILE // block_m), MIN_ONE_PASS_BLOCK_C, triton.next_power_of_2(group_size)
    )
    block_c = min(block_c, triton.next_power_of_2(channels))
    with torch.cuda.device_of(x):
        if block_m <= MAX_ONE_PASS_ROWS and block_m * block_c * x.element_size() <= MAX_ONE_PASS_BYTES:
            blocks, tile = _whole_groups(block_m, block_c, groups, group_size)
            _one_pass_kernel[(samples * blocks,)](
                x,
                weight,
                bias,
                embedding,
                output,
                rows,
                channels,
                blocks,
                samples_per_clip,
                x.stride(0),
                x.stride(1),
                eps,
                GROUP_SIZE=group_size,
                **tile,
                SILU=silu,
                **options(min(max(block_m * block_c // 1024, 1), 16)),
            )
            return output

        statistics, chunk_rows = _statistics(x, embedding, groups, samples_per_clip)
        chunks = statistics.shape[2]
        tile = _channels_of_a_program(channels, group_size, chunks)
        block_c = tile["BLOCK_C"]
        _apply_kernel[(samples * chunks * triton.cdiv(channels, block_c),)](
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
            samples_per_clip,
            x.stride(0),
            x.stride(1),
            eps,
            GROUP_SIZE=group_size,
            BLOCK_M=APPLY_TILE // block_c,
            **tile,
            SILU=silu,
            **options(APPLY_WARPS),
        )
    return output


def coefficients(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """What normalizes values, as (x - center) * scale + shift: (3, samples, channels) in float32.

    x: (samples, rows, channels), channels contiguous. The center is a value of x, so that a large mean costs no
    precision.
    """
    samples, rows, channels = x.shape
    group_size = channels // groups
    result = torch.empty(3, samples, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        statistics, chunk_rows = _statistics(x, None, groups, 1)
        chunks = statistics.shape[2]
        tile = _channels_of_a_program(channels, group_size, chunks)
        _coefficients_kernel[(samples * triton.cdiv(channels, tile["BLOCK_C"]),)](
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
            GROUP_SIZE=group_size,
            **tile,
            **options(APPLY_WARPS),
        )
    return result


def _statistics(x: Tensor, embedding: Tensor | None, groups: int, samples_per_clip: int) -> tuple[Tensor, int]:
    """Mean and sum of squared deviations of each chunk of rows, (2, samples, chunks, groups); and a chunk's rows."""
    samples, rows, channels = x.shape
    group_size = channels // groups
    block_c = min(max(REDUCE_BLOCK_C, triton.next_power_of_2(group_size)), triton.next_power_of_2(channels))
    block_m = max(STATISTICS_TILE // block_c, 1)
    blocks, tile = _whole_groups(block_m, block_c, groups, group_size)
    chunks = min(triton.cdiv(rows, block_m), MAX_CHUNKS, max(PROGRAMS // (samples * blocks), 1))
    chunk_rows = triton.cdiv(triton.cdiv(rows, chunks), block_m) * block_m
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
        samples_per_clip,
        x.stride(0),
        x.stride(1),
        GROUP_SIZE=group_size,
        **tile,
        **options(STATISTICS_WARPS),
    )
    return statistics, chunk_rows


def _whole_groups(block_m: int, block_c: int, groups: int, group_size: int) -> tuple[int, dict[str, int]]:
    """How many programs of a kernel that reduces groups cover all channels, and the constants of one."""
    group_channels = min(block_c // group_size, groups) * group_size
    block_g = triton.next_power_of_2(triton.cdiv(block_c, group_size))
    tile = {"GROUP_CHANNELS": group_channels, "BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_G": block_g}
    return triton.cdiv(groups * group_size, group_channels), tile


def _channels_of_a_program(channels: int, group_size: int, chunks: int) -> dict[str, int]:
    """The constants of a kernel that combines chunks: channels, the groups that these have a part in, and chunks."""
    block_c = min(APPLY_BLOCK_C, triton.next_power_of_2(channels))
    touched = block_c // group_size if block_c % group_size == 0 else (block_c - 2) // group_size + 2
    block_g, block_chunks = triton.next_power_of_2(touched), triton.next_power_of_2(chunks)
    return {"BLOCK_C": block_c, "BLOCK_G": block_g, "BLOCK_CHUNKS": block_chunks}
