"""GEGLU in Triton, alone and in the epilogue of the linear layer before it. reference.py states the maths."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Of geglu alone: values a program, and the most columns of its tile. 16 values a thread are two loads of 16 bytes in
# half precision. Reasoned, not measured: it is bound by memory.
BLOCK = 2048
MOST_COLUMNS = 256
NUM_WARPS = 4


class Tile(NamedTuple):
    """Of linear_geglu: rows of x and columns of the result a program, a step along K, and how many steps are in flight.

    A program holds two accumulators of rows x columns, the values and their gates.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


# By half precision. Reasoned and compiled without spills for sm_80 and sm_90, not measured: in half precision 128
# registers and 96 KiB of shared memory (64 on sm_80) let two programs share an SM, so that one's error functions hide
# behind the other's products.
TILES = {
    True: Tile(rows=128, columns=64, step=64, warps=8, stages=3),
    False: Tile(rows=64, columns=32, step=16, warps=4, stages=3),
}
# The widest input, K, that the product and the gate share a kernel for, by half precision. Reasoned, not measured: up
# to 640, writing and reading 2D values a row takes about as long as the product in half precision; at 1280 the product
# outweighs them and cuBLAS's is the faster one. In float32 it does from the start, but launches are all that counts in
# a tiny model.
MOST_FUSED_INPUTS = {True: 640, False: 128}


@triton.jit
def _gated(values, gate):
    """values GELU(gate), in float32."""
    return values * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))


# Rows only end a mask: one kernel serves all their numbers.
@triton.jit(do_not_specialize=["rows"])
def _geglu_kernel(x_ptr, output_ptr, rows, columns, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    at = x_ptr + row * x_row + column
    values = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
    gate = tl.load(at + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * columns + column, _gated(values, gate), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _linear_geglu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    rows,
    columns,
    inputs,
    x_row,
    weight_row,
    WHOLE_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    # Neighboring programs share rows of x; the weight stays in the L2 cache.
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, STEP)
    row_mask = row < rows
    column_mask = column < columns
    x_at = x_ptr + row[:, None] * x_row + step[None, :]  # [ROWS, STEP]
    values_at = weight_ptr + column.to(tl.int64)[None, :] * weight_row + step[:, None]  # [STEP, COLUMNS]
    gate_at = weight_ptr + (column + columns).to(tl.int64)[None, :] * weight_row + step[:, None]
    values = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, inputs, STEP):
        x_mask = row_mask[:, None]
        weight_mask = column_mask[None, :]
        if not WHOLE_STEPS:
            x_mask = x_mask & (start + step < inputs)[None, :]
            weight_mask = weight_mask & (start + step < inputs)[:, None]
        x = tl.load(x_at + start, mask=x_mask, other=0.0)
        values = tl.dot(x, tl.load(values_at + start, mask=weight_mask, other=0.0), values, input_precision="ieee")
        gate = tl.dot(x, tl.load(gate_at + start, mask=weight_mask, other=0.0), gate, input_precision="ieee")
    if bias_ptr is not None:
        values += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + columns + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    at = output_ptr + row[:, None] * columns + column[None, :]
    tl.store(at, _gated(values, gate), mask=row_mask[:, None] & column_mask[None, :])


def geglu(x: Tensor) -> Tensor:
    """As reference.geglu, for float16, bfloat16 and float32."""
    rows = _rows(x)
    columns = x.shape[-1] // 2
    output = x.new_empty(*x.shape[:-1], columns)
    tile_columns = min(MOST_COLUMNS, triton.next_power_of_2(columns))
    tile_rows = BLOCK // tile_columns
    grid = (triton.cdiv(len(rows), tile_rows) * triton.cdiv(columns, tile_columns),)
    with torch.cuda.device_of(x):
        _geglu_kernel[grid](
            rows,
            output,
            len(rows),
            columns,
            rows.stride(0),
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # Triton's default changes between versions
        )
    return output


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As reference.linear_geglu, for float16, bfloat16 and float32."""
    half = x.dtype != torch.float32
    inputs = x.shape[-1]
    rows = _rows(x)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    # Where rows do not begin at multiples of 16 values, loads of single values take more registers than there are.
    aligned = not any(n % 16 for n in (inputs, rows.stride(0), weight.stride(0)))
    if inputs > MOST_FUSED_INPUTS[half] or not aligned:
        return geglu(F.linear(x, weight, bias))
    columns = len(weight) // 2
    output = x.new_empty(*x.shape[:-1], columns)
    tile = TILES[half]
    with torch.cuda.device_of(x):
        _linear_geglu_kernel[(triton.cdiv(len(rows), tile.rows) * triton.cdiv(columns, tile.columns),)](
            rows,
            weight,
            None if bias is None else bias.contiguous(),
            output,
            len(rows),
            columns,
            inputs,
            rows.stride(0),
            weight.stride(0),
            WHOLE_STEPS=inputs % tile.step == 0,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            STEP=tile.step,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return output


def _rows(x: Tensor) -> Tensor:
    """x as (rows, channels), the channels of a row contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
