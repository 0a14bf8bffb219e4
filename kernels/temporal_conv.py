"""The convolution over frames in Triton, channels last.

With channels last and frames above pixels, a clip is a matrix whose rows are the pixels of its frames, and the taps
before and after a frame read the rows one frame up and down: three products of matrices in one.
"""

from __future__ import annotations

from torch import Tensor

from .matrix_product import matrix_product


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    output = x.new_empty(*x.shape[:-1], len(bias))
    matrix_product(
        output.flatten(1, 3),
        x.flatten(1, 3),
        weight,
        bias,
        residual=None if residual is None else residual.flatten(1, 3),
        pixels=x.shape[2] * x.shape[3],
    )
    return output
