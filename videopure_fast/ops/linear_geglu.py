"""A linear layer and the gated GELU of its result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_fit, check_tokens, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES
from .geglu import geglu_reference
from .linear_residual import linear_flops


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`geglu` of x weight^T + bias: the first layer of a feed-forward block.

    x: (..., K). weight: (2D, K). bias: (2D,) or None. Returns (..., D). ValueError for tensors that do not fit.
    """
    check_tokens(x)
    outputs = count_outputs("weight", weight)
    if outputs % 2:
        raise ValueError(f"weight must have an even number of rows, got {tuple(weight.shape)}")
    check_fit(x, "x", optional=("bias",), weight=(weight, (outputs, x.shape[-1])), bias=(bias, (outputs,)))
    return _linear_geglu(x, weight, bias)


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return geglu_reference(F.linear(x, weight, bias))


def linear_geglu_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
    rows = native.with_adjacent_channels(x.reshape(-1, x.shape[-1]))
    weight, bias = weight.contiguous(), native.contiguous(bias)
    native.call(
        "linear_geglu_cpu",
        rows.data_ptr(),
        weight.data_ptr(),
        native.address(bias),
        output.data_ptr(),
        rows=rows.shape[0],
        inputs=rows.shape[1],
        channels=output.shape[-1],
        row_stride=rows.stride(0),
        width=native.vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


_linear_geglu = register(
    "linear_geglu",
    reference=linear_geglu_reference,
    native=linear_geglu_native,
    dtypes=ACTIVATION_DTYPES,
    fake=lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[0] // 2),
    flops=linear_flops,
)
