"""A linear layer and the residual that is added to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_fit, check_skip, check_tokens, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, skip: Tensor | None = None
) -> Tensor:
    """residual + x weight^T + bias: the linear layer that ends an attention or feed-forward block.

    x: (..., K). weight: (N, K), or (N, K + L) with a skip. bias: (N,) or None. residual: (..., N).
    skip: (..., L) or None, more inputs, for the last L columns of the weight: x and skip need not be concatenated.

    Returns (..., N). ValueError for tensors that do not fit together.
    """
    check_tokens(x)
    outputs, extra = count_outputs("weight", weight), check_skip(x, skip)
    check_fit(
        x,
        "x",
        optional=("bias", "skip"),
        weight=(weight, (outputs, x.shape[-1] + extra)),
        bias=(bias, (outputs,)),
        residual=(residual, (*x.shape[:-1], outputs)),
        skip=(skip, (*x.shape[:-1], extra)),
    )
    return _linear_residual(x, weight, bias, residual, skip)


def linear_residual_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, skip: Tensor | None
) -> Tensor:
    return residual + F.linear(x if skip is None else torch.cat([x, skip], -1), weight, bias)


def linear_residual_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, skip: Tensor | None
) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], -1)
    outputs, inputs = weight.shape
    output = x.new_empty(residual.shape)
    rows = native.with_adjacent_channels(x.reshape(-1, inputs))
    residual = native.with_adjacent_channels(residual.reshape(-1, outputs))
    weight, bias = weight.contiguous(), native.contiguous(bias)
    native.call(
        "linear_residual_cpu",
        rows.data_ptr(),
        weight.data_ptr(),
        native.address(bias),
        residual.data_ptr(),
        output.data_ptr(),
        rows=rows.shape[0],
        inputs=inputs,
        outputs=outputs,
        row_stride=rows.stride(0),
        residual_stride=residual.stride(0),
        width=native.vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


def linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any) -> int:
    """Operations of (..., K) times the transpose of weight (N, K), for the rows of x."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


_linear_residual = register(
    "linear_residual",
    reference=linear_residual_reference,
    native=linear_residual_native,
    dtypes=ACTIVATION_DTYPES,
    fake=lambda _x, _w, _b, residual, _s: residual.new_empty(residual.shape),
    flops=linear_flops,
)
