"""The moments of rows that a product writes for the LayerNorm after it, and that a folded norm reads, in Triton.

moments: (rows, parts, 2), in float32: of each part of a row the mean and the sum of squared deviations from it.
"""

from __future__ import annotations

import triton
import triton.language as tl


def part_columns(columns: int) -> int:
    """How many of a row's columns each of its moments describes: as ops/linear_moments.py says."""
    return 160 if columns % 160 == 0 else 128


@triton.jit
def row_norm(
    moments_ptr: tl.tensor,  # (rows, parts, 2)
    row: tl.tensor,  # int64, rows that there are
    inputs: tl.tensor,
    eps: tl.tensor,
    PART: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, no fewer than the parts
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and reciprocal standard deviation of the rows, from those of their parts (Chan, Golub and LeVeque)."""
    part = tl.arange(0, PARTS)
    parts = tl.cdiv(inputs, PART)
    count = tl.clamp((inputs - part * PART).to(tl.float32), 0.0, PART)[None, :]
    place = moments_ptr + 2 * (row[:, None] * parts + part[None, :])
    means = tl.load(place, mask=(part < parts)[None, :], other=0.0)
    deviations = tl.load(place + 1, mask=(part < parts)[None, :], other=0.0)
    mean = tl.sum(means * count, 1) / inputs
    apart = means - mean[:, None]
    variance = tl.sum(deviations + apart * apart * count, 1) / inputs
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def write_moments(
    moments_ptr: tl.tensor,  # (rows, parts, 2)
    values: tl.tensor,  # [BLOCK_M, BLOCK_N], as they are stored
    second: tl.tensor,  # [BLOCK_M, SECOND]
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SECOND: tl.constexpr,
) -> None:
    """Mean and sum of squared deviations of a part of each row, which are the columns of this program."""
    count = tl.minimum(columns - column, BLOCK_N + SECOND)
    values = values.to(tl.float32)
    if SECOND > 0:  # 160 columns are taken where they divide a row
        second = second.to(tl.float32)
        mean = (tl.sum(values, 1) + tl.sum(second, 1)) / count
        values -= mean[:, None]
        second -= mean[:, None]
        deviations = tl.sum(values * values, 1) + tl.sum(second * second, 1)
    else:
        inside = (tl.arange(0, BLOCK_N) < count)[None, :]
        mean = tl.sum(tl.where(inside, values, 0.0), 1) / count
        values = tl.where(inside, values - mean[:, None], 0.0)
        deviations = tl.sum(values * values, 1)
    i = row + tl.arange(0, BLOCK_M)
    parts = tl.cdiv(columns, BLOCK_N + SECOND)
    place = moments_ptr + 2 * (i.to(tl.int64) * parts + column // (BLOCK_N + SECOND))
    tl.store(place, mean, mask=i < rows)
    tl.store(place + 1, deviations, mask=i < rows)
