"""What the kernels of GroupNorm do to the rows of one sample: sum them up, and normalize them.

A sample is a frame or a clip, and its rows are its pixels. A program has some of its channels. Their values are those
of x and of a second tensor, which holds the channels after those of x, or with ADD is added to x.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Sample(NamedTuple):
    """What a program reads of one sample: pointers to its first row, and the program's channels."""

    x_ptr: tl.tensor
    x_stride_row: tl.tensor
    x_channels: tl.tensor
    second_ptr: tl.tensor | None
    second_stride_row: tl.tensor
    vector_ptr: tl.tensor | None
    stride_row: tl.tensor  # of contiguous results
    channel: tl.tensor  # [BLOCK_C], as is inside
    inside: tl.tensor


@triton.jit
def _load(
    sample: Sample,
    first: tl.tensor,
    row: tl.tensor,
    channel: tl.tensor,
    inside: tl.tensor,
    vector: tl.tensor,
    ADD: tl.constexpr,
) -> tl.tensor:
    """Values of rows counted from `first`, in float32; undefined where not `inside`. With ADD rounded sums."""
    x_ptr = sample.x_ptr + first * sample.x_stride_row
    if sample.second_ptr is None:
        x = tl.load(x_ptr + (row * sample.x_stride_row + channel), mask=inside)
    else:
        second_ptr = sample.second_ptr + first * sample.second_stride_row
        if ADD:
            x = tl.load(x_ptr + (row * sample.x_stride_row + channel), mask=inside)
            addend = tl.load(second_ptr + (row * sample.second_stride_row + channel), mask=inside)
            x = (x.to(tl.float32) + (addend.to(tl.float32) + vector)).to(x.dtype)
        else:
            in_x, channel_of_second = channel < sample.x_channels, channel - sample.x_channels
            x = tl.load(x_ptr + (row * sample.x_stride_row + channel), mask=inside & in_x)
            second_ptr += row * sample.second_stride_row + channel_of_second
            x = tl.load(second_ptr, mask=inside & (channel >= sample.x_channels), other=x)
    return x.to(tl.float32)


@triton.jit
def _load_vector(sample: Sample, channel: tl.tensor) -> tl.tensor:
    if sample.vector_ptr is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(sample.vector_ptr + channel, mask=sample.inside, other=0.0).to(tl.float32)


@triton.jit
def offset_from_usual(sample: Sample, rows: tl.tensor, group_size: tl.tensor, ADD: tl.constexpr) -> tl.tensor:
    """What to add to each channel: the embedding, less a usual value of its group's first channel. [BLOCK_C]

    That is the median of three rows: a single outlier would leave a large mean.
    """
    first = sample.channel // group_size * group_size
    vector = _load_vector(sample, first)
    one = _load(sample, 0, 0, first, sample.inside, vector, ADD)
    two = _load(sample, rows // 2, 0, first, sample.inside, vector, ADD)
    three = _load(sample, rows - 1, 0, first, sample.inside, vector, ADD)
    usual = tl.maximum(tl.minimum(one, two), tl.minimum(tl.maximum(one, two), three))
    return -usual if ADD else _load_vector(sample, sample.channel) - (usual + vector)


@triton.jit
def _sums_of_tile(
    sample: Sample,
    total_ptr: tl.tensor | None,
    offset: tl.tensor,
    vector: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    ADD: tl.constexpr,
    LOADS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Sums of values and squares over a thread's rows, every (BLOCK_M / LOADS)-th one: [BLOCK_M / LOADS, BLOCK_C]."""
    channel = sample.channel[None, :]
    x = _load(sample, first, row, channel, inside, vector[None, :], ADD)
    if ADD:
        tl.store(total_ptr + first * sample.stride_row + (row * sample.stride_row + channel), x, mask=inside)
    x += offset[None, :]
    if not WHOLE:
        x = tl.where(inside, x, 0.0)
    x = tl.reshape(x, [LOADS, x.shape[0] // LOADS, x.shape[1]])
    return tl.sum(x, 0), tl.sum(x * x, 0)


@triton.jit
def sums_of_rows(
    sample: Sample,
    total_ptr: tl.tensor | None,
    offset: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOADS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Sums of values and of squares over the rows from start to stop, [BLOCK_C] each. With ADD writes the values."""
    vector = _load_vector(sample, sample.channel)
    row = tl.arange(0, BLOCK_M)[:, None]
    sums = tl.zeros([BLOCK_M // LOADS, offset.shape[0]], tl.float32)
    squares = tl.zeros([BLOCK_M // LOADS, offset.shape[0]], tl.float32)
    whole = stop - (stop - start) % BLOCK_M
    for first in range(start, whole, BLOCK_M):
        added = _sums_of_tile(
            *(sample, total_ptr, offset, vector, first, row, sample.inside[None, :], ADD, LOADS, True)
        )
        sums, squares = sums + added[0], squares + added[1]
    if whole < stop:
        inside = (row < stop - whole) & sample.inside[None, :]
        added = _sums_of_tile(*(sample, total_ptr, offset, vector, whole, row, inside, ADD, LOADS, False))
        sums, squares = sums + added[0], squares + added[1]
    return tl.sum(sums, 0), tl.sum(squares, 0)


@triton.jit
def scale_and_shift(
    sample: Sample,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sums: tl.tensor,
    squares: tl.tensor,
    group: tl.tensor,
    group_of_channel: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    BLOCK_G: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What to multiply by and then to add, for each channel, from sums that belong each to a `group` of count values.

    Groups are counted from the first of the program.
    """
    in_group = group[:, None] == tl.arange(0, BLOCK_G)[None, :]
    mean = tl.sum(tl.where(in_group, sums[:, None], 0.0), 0) / count
    variance = tl.sum(tl.where(in_group, squares[:, None], 0.0), 0) / count - mean * mean
    scale = tl.gather(tl.rsqrt(tl.maximum(variance, 0.0) + eps), group_of_channel, 0)
    scale *= tl.load(weight_ptr + sample.channel, mask=sample.inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + sample.channel, mask=sample.inside, other=0.0).to(tl.float32)
    return scale, bias - tl.gather(mean, group_of_channel, 0) * scale


@triton.jit
def _normalize_tile(
    sample: Sample,
    output_ptr: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    SILU: tl.constexpr,
) -> None:
    channel = sample.channel[None, :]
    x = _load(sample, first, row, channel, inside, 0.0, False)
    y = (x + offset[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        # With y of base 2: y / (1 + exp(-y)), its divisor as a square. Where exp2 overflows, the root is zero.
        root = tl.rsqrt(tl.exp2(-1.0 * y) * LOG2_E + LOG2_E)
        y = y * root * root
    tl.store(output_ptr + first * sample.stride_row + (row * sample.stride_row + channel), y, mask=inside)


@triton.jit
def normalize_rows(
    sample: Sample,
    output_ptr: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    BLOCK_M: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """Writes the rows from start to stop."""
    if SILU:
        scale *= LOG2_E
        shift *= LOG2_E
    row = tl.arange(0, BLOCK_M)[:, None]
    whole = stop - (stop - start) % BLOCK_M
    for first in range(start, whole, BLOCK_M):
        _normalize_tile(*(sample, output_ptr, offset, scale, shift, first, row, sample.inside[None, :], SILU))
    if whole < stop:
        inside = (row < stop - whole) & sample.inside[None, :]
        _normalize_tile(*(sample, output_ptr, offset, scale, shift, whole, row, inside, SILU))
