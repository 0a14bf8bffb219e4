"""The sum that ends a residual block, alone and with the norm that follows it, in Triton.

x, addend: (..., C). addend_bias: (C,) or None. Sums are in float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu import normalize
from .launch import as_matrix, options

# Not measured: one load of 16 bytes of each tensor by each thread, in lines of 128 bytes.
BLOCK_C, TILE_BYTES, WARPS = 64, 8192, 8


@triton.jit(do_not_specialize=["rows"])
def _residual_add_kernel(
    x_ptr: tl.tensor,
    addend_ptr: tl.tensor,
    bias_ptr: tl.tensor | None,
    output_ptr: tl.tensor,  # contiguous
    rows: tl.tensor,
    channels: tl.tensor,
    x_stride_row: tl.tensor,
    addend_stride_row: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (channel < channels)
    x = tl.load(x_ptr + row * x_stride_row + channel, mask=inside, other=0.0).to(tl.float32)
    addend = tl.load(addend_ptr + row * addend_stride_row + channel, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        addend += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * channels + channel, x + addend, mask=inside)


def residual_add(x: Tensor, addend: Tensor, addend_bias: Tensor | None) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    output = x.new_empty(x.shape)
    x, addend = as_matrix(x), as_matrix(addend)
    rows, channels = x.shape
    block_c = min(BLOCK_C, triton.next_power_of_2(channels))
    block_m = TILE_BYTES // (block_c * x.element_size())
    with torch.cuda.device_of(x):
        _residual_add_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(channels, block_c),)](
            x,
            addend,
            None if addend_bias is None else addend_bias.contiguous(),
            output,
            rows,
            channels,
            x.stride(0),
            addend.stride(0),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            **options(WARPS),
        )
    return output


def add_group_norm_silu(
    x: Tensor,
    addend: Tensor,
    addend_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """As the op's reference, for float16, bfloat16 and float32."""
    total = x.new_empty(x.shape)
    vector = None if addend_bias is None else addend_bias.expand(len(x), -1)
    return total, normalize(x, addend, vector, total, weight, bias, groups, eps, over_frames, silu)
