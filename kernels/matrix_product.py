"""The one product of matrices in Triton, and all that is done to its result before it is written.

y = x weight^T, summed in float32, where x is (samples, rows, inputs) and weight (taps, outputs, inputs). More than one
tap makes it a convolution over rows: tap t meets x `pixels` * (t - 1) rows further down, and zeros outside the sample.

On sm_90, tiles in half precision are loaded and stored by tensor descriptors, that is by the tensor memory accelerator
(TMA), which fills what lies outside a tensor with zeros. Elsewhere, and for rows that are not aligned, they are loaded
by pointers, past the registers where no mask is needed: rows outside then repeat the last one.

A program has one sum of BLOCK_M x BLOCK_N values, or a second one beside it, from the same rows of x: the gates of a
GEGLU, or the last 32 of 160 columns, which divide the models' widths 320, 640 and 1280 where 128 do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .geglu import gated
from .launch import choose_tile, options, rows_within_32_bits
from .moments import part_columns, row_norm, write_moments
from .product_tiles import DESCRIBED, GATED_TILES, OTHER_GATED_TILES, TILES, kind_of, most_registers
from .tuned import choose, nearby

# As many tiles above one another are computed column by column, so that x and weight are read from the L2 cache.
GROUP_M = 8


class RowNorm(NamedTuple):
    """A norm of the rows of x that is folded into the weight. moments: (rows, parts, 2). weight_sums: (outputs,)."""

    moments: Tensor
    weight_sums: Tensor
    eps: float


@triton.jit
def _load(
    tensor: tl.tuple,  # a pointer or a descriptor, strides of matrices and of rows, rows and columns of a matrix
    matrix: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """The block from (row, column) on. By pointers and without a mask, there must be all columns."""
    source, stride_matrix, stride_row, rows, columns = tensor
    if TMA:
        block = source.load([matrix, row, column]).reshape(ROWS, COLUMNS)
    else:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        # Offsets within a block fit in 32 bits: addresses take half the registers.
        source += tl.cast(matrix, tl.int64) * stride_matrix + tl.cast(row, tl.int64) * stride_row + column
        if MASKED:
            inside = ((row + i >= 0) & (row + i < rows))[:, None] & (column + j < columns)[None, :]
            block = tl.load(source + (i * stride_row)[:, None] + j[None, :], mask=inside, other=0.0)
        else:
            i = tl.minimum(i, rows - 1 - row)
            block = tl.load(source + (i * stride_row)[:, None] + j[None, :])
    return block


@triton.jit
def _store(
    target: tl.tensor,  # (samples, rows, columns), contiguous, as a pointer or a descriptor
    values: tl.tensor,  # [ROWS, COLUMNS]
    sample: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
) -> None:
    if TMA:
        target.store([sample, row, column], values.reshape(1, ROWS, COLUMNS))
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        place = (sample.to(tl.int64) * rows + i)[:, None] * columns + j[None, :]
        tl.store(target + place, values, mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def _add_products(
    total: tl.tensor,  # [BLOCK_M, BLOCK_N]
    second: tl.tensor,  # [BLOCK_M, SECOND]
    x: tl.tuple,
    weight: tl.tuple,
    second_weight: tl.tuple,
    place: tl.tuple,  # sample, row, column and second column
    mean: tl.tensor | None,  # [BLOCK_M], to be taken off x
    first_input: tl.tensor,
    pixels: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The sums, with the products of x and the weight's inputs from first_input on added to them."""
    sample, row, column, second_column = place
    X_MASKED: tl.constexpr = TAPS > 1 or not WHOLE_STEPS
    MASKED: tl.constexpr = not WHOLE_STEPS
    end = x[4]
    if TAPS > 1:
        end = TAPS * BLOCK_K * tl.cdiv(end, BLOCK_K)
    # Without knowing that the loop runs, ptxas would wait after each matrix instruction of sm_90.
    tl.assume(end > 0)
    for step in tl.range(0, end, BLOCK_K):
        tap = step // BLOCK_K % TAPS
        k = step // (TAPS * BLOCK_K) * BLOCK_K
        a = _load(x, sample, row + (tap - TAPS // 2) * pixels, k, BLOCK_M, BLOCK_K, TMA, X_MASKED)
        b = _load(weight, tap, column, first_input + k, BLOCK_N, BLOCK_K, TMA, MASKED)
        if mean is not None:
            a -= mean[:, None]
        total = tl.dot(a, b.T, total, input_precision="ieee")
        if SECOND > 0:
            c = _load(second_weight, tap, second_column, first_input + k, SECOND, BLOCK_K, TMA, MASKED)
            second = tl.dot(a, c.T, second, input_precision="ieee")
    return total, second


@triton.jit
def _start(
    residual: tl.tensor | None,
    stride_sample: tl.tensor,
    stride_row: tl.tensor,
    sample: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """What a sum begins with: the residual, which thus is loaded while nothing else is to be done, or zeros."""
    if residual is None:
        start = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        tensor = residual, stride_sample, stride_row, rows, columns
        start = _load(tensor, sample, row, column, ROWS, COLUMNS, TMA, True).to(tl.float32)
    return start


@triton.jit
def _finish(
    total: tl.tensor,
    bias_ptr: tl.tensor | None,
    weight_sums_ptr: tl.tensor | None,
    mean: tl.tensor,
    rstd: tl.tensor,
    column: tl.tensor,
    outputs: tl.tensor,
    COLUMNS: tl.constexpr,
    CENTERED: tl.constexpr,
) -> tl.tensor:
    """A sum, with the folded norm of its rows applied and the bias added."""
    j = column + tl.arange(0, COLUMNS)
    if weight_sums_ptr is not None:
        if not CENTERED:
            sums = tl.load(weight_sums_ptr + j, mask=j < outputs, other=0.0)
            total -= mean[:, None] * sums[None, :]
        total *= rstd[:, None]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + j, mask=j < outputs, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["rows", "pixels"])
def _matrix_product_kernel(
    x: tl.tensor,  # (samples, rows, inputs); a descriptor or a pointer, as are skip, weight, residual and output
    skip: tl.tensor | None,  # (1, rows, skip_inputs)
    weight: tl.tensor,  # (TAPS, outputs, inputs + skip_inputs)
    second_weight: tl.tensor,  # the same tensor, in blocks of SECOND, as are the other second ones
    bias_ptr: tl.tensor | None,  # (outputs,)
    residual: tl.tensor | None,  # (samples, rows, columns)
    second_residual: tl.tensor | None,
    output: tl.tensor,  # (samples, rows, columns), contiguous
    second_output: tl.tensor,
    moments_ptr: tl.tensor | None,  # of the rows of x if there are weight_sums, or else of output, to be written
    weight_sums_ptr: tl.tensor | None,  # (outputs,)
    rows: tl.tensor,  # of a sample
    columns: tl.tensor,  # of the output; there are twice as many outputs if it is gated
    inputs: tl.tensor,
    skip_inputs: tl.tensor,
    pixels: tl.tensor,  # rows from one tap to the next
    eps: tl.tensor,
    x_stride_sample: tl.tensor,
    x_stride_row: tl.tensor,
    skip_stride_row: tl.tensor,
    weight_stride_tap: tl.tensor,
    weight_stride_row: tl.tensor,
    residual_stride_sample: tl.tensor,
    residual_stride_row: tl.tensor,
    TAPS: tl.constexpr,
    GATED: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # inputs and skip_inputs are multiples of BLOCK_K
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SECOND: tl.constexpr,
) -> None:
    WIDTH: tl.constexpr = BLOCK_N if GATED else BLOCK_N + SECOND
    blocks = tl.cdiv(columns, WIDTH)
    first = tl.program_id(0) // (GROUP_M * blocks) * GROUP_M
    group = tl.minimum(tl.num_programs(0) // blocks - first, GROUP_M)
    position = tl.program_id(0) % (GROUP_M * blocks)
    tile = first + position % group
    sample = tile // tl.cdiv(rows, BLOCK_M)
    row = tile % tl.cdiv(rows, BLOCK_M) * BLOCK_M
    column = position // group * WIDTH
    second_column = column + (columns if GATED else BLOCK_N)
    outputs = columns * (1 + GATED)

    a = x, x_stride_sample, x_stride_row, rows, inputs
    b = weight, weight_stride_tap, weight_stride_row, outputs, inputs + skip_inputs
    c = second_weight, weight_stride_tap, weight_stride_row, outputs, inputs + skip_inputs
    place = sample, row, column, second_column
    strides = residual_stride_sample, residual_stride_row
    total = _start(residual, *strides, sample, row, column, rows, columns, BLOCK_M, BLOCK_N, TMA)
    second = total
    if SECOND > 0:
        second = _start(second_residual, *strides, sample, row, second_column, rows, columns, BLOCK_M, SECOND, TMA)
    mean, rstd = None, None
    if weight_sums_ptr is not None:
        there = tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
        mean, rstd = row_norm(moments_ptr, there, inputs, eps, PART, PARTS)
    # In float32 the mean is taken off before the product, or it would show in the rounding of a sum of many values.
    dtype: tl.constexpr = output.dtype if TMA else output.dtype.element_ty
    CENTERED: tl.constexpr = weight_sums_ptr is not None and dtype == tl.float32
    total, second = _add_products(
        total,
        second,
        a,
        b,
        c,
        place,
        mean if CENTERED else None,
        0,
        pixels,
        TAPS,
        BLOCK_M,
        BLOCK_N,
        SECOND,
        BLOCK_K,
        TMA,
        WHOLE_STEPS,
    )
    if skip is not None:
        a = skip, 0, skip_stride_row, rows, skip_inputs
        total, second = _add_products(
            total, second, a, b, c, place, None, inputs, 0, 1, BLOCK_M, BLOCK_N, SECOND, BLOCK_K, TMA, WHOLE_STEPS
        )

    if SECOND > 0:
        second = _finish(second, bias_ptr, weight_sums_ptr, mean, rstd, second_column, outputs, SECOND, CENTERED)
        if not GATED:
            second = second.to(dtype)
            _store(second_output, second, sample, row, second_column, rows, columns, BLOCK_M, SECOND, TMA)
    total = _finish(total, bias_ptr, weight_sums_ptr, mean, rstd, column, outputs, BLOCK_N, CENTERED)
    if GATED:
        total = gated(total, second, dtype == tl.float32)
    total = total.to(dtype)
    _store(output, total, sample, row, column, rows, columns, BLOCK_M, BLOCK_N, TMA)
    if moments_ptr is not None and weight_sums_ptr is None:
        write_moments(moments_ptr, total, second, row, column, rows, columns, BLOCK_M, BLOCK_N, SECOND)


def matrix_product(
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
    moments: Tensor | None = None,
    gates: bool = False,
    pixels: int = 0,
) -> None:
    """Write x weight^T + bias to output, and what else is asked for; all of one dtype, float16, bfloat16 or float32.

    output: (samples, rows, columns), contiguous. x: (samples, rows, K). weight: (taps, outputs, K + L), where there are
    as many outputs as columns or, with `gates`, twice as many. bias: (outputs,) or None. skip: (1, rows, L), further
    inputs. residual: (samples, rows, columns), added. norm: of the rows of x. moments: (rows, parts, 2), those of
    the rounded output, to be written. pixels: rows from one tap to the next.
    """
    x, weight = rows_within_32_bits(x), rows_within_32_bits(weight)
    skip, residual = (None if t is None else rows_within_32_bits(t) for t in (skip, residual))
    (samples, rows, inputs), columns = x.shape, output.shape[-1]
    taps, outputs, weight_inputs = weight.shape
    assert norm is None or residual is None, "a residual would be normalized with the sum that begins with it"
    with torch.cuda.device_of(x):
        kind = kind_of([t for t in (x, weight, output, skip, residual) if t is not None])
        tiles = (GATED_TILES if gates else TILES)[kind]
        if moments is not None:  # a program writes those of a part
            tiles = tuple(tile for tile in tiles if tile.width == part_columns(columns))
        others = OTHER_GATED_TILES.get(kind, ()) if gates else ()
        key = nearby(samples * rows), outputs, inputs, weight_inputs - inputs, taps, kind
        what = "gated" if gates else "measured" if moments is not None else "folded" if norm else "plain"
        reasoned = choose_tile(tiles, rows, outputs, samples)
        tile = choose("matrix_product", (*key, what), (*tiles, *others), reasoned)
        m, n, second, k = tile.block_m, tile.block_n, tile.second, tile.block_k
        tma = kind == DESCRIBED

        def blocks(tensor: Tensor | None, rows: int, columns: int) -> Tensor | TensorDescriptor | None:
            """A tensor as the kernel takes it, to be read or written in blocks of rows x columns."""
            if not tma or tensor is None or not rows or not columns:
                return tensor
            return TensorDescriptor.from_tensor(tensor, [1, rows, columns])

        def strides(tensor: Tensor | None, *dimensions: int) -> list[int]:
            """Those that the kernel reads, the others 0."""
            return [0 if tma or tensor is None or tensor.shape[i] == 1 else tensor.stride(i) for i in dimensions]

        _matrix_product_kernel[(samples * tile.programs(rows, outputs),)](
            blocks(x, m, k),
            blocks(skip, m, k),
            blocks(weight, n, k),
            blocks(weight, second, k),
            None if bias is None else bias.contiguous(),
            blocks(residual, m, n),
            blocks(residual, m, second),
            blocks(output, m, n),
            blocks(output, m, second),
            moments if norm is None else norm.moments.contiguous(),
            None if norm is None else norm.weight_sums.contiguous(),
            rows,
            columns,
            inputs,
            weight_inputs - inputs,
            pixels,
            0.0 if norm is None else norm.eps,
            *strides(x, 0, 1),
            *strides(skip, 1),
            *strides(weight, 0, 1),
            *strides(residual, 0, 1),
            TAPS=taps,
            GATED=gates,
            PART=0 if norm is None else part_columns(inputs),
            PARTS=1 if norm is None else triton.next_power_of_2(norm.moments.shape[-2]),
            TMA=tma,
            WHOLE_STEPS=not (inputs % k or weight_inputs % k),
            GROUP_M=GROUP_M,
            SECOND=second,
            **tile.blocks(),
            **options(tile.warps, tile.stages),
            maxnreg=most_registers(kind, norm is not None, tile),
        )
