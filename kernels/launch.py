"""What the kernels share: how their tensors are laid out, their tiles are chosen and their launches are compiled.

All kernels use the same names:

x_stride_row               values from one row of x to the next: the tensor, "stride", the dimension
BLOCK_M, BLOCK_N, BLOCK_K  of a program's output: rows (tokens, pixels of a frame) and columns; and the inner size of a
                           step of the matrix product. Also BLOCK_C, channels, where no matrices are multiplied, and
                           BLOCK_D, channels of an attention head
rows_inside                mask of the rows of a block that the tensor has; `inside` is that of a whole tile
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The multiprocessors of an H100 or H200; and the time to load a value from the L2 cache, in products of one value, for
# `choose_tile`. At peak it is 64, of which an estimated third is not hidden behind products.
MULTIPROCESSORS, LOADED = 132, 20
# Values between two rows, so that the offsets within a tile of at most 128 rows fit in 32 bits.
MAX_ROW_STRIDE = 2**24


class Tile(NamedTuple):
    """The part of a matrix product that one program computes, and how.

    block_m, block_n: rows and columns of the output. block_k: inner size of a step, of which `stages` are in flight.
    second: columns of a second sum of the same rows.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    second: int = 0

    @property
    def width(self) -> int:
        """The columns of both sums."""
        return self.block_n + self.second

    def programs(self, rows: int, columns: int) -> int:
        """How many programs, one a tile, cover an output of rows x columns."""
        return triton.cdiv(rows, self.block_m) * triton.cdiv(columns, self.width)

    def blocks(self) -> dict[str, int]:
        """The kernel's constants, by the names of its parameters."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


def choose_tile(tiles: Sequence[Tile], rows: int, columns: int, samples: int = 1) -> Tile:
    """The tile that should compute `samples` outputs of rows x columns soonest; the first of equals.

    Chosen by reasoning, not measured: the busiest multiprocessor computes its tiles one after another, and loading a
    row of x or of the weight takes about as long as LOADED products of a value.
    """

    def time(tile: Tile) -> int:
        rounds = triton.cdiv(samples * tile.programs(rows, columns), MULTIPROCESSORS)
        return rounds * (tile.block_m * tile.width + LOADED * (tile.block_m + tile.width))

    return min(tiles, key=time)


def options(warps: int, stages: int | None = None, *, contract: bool = True) -> dict[str, int | bool]:
    """The keyword arguments of a launch that are Triton's own; without `stages`, Triton's default.

    contract: whether multiplications and additions are fused (FMA), which rounds once where the CPU's ops on latents
    round twice. It is always said: Triton's default differs between its versions, and with it the last bit of a result.
    """
    chosen: dict[str, int | bool] = {"num_warps": warps, "enable_fp_fusion": contract}
    return chosen if stages is None else {**chosen, "num_stages": stages}


def architecture() -> int:
    """Compute capability of the current GPU as one number, such as 80 or 90; in the interpreter 80."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 80
    return triton.runtime.driver.active.get_current_target().arch


def has_wgmma() -> bool:
    """Whether the GPU is of sm_90, whose tiles are loaded by tensor descriptors: no other's were checked with them."""
    return architecture() // 10 == 9


def precision(dtype: torch.dtype) -> str:
    """The key of a dtype in tables of tiles: "half" for float16 and bfloat16, or "float32"."""
    return "float32" if dtype == torch.float32 else "half"


def loadable(x: Tensor) -> Tensor:
    """x, of any floating-point dtype, in one that the kernels read: float64, among others, becomes float32."""
    return x if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x.float()


def dense_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: x itself where it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_matrix(x: Tensor) -> Tensor:
    """(..., C) as (rows, C) with contiguous rows: a view of most tensors."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def rows_within_32_bits(x: Tensor) -> Tensor:
    """x with contiguous rows, near enough for the offsets within a tile to fit in 32 bits: x itself where they are."""
    return x if x.stride(-1) == 1 and x.stride(-2) < MAX_ROW_STRIDE else x.contiguous()


def aligned(*sizes: int) -> bool:
    """Whether rows of these lengths and strides start at multiples of 16 values, and load as words of 16 bytes."""
    return not any(size % 16 for size in sizes)


@triton.jit
def pixels_of_block(
    height: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Where the BLOCK pixels of this program lie in planes of height x width: the first's index, planes, y, x.

    One division takes 64 bits. The index of a plane, and that of a pixel in its plane, fit in 32.
    """
    pixels = height * width
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = (first % pixels).to(tl.int32) + tl.arange(0, BLOCK)
    plane = (first // pixels).to(tl.int32) + offset // pixels
    pixel = offset % pixels
    return first, plane, pixel // width, pixel % width
