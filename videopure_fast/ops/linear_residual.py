"""A linear layer and the residual that is added to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_fit, check_tokens, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x weight^T + bias: the linear layer that ends an attention or feed-forward block.

    x: (..., K). weight: (N, K). bias: (N,) or None. residual: (..., N). Returns (..., N).
    ValueError for tensors that do not fit together.
    """
    check_tokens(x)
    outputs = count_outputs("weight", weight)
    check_fit(
        x,
        "x",
        weight=(weight, (outputs, x.shape[-1])),
        bias=(bias, (outputs,)),
        residual=(residual, (*x.shape[:-1], outputs)),
    )
    return _linear_residual(x, weight, bias, residual)


def linear_residual_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return residual + F.linear(x, weight, bias)


def linear_residual_native(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
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
    """Operations of x (..., K) times the transpose of weight (N, K)."""
    return 2 * math.prod(x) * weight[0]


_linear_residual = register(
    "linear_residual",
    reference=linear_residual_reference,
    native=linear_residual_native,
    dtypes=ACTIVATION_DTYPES,
    shape=lambda x, _w, _b, residual: residual.shape,
    flops=linear_flops,
)
