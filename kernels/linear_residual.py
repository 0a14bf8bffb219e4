"""A linear layer with the residual addition in its epilogue. reference.linear_residual states the maths."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """rows x columns of the output, made of blocks of `block` input channels, `stages` of them in flight."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


# The largest first: the first that divides the columns and of which there are ENOUGH_TILES serves, else the last. No
# entry was measured; all compile without spills for sm_80 and sm_90, whose widest matrix instructions need 64 rows.
HALF = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4))
HALF_ODD = (Tile(64, 64, 32, 4, 2),)  # loads of one value at a time, which larger tiles have no registers for
FLOAT32 = (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3))
ENOUGH_TILES = 108  # the multiprocessors of an A100; an H100 has 132
# Tile rows that are worked through column by column together, so that x and weight are read from the L2 cache.
GROUP = 8


@triton.jit(do_not_specialize=["m"])
def _linear_residual_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,
    residual_ptr,  # (M, N)
    output_ptr,  # (M, N), contiguous
    m,
    n,
    k,
    s_x,
    s_weight,
    s_residual,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.cdiv(n, COLUMNS)
    first = program // (GROUP * columns) * GROUP
    group = tl.minimum(tl.cdiv(m, ROWS) - first, GROUP)
    place = program % (GROUP * columns)
    row = (first + place % group).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = place // group * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = row < m
    in_columns = column < n

    lane = tl.arange(0, BLOCK_K)
    x_ptr += (row * s_x)[:, None]
    weight_ptr += (column.to(tl.int64) * s_weight)[None, :]
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        c = start + lane
        x = tl.load(x_ptr + c[None, :], mask=in_rows[:, None] & (c < k)[None, :], other=0.0)
        weight = tl.load(weight_ptr + c[:, None], mask=in_columns[None, :] & (c < k)[:, None], other=0.0)
        product = tl.dot(x, weight, product, input_precision="ieee")

    mask = in_rows[:, None] & in_columns[None, :]
    if HAS_BIAS:
        product += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    residual = tl.load(residual_ptr + (row * s_residual)[:, None] + column[None, :], mask=mask, other=0.0)
    output = (residual.to(tl.float32) + product).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + (row * n)[:, None] + column[None, :], output, mask=mask)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """As reference.linear_residual. x: (..., K), weight: (N, K), bias: (N,) or None, residual: (..., N)."""
    output = residual.new_empty(residual.shape)
    x, weight, residual = (_dense_rows(tensor) for tensor in (x, weight, residual))
    (m, k), n = x.shape, len(weight)
    # Rows that start at multiples of 16 values are loaded in words of 16 bytes.
    odd = any(size % 16 for size in (k, n, x.stride(0), weight.stride(0), residual.stride(0)))
    tiles = FLOAT32 if x.dtype == torch.float32 else HALF_ODD if odd else HALF
    fitting = (tile for tile in tiles if n % tile.columns == 0 and _count(tile, m, n) >= ENOUGH_TILES)
    tile = next(fitting, tiles[-1])
    with torch.cuda.device_of(x):
        _linear_residual_kernel[(_count(tile, m, n),)](
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            residual,
            output,
            m,
            n,
            k,
            x.stride(0),
            weight.stride(0),
            residual.stride(0),
            HAS_BIAS=bias is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            BLOCK_K=tile.block,
            GROUP=GROUP,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return output


def _dense_rows(x: Tensor) -> Tensor:
    """(..., C) as (rows, C) whose channels are neighbors: a view of most tensors."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _count(tile: Tile, m: int, n: int) -> int:
    return triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
