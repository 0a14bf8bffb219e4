"""A linear layer with the residual addition in its epilogue, in Triton.

x: (..., K). weight: (N, K). bias: (N,) or None. residual: (..., N). Returns residual + linear(x), in the dtype of the
residual; sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, aligned, as_matrix, choose_tile, options, precision

# The largest first: the first that divides the columns and of which there are enough to fill a GPU is taken, or else
# the last. None was measured; all compile without spills for sm_80 and sm_90, whose widest matrix instructions need 64
# rows.
TILES = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    # Unaligned rows load value by value, for which larger tiles have no registers left.
    "half, unaligned": (Tile(64, 64, 32, 4, 2),),
    "float32": (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3)),
}
# As many tiles above one another are computed column by column, so that x and weight are read from the L2 cache.
GROUP_M = 8


@triton.jit(do_not_specialize=["rows"])
def _linear_residual_kernel(
    x_ptr: tl.tensor,  # (rows, inputs)
    weight_ptr: tl.tensor,  # (columns, inputs)
    bias_ptr: tl.tensor | None,
    residual_ptr: tl.tensor,  # (rows, columns)
    output_ptr: tl.tensor,  # (rows, columns), contiguous
    rows: tl.tensor,
    columns: tl.tensor,
    inputs: tl.tensor,
    x_stride_row: tl.tensor,
    weight_stride_row: tl.tensor,
    residual_stride_row: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    blocks = tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP_M * blocks) * GROUP_M
    group = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP_M)
    position = program % (GROUP_M * blocks)
    row = (first + position % group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = position // group * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_inside = row < rows
    columns_inside = column < columns

    x_ptr += (row * x_stride_row)[:, None]
    weight_ptr += (column.to(tl.int64) * weight_stride_row)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=NUM_STAGES):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k[None, :], mask=rows_inside[:, None] & (k < inputs)[None, :], other=0.0)
        weight = tl.load(weight_ptr + k[:, None], mask=columns_inside[None, :] & (k < inputs)[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")

    inside = rows_inside[:, None] & columns_inside[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=columns_inside, other=0.0).to(tl.float32)[None, :]
    residual_ptr = residual_ptr + (row * residual_stride_row)[:, None] + column[None, :]
    residual = tl.load(residual_ptr, mask=inside, other=0.0).to(tl.float32)
    output = (residual + total).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + (row * columns)[:, None] + column[None, :], output, mask=inside)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    output = residual.new_empty(residual.shape)
    x, weight, residual = (as_matrix(tensor) for tensor in (x, weight, residual))
    (rows, inputs), columns = x.shape, len(weight)
    kind = precision(x.dtype)
    if kind == "half" and not aligned(inputs, columns, x.stride(0), weight.stride(0), residual.stride(0)):
        kind = "half, unaligned"
    *larger, last = TILES[kind]
    tile = choose_tile([*(tile for tile in larger if columns % tile.block_n == 0), last], rows, columns)
    with torch.cuda.device_of(x):
        _linear_residual_kernel[(tile.programs(rows, columns),)](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            residual,
            output,
            rows,
            columns,
            inputs,
            x.stride(0),
            weight.stride(0),
            residual.stride(0),
            **tile.blocks(),
            GROUP_M=GROUP_M,
            NUM_STAGES=tile.stages,
            **options(tile.warps, tile.stages),
        )
    return output
