"""GEGLU in Triton, alone and in the epilogue of the linear layer before it.

geglu: (..., 2D) -> (..., D), values * GELU(gates), where the values are the first D channels and the gates the others.
linear_geglu: x (..., K), weight (2D, K) and bias (2D,) or None -> (..., D), geglu of the linear layer.
Both compute in float32 and return the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, aligned, as_matrix, dense_rows, options, precision

# For geglu alone: values a program computes, and the most columns of its tile. 16 values a thread are two loads of 16
# bytes in half precision. Chosen by reasoning, not measured: it is bound by memory.
BLOCK = 2048
MAX_BLOCK_N = 256
NUM_WARPS = 4

# For linear_geglu, whose programs hold two sums of BLOCK_M x BLOCK_N, the values and their gates. Chosen by reasoning
# and compiled without spills for sm_80 and sm_90, not measured: in half precision 128 registers and 96 KiB of shared
# memory (64 on sm_80) let two programs share a multiprocessor, so that one computes error functions while the other
# multiplies.
TILES = {
    "half": Tile(block_m=128, block_n=64, block_k=64, warps=8, stages=3),
    "float32": Tile(block_m=64, block_n=32, block_k=16, warps=4, stages=3),
}
# The widest input, K, for which one kernel computes both the product and GEGLU. Chosen by reasoning, not measured: up
# to 640, writing and reading 2D values a row takes about as long as the product in half precision; at 1280 the product
# outweighs them, and cuBLAS computes it faster. In float32 cuBLAS is faster at any width, but the time of a tiny model
# is that of its launches.
MAX_FUSED_INPUTS = {"half": 640, "float32": 128}


@triton.jit
def _gated(values: tl.tensor, gates: tl.tensor) -> tl.tensor:
    """values * GELU(gates), in float32."""
    return values * (0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476)))


# The number of rows only bounds a mask: one compiled kernel serves all.
@triton.jit(do_not_specialize=["rows"])
def _geglu_kernel(
    x_ptr: tl.tensor,
    output_ptr: tl.tensor,  # contiguous
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride_row: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    blocks = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (column < columns)
    x_ptr = x_ptr + row * x_stride_row + column
    values = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    gates = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * columns + column, _gated(values, gates), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _linear_geglu_kernel(
    x_ptr: tl.tensor,  # (rows, inputs)
    weight_ptr: tl.tensor,  # (2 * columns, inputs)
    bias_ptr: tl.tensor | None,
    output_ptr: tl.tensor,  # (rows, columns), contiguous
    rows: tl.tensor,
    columns: tl.tensor,
    inputs: tl.tensor,
    x_stride_row: tl.tensor,
    weight_stride_row: tl.tensor,
    WHOLE_STEPS: tl.constexpr,  # inputs is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Neighboring programs share rows of x; the weight stays in the L2 cache.
    blocks = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows_inside = row < rows
    columns_inside = column < columns
    x_ptr = x_ptr + row[:, None] * x_stride_row + k[None, :]  # [BLOCK_M, BLOCK_K]
    values_ptr = weight_ptr + column.to(tl.int64)[None, :] * weight_stride_row + k[:, None]  # [BLOCK_K, BLOCK_N]
    gates_ptr = weight_ptr + (column + columns).to(tl.int64)[None, :] * weight_stride_row + k[:, None]
    values = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    gates = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        x_inside = rows_inside[:, None]
        weight_inside = columns_inside[None, :]
        if not WHOLE_STEPS:
            x_inside = x_inside & (start + k < inputs)[None, :]
            weight_inside = weight_inside & (start + k < inputs)[:, None]
        x = tl.load(x_ptr + start, mask=x_inside, other=0.0)
        values = tl.dot(x, tl.load(values_ptr + start, mask=weight_inside, other=0.0), values, input_precision="ieee")
        gates = tl.dot(x, tl.load(gates_ptr + start, mask=weight_inside, other=0.0), gates, input_precision="ieee")
    if bias_ptr is not None:
        values += tl.load(bias_ptr + column, mask=columns_inside, other=0.0).to(tl.float32)[None, :]
        gates += tl.load(bias_ptr + columns + column, mask=columns_inside, other=0.0).to(tl.float32)[None, :]
    output_ptr = output_ptr + row[:, None] * columns + column[None, :]
    tl.store(output_ptr, _gated(values, gates), mask=rows_inside[:, None] & columns_inside[None, :])


def geglu(x: Tensor) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    matrix = as_matrix(x)
    rows, columns = len(matrix), x.shape[-1] // 2
    output = x.new_empty(*x.shape[:-1], columns)
    block_n = min(MAX_BLOCK_N, triton.next_power_of_2(columns))
    block_m = BLOCK // block_n
    with torch.cuda.device_of(x):
        _geglu_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)](
            matrix,
            output,
            rows,
            columns,
            matrix.stride(0),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            **options(NUM_WARPS),
        )
    return output


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    matrix, weight = as_matrix(x), dense_rows(weight)
    rows, inputs = matrix.shape
    # Unaligned rows load value by value, which takes more registers than there are.
    is_aligned = aligned(inputs, matrix.stride(0), weight.stride(0))
    if inputs > MAX_FUSED_INPUTS[precision(x.dtype)] or not is_aligned:
        return geglu(F.linear(x, weight, bias))
    columns = len(weight) // 2
    output = x.new_empty(*x.shape[:-1], columns)
    tile = TILES[precision(x.dtype)]
    with torch.cuda.device_of(x):
        _linear_geglu_kernel[(tile.programs(rows, columns),)](
            matrix,
            weight,
            None if bias is None else bias.contiguous(),
            output,
            rows,
            columns,
            inputs,
            matrix.stride(0),
            weight.stride(0),
            WHOLE_STEPS=inputs % tile.block_k == 0,
            **tile.blocks(),
            **options(tile.warps, tile.stages),
        )
    return output
