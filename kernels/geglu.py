"""GEGLU in Triton.

(..., 2D) -> (..., D), values * GELU(gates), where the values are the first D channels and the gates the others; it is
computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import as_matrix, options

# Values a program computes, and the most columns of its tile. 16 values a thread are two loads of 16
# bytes in half precision. Chosen by reasoning, not measured: it is bound by memory.
BLOCK = 2048
MAX_BLOCK_N = 256
NUM_WARPS = 4


@triton.jit
def gated(values: tl.tensor, gates: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """values * GELU(gates), in float32: with erf to its last digits, or within 6e-7 and in a third of the instructions.

    The latter is Abramowitz and Stegun's 7.1.26: half of 1 - erf(|g| / sqrt(2)) as a polynomial of
    t = 1 / (1 + 0.3275911 |g| / sqrt(2)) times exp(-g^2 / 2).
    """
    if EXACT:
        gelu = 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
    else:
        size = tl.abs(gates)
        r = tl.rsqrt(1.0 + 0.23164189 * size)
        t = r * r
        polynomial = t * (
            0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        )
        gelu = tl.maximum(gates, 0.0) - size * polynomial * tl.exp2(-0.72134752 * gates * gates)
    return values * gelu


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
    exact: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    tl.store(output_ptr + row * columns + column, gated(values, gates, exact), mask=inside)


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
