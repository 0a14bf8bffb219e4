"""A linear layer with the residual addition in its epilogue, and the moments of its result's rows, in Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .launch import as_matrix
from .matrix_product import matrix_product
from .moments import part_columns
from .tuned import choose, nearby

# For this many inputs or more, where nothing was measured, cuBLAS in half precision and an addition are taken: an
# addition costs little beside so long a product.
MIN_LIBRARY_INPUTS = 4096


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, skip: Tensor | None) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    if skip is None and x.dtype != torch.float32:
        key = nearby(x.shape[:-1].numel()), len(weight), x.shape[-1]
        reasoned = "library" if x.shape[-1] >= MIN_LIBRARY_INPUTS else "kernel"
        with torch.cuda.device_of(x):
            way = choose("linear_residual", key, ("kernel", "library"), reasoned)
        if way == "library":
            return residual + F.linear(x, weight, bias)
    output = residual.new_empty(residual.shape)
    matrix_product(
        as_matrix(output)[None],
        as_matrix(x)[None],
        weight[None],
        bias,
        skip=None if skip is None else as_matrix(skip)[None],
        residual=as_matrix(residual)[None],
    )
    return output


def linear_moments(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the op's reference, for float16, bfloat16 and float32; the moments are those of the rounded values."""
    outputs = len(weight)
    output = x.new_empty(*x.shape[:-1], outputs)
    moments = x.new_empty(*x.shape[:-1], triton.cdiv(outputs, part_columns(outputs)), 2, dtype=torch.float32)
    matrix_product(
        as_matrix(output)[None],
        as_matrix(x)[None],
        weight[None],
        bias,
        residual=None if residual is None else as_matrix(residual)[None],
        moments=moments,
    )
    return output, moments
