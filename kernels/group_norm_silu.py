"""GroupNorm, SiLU and the embedding before them in Triton, channels last.

x: (B, F, H, W, C), or the first of C channels beside skip: (B, F, H, W, D), the last. weight, bias: (C,). embedding:
(B, C), added first, or None. Returns GroupNorm of each frame, or over all frames of a clip, with SiLU or without, in
the dtype of x.

A small sample takes one kernel, whose programs own whole groups and go over the rows twice. A larger one takes two:
sums over chunks of its rows, which the second kernel adds up and applies. Both measure values from a usual one of their
group, so that a large mean costs no precision, and the sums of chunks need only be added.

With ADD the second tensor is added to x instead, and the sum is rounded and written as its statistics are taken: that
is `add_group_norm_silu` of residual_add.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_rows import Sample, normalize_rows, offset_from_usual, scale_and_shift, sums_of_rows
from .launch import MULTIPROCESSORS, dense_rows, options, precision
from .tuned import choose, nearby

# Chosen by reasoning and compiled for sm_80 and sm_90, not measured.
BLOCK_C = 64  # divides the models' widths, and is a line of 128 bytes in half precision
WARP_BYTES = 512  # that one load of 16 bytes a thread brings
# Warps of a program, and the loads of a source that each thread has in flight. A second kernel's programs have fewer
# warps: each warp repeats the work on the sums.
STATISTICS, ADDITION, APPLY = (8, 8), (4, 2), (4, 4)
SMALL, LARGE = (4, 2), (8, 4)  # in one kernel, samples of up to SMALL_ROWS, and larger ones
# One kernel, with the first of these widths of which whole groups fill MIN_SHARE. On an H200 its programs wait for
# memory about a microsecond a tile, whatever a GPU has beside them: samples of up to FEW_ROWS always take it, of up to
# SMALL_ROWS where the programs are no fewer than the multiprocessors, larger ones where they are MANY_PROGRAMS and
# nothing is added. 11 programs took 72 us for 512 rows, two kernels 9; 256 took 26 us for 784 rows, two kernels 34.
WIDTHS, MIN_SHARE = (64, 128, 256), 7 / 8
FEW_ROWS, SMALL_ROWS, MANY_PROGRAMS = 64, 512, 256
# Two kernels: parts of PART_ROWS while there are no more than MOST_PROGRAMS, or fewer rows for FEWEST_PROGRAMS, two for
# each multiprocessor of an H100. Each program of the second kernel reads the sums of all chunks.
PART_ROWS, MOST_PROGRAMS, FEWEST_PROGRAMS, MAX_CHUNKS = 512, 2112, 264, 64
MIN_BLOCK_G, MIN_SUMS = 16, 64  # enough for the models, which then share their kernels
SUMS_TILE = 1024  # that the second kernel reads at a time


@triton.jit(do_not_specialize=["rows", "blocks", "group_size", "samples_per_clip"])
def _whole_sample_kernel(
    x_ptr: tl.tensor,
    second_ptr: tl.tensor | None,
    vector_ptr: tl.tensor | None,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    total_ptr: tl.tensor | None,  # contiguous, as is the output
    output_ptr: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    blocks: tl.tensor,
    group_size: tl.tensor,
    samples_per_clip: tl.tensor,
    x_channels: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    second_stride_sample: tl.tensor,
    second_stride_row: tl.tensor,
    vector_stride_clip: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,  # of a program: the whole groups of its BLOCK_C
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOADS: tl.constexpr,
) -> None:
    index = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % blocks * GROUP_CHANNELS + column
    inside = (column < GROUP_CHANNELS) & (channel < channels)
    x_ptr += index * x_stride_sample
    output_ptr += index * rows * channels
    if second_ptr is not None:
        second_ptr += index * second_stride_sample
    if vector_ptr is not None:
        vector_ptr += index // samples_per_clip * vector_stride_clip
    x_stride_row, second_stride_row = tl.cast(x_stride_row, tl.int64), tl.cast(second_stride_row, tl.int64)
    stride_row = tl.cast(channels, tl.int64)  # of contiguous rows
    sample = Sample(
        *(x_ptr, x_stride_row, x_channels, second_ptr, second_stride_row, vector_ptr, stride_row, channel, inside)
    )
    if ADD:
        total_ptr += index * rows * channels
    offset = offset_from_usual(sample, rows, group_size, ADD)
    sums, squares = sums_of_rows(sample, total_ptr, offset, 0, rows, ADD, BLOCK_M, LOADS)
    group, count = column // group_size, 1.0 * rows * group_size
    scale, shift = scale_and_shift(
        *(sample, weight_ptr, bias_ptr, sums, squares, group, group % BLOCK_G, count, eps, BLOCK_G)
    )
    if ADD:
        tl.debug_barrier()  # other threads may have written what is read now
        sample = Sample(total_ptr, stride_row, channels, None, 0, None, stride_row, channel, inside)
    normalize_rows(sample, output_ptr, offset, scale, shift, 0, rows, BLOCK_M, SILU)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "group_size", "samples_per_clip"])
def _statistics_kernel(
    x_ptr: tl.tensor,
    second_ptr: tl.tensor | None,
    vector_ptr: tl.tensor | None,
    total_ptr: tl.tensor | None,  # contiguous
    sums_ptr: tl.tensor,  # (samples, chunks, 2, channels / GRAIN): of values, and of squares
    rows: tl.tensor,
    chunk_rows: tl.tensor,
    chunks: tl.tensor,
    channels: tl.tensor,
    group_size: tl.tensor,
    samples_per_clip: tl.tensor,
    x_channels: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    second_stride_sample: tl.tensor,
    second_stride_row: tl.tensor,
    vector_stride_clip: tl.tensor,
    ADD: tl.constexpr,
    GRAIN: tl.constexpr,  # as many neighboring channels, all of one group, are summed up
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOADS: tl.constexpr,
) -> None:
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks  # counted over all samples
    index = (chunk // chunks).to(tl.int64)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += index * x_stride_sample
    if second_ptr is not None:
        second_ptr += index * second_stride_sample
    if vector_ptr is not None:
        vector_ptr += index // samples_per_clip * vector_stride_clip
    x_stride_row, second_stride_row = tl.cast(x_stride_row, tl.int64), tl.cast(second_stride_row, tl.int64)
    stride_row = tl.cast(channels, tl.int64)  # of contiguous rows
    if ADD:
        total_ptr += index * rows * channels
    sample = Sample(
        *(x_ptr, x_stride_row, x_channels, second_ptr, second_stride_row, vector_ptr, stride_row),
        *(channel, channel < channels),
    )
    offset = offset_from_usual(sample, rows, group_size, ADD)
    start = chunk % chunks * chunk_rows
    stop = tl.minimum(start + chunk_rows, rows)
    sums, squares = sums_of_rows(sample, total_ptr, offset, start, stop, ADD, BLOCK_M, LOADS)
    grains = channels // GRAIN
    grain = block * (BLOCK_C // GRAIN) + tl.arange(0, BLOCK_C // GRAIN)
    sums_ptr += chunk.to(tl.int64) * 2 * grains + grain
    tl.store(sums_ptr, tl.sum(tl.reshape(sums, [BLOCK_C // GRAIN, GRAIN]), 1), mask=grain < grains)
    tl.store(sums_ptr + grains, tl.sum(tl.reshape(squares, [BLOCK_C // GRAIN, GRAIN]), 1), mask=grain < grains)


@triton.jit(do_not_specialize=["rows", "part_rows", "parts", "chunks", "group_size", "grain", "samples_per_clip"])
def _apply_kernel(
    x_ptr: tl.tensor,
    second_ptr: tl.tensor | None,
    vector_ptr: tl.tensor | None,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    output_ptr: tl.tensor,  # contiguous
    rows: tl.tensor,
    part_rows: tl.tensor,
    parts: tl.tensor,
    chunks: tl.tensor,
    channels: tl.tensor,
    group_size: tl.tensor,
    grain: tl.tensor,
    samples_per_clip: tl.tensor,
    x_channels: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    second_stride_sample: tl.tensor,
    second_stride_row: tl.tensor,
    vector_stride_clip: tl.tensor,
    eps: tl.tensor,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,  # no fewer than the groups that a block of channels has a part in
    BLOCK_M: tl.constexpr,
    SUMS: tl.constexpr,  # no fewer than the sums of these groups in a chunk
    CHUNKS: tl.constexpr,  # so many are read at a time
) -> None:
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks  # counted over all samples
    index = (part // parts).to(tl.int64)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += index * x_stride_sample
    if second_ptr is not None:
        second_ptr += index * second_stride_sample
    if vector_ptr is not None:
        vector_ptr += index // samples_per_clip * vector_stride_clip
    x_stride_row, second_stride_row = tl.cast(x_stride_row, tl.int64), tl.cast(second_stride_row, tl.int64)
    stride_row = tl.cast(channels, tl.int64)  # of contiguous rows
    sample = Sample(
        *(x_ptr, x_stride_row, x_channels, second_ptr, second_stride_row, vector_ptr, stride_row),
        *(channel, channel < channels),
    )
    offset = offset_from_usual(sample, rows, group_size, False)

    first_group = block * BLOCK_C // group_size
    last_group = (tl.minimum(block * BLOCK_C + BLOCK_C, channels) - 1) // group_size
    group_grains, grains = group_size // grain, channels // grain
    position = tl.arange(0, SUMS)
    inside = position < (last_group + 1 - first_group) * group_grains
    sums_ptr += index * chunks * 2 * grains + first_group * group_grains
    sums = tl.zeros([CHUNKS, SUMS], tl.float32)
    squares = tl.zeros([CHUNKS, SUMS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        pointers, loaded = sums_ptr + (chunk * 2 * grains + position[None, :]), (chunk < chunks) & inside[None, :]
        sums += tl.load(pointers, mask=loaded, other=0.0)
        squares += tl.load(pointers + grains, mask=loaded, other=0.0)
    scale, shift = scale_and_shift(
        *(sample, weight_ptr, bias_ptr, tl.sum(sums, 0), tl.sum(squares, 0), position // group_grains),
        *(channel // group_size - first_group, 1.0 * rows * group_size, eps, BLOCK_G),
    )
    start = part % parts * part_rows
    stop = tl.minimum(start + part_rows, rows)
    normalize_rows(sample, output_ptr + index * rows * channels, offset, scale, shift, start, stop, BLOCK_M, SILU)


class _Norm(NamedTuple):
    """A call: contiguous weight and bias, and sources whose channels are adjacent."""

    sources: tuple[Tensor, Tensor | None, Tensor | None]  # (samples, rows, channels) twice, and (clips, channels)
    weight: Tensor
    bias: Tensor
    total: Tensor | None
    output: Tensor
    group_size: int
    samples_per_clip: int
    eps: float
    silu: bool

    def strides(self) -> tuple[int, ...]:
        """The channels of x, then the strides of all sources, as the kernels take them."""
        x, second, vector = self.sources
        of_second = (0, 0) if second is None else (second.stride(0), second.stride(1))
        return x.shape[2], x.stride(0), x.stride(1), *of_second, 0 if vector is None else vector.stride(0)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None,
    skip: Tensor | None,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    return normalize(x, skip, embedding, None, weight, bias, groups, eps, over_frames, silu)


def normalize(
    x: Tensor,
    second: Tensor | None,
    vector: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> Tensor:
    """GroupNorm and SiLU of the channels of x and of `second`, or of x + second where that is to be written to `total`.

    vector: (B, C) or None, added first. total: contiguous, or None.
    """
    clips, frames, *_ = x.shape
    channels, samples_per_clip = len(weight), 1 if over_frames else frames
    output = x.new_empty(*x.shape[:-1], channels)

    def as_samples(tensor: Tensor) -> Tensor:
        return dense_rows(tensor.reshape(clips * samples_per_clip, -1, tensor.shape[-1]))

    second = None if second is None else as_samples(second)
    vector = None if vector is None else dense_rows(vector)
    norm = _Norm(
        *((as_samples(x), second, vector), weight.contiguous(), bias.contiguous(), total, output),
        *(channels // groups, samples_per_clip, eps, silu),
    )
    samples, rows, _ = norm.sources[0].shape
    group_channels, block_c = _whole_groups(norm.group_size, channels)
    programs = samples * triton.cdiv(channels, group_channels)
    small = rows <= FEW_ROWS or rows <= SMALL_ROWS and programs >= MULTIPROCESSORS
    fits = block_c <= WIDTHS[-1]
    whole = fits and (small or total is None and programs >= MANY_PROGRAMS)
    ways = ("one kernel", "two kernels") if fits else ("two kernels",)
    key = nearby(samples), rows, channels, groups, "sum" if total is not None else "norm", precision(x.dtype)
    with torch.cuda.device_of(x):
        way = choose("group_norm_silu", key, ways, "one kernel" if whole else "two kernels")
        if way == "one kernel":
            _normalize_whole_samples(norm, group_channels, block_c)
        else:
            _normalize_parts(norm)
    return output


def _normalize_whole_samples(norm: _Norm, group_channels: int, block_c: int) -> None:
    samples, rows, _ = norm.sources[0].shape
    channels = len(norm.weight)
    blocks = triton.cdiv(channels, group_channels)
    sizes = SMALL if rows <= SMALL_ROWS else LARGE if norm.total is None else ADDITION
    _whole_sample_kernel[(samples * blocks,)](
        *(*norm.sources, norm.weight, norm.bias, norm.total, norm.output),
        *(rows, channels, blocks, norm.group_size, norm.samples_per_clip, *norm.strides(), norm.eps),
        ADD=norm.total is not None,
        SILU=norm.silu,
        GROUP_CHANNELS=group_channels,
        BLOCK_G=max(triton.next_power_of_2(block_c // norm.group_size), MIN_BLOCK_G),
        LOADS=sizes[1],
        **_tile(block_c, norm, sizes),
    )


def _normalize_parts(norm: _Norm) -> None:
    samples, rows, _ = norm.sources[0].shape
    channels, group_size = len(norm.weight), norm.group_size
    block_c = min(BLOCK_C, triton.next_power_of_2(channels))
    programs = samples * triton.cdiv(channels, block_c)  # for a part of each sample
    adds = norm.total is not None
    sizes = ADDITION if adds else STATISTICS
    tile = _tile(block_c, norm, sizes)
    chunk_rows, chunks = _parts(rows, programs, tile["BLOCK_M"], MAX_CHUNKS)
    grain = 2 if group_size % 2 == 0 else 1
    sums = norm.output.new_empty(samples, chunks, 2, channels // grain, dtype=torch.float32)
    _statistics_kernel[(programs * chunks,)](
        *(*norm.sources, norm.total, sums),
        *(rows, chunk_rows, chunks, channels, group_size, norm.samples_per_clip, *norm.strides()),
        ADD=adds,
        GRAIN=grain,
        LOADS=sizes[1],
        **tile,
    )
    if norm.total is not None:
        norm = norm._replace(sources=(norm.total.view(samples, rows, channels), None, None))
    tile = _tile(block_c, norm, APPLY)
    part_rows, parts = _parts(rows, programs, tile["BLOCK_M"], rows)
    touched = block_c // group_size if block_c % group_size == 0 else (block_c - 2) // group_size + 2
    most_sums = max(triton.next_power_of_2(touched * group_size // grain), MIN_SUMS)
    _apply_kernel[(programs * parts,)](
        *(*norm.sources, norm.weight, norm.bias, sums, norm.output),
        *(rows, part_rows, parts, chunks, channels, group_size, grain, norm.samples_per_clip, *norm.strides()),
        norm.eps,
        SILU=norm.silu,
        BLOCK_G=max(triton.next_power_of_2(touched), MIN_BLOCK_G),
        SUMS=most_sums,
        CHUNKS=max(SUMS_TILE // most_sums, 1),
        **tile,
    )


def _whole_groups(group_size: int, channels: int) -> tuple[int, int]:
    """How many channels, of whole groups, a program of the one kernel has, and the power of two that holds them."""
    for width in WIDTHS:
        held = min(width // group_size * group_size, channels)
        if held == channels or held >= MIN_SHARE * width:
            break
    held = max(held, group_size)
    return held, triton.next_power_of_2(held)


def _tile(block_c: int, norm: _Norm, warps_and_loads: tuple[int, int]) -> dict[str, int | bool]:
    """The constants of a program whose threads each load so many words of 16 bytes at a time."""
    warps, loads = warps_and_loads
    rows = max(warps * WARP_BYTES // (norm.output.element_size() * block_c), 1)
    return {"BLOCK_M": rows * loads, "BLOCK_C": block_c, **options(warps)}


def _parts(rows: int, programs: int, block_m: int, most: int) -> tuple[int, int]:
    """How many rows, whole tiles of block_m, a part of a sample has, and how many parts; `programs` work on each."""
    wanted = max(min(rows // PART_ROWS, MOST_PROGRAMS // programs), FEWEST_PROGRAMS // programs, 1)
    part_rows = triton.cdiv(triton.cdiv(rows, min(wanted, most)), block_m) * block_m
    return part_rows, triton.cdiv(rows, part_rows)
