"""A linear layer, or one with GEGLU after it, of normalized rows: their norm is applied to its sums, in Triton."""

from __future__ import annotations

from torch import Tensor

from .launch import as_matrix
from .matrix_product import RowNorm, matrix_product


def folded_linear(x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    return _folded(x, RowNorm(moments, weight_sums, eps), weight, bias, gates=False)


def folded_linear_geglu(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    return _folded(x, RowNorm(moments, weight_sums, eps), weight, bias, gates=True)


def _folded(x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor, *, gates: bool) -> Tensor:
    output = x.new_empty(*x.shape[:-1], len(weight) // (1 + gates))
    matrix_product(as_matrix(output)[None], as_matrix(x)[None], weight[None], bias, norm=norm, gates=gates)
    return output
