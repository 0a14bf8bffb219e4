"""A transformer's feed-forward block, from its norm to its residual."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_eps, check_fit, check_tokens, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES
from .linear_geglu import linear_geglu_reference


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """A transformer's feed-forward block: x + out_bias + (`linear_geglu` of LayerNorm(x)) out_weight^T.

    x: (..., C). norm_weight, norm_bias, out_bias: (C,). weight: (2D, C), bias: (2D,), out_weight: (C, D).

    Returns (..., C). ValueError for tensors that do not fit together.
    """
    check_tokens(x)
    channels, gated = x.shape[-1], count_outputs("bias", bias)
    if gated % 2:
        raise ValueError(f"bias must have an even number of values, got {gated}")
    check_fit(
        x,
        "x",
        norm_weight=(norm_weight, (channels,)),
        norm_bias=(norm_bias, (channels,)),
        weight=(weight, (gated, channels)),
        bias=(bias, (gated,)),
        out_weight=(out_weight, (channels, gated // 2)),
        out_bias=(out_bias, (channels,)),
    )
    check_eps(eps)
    return _feed_forward(x, norm_weight, norm_bias, weight, bias, out_weight, out_bias, eps)


def feed_forward_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> Tensor:
    tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return x + F.linear(linear_geglu_reference(tokens, weight, bias), out_weight, out_bias)


def feed_forward_native(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> Tensor:
    output = x.new_empty(x.shape)
    rows = native.with_adjacent_channels(x.reshape(-1, x.shape[-1]))
    constants = [tensor.contiguous() for tensor in (norm_weight, norm_bias, weight, bias, out_weight, out_bias)]
    native.call(
        "feed_forward_cpu",
        rows.data_ptr(),
        *map(native.address, constants),
        output.data_ptr(),
        rows=rows.shape[0],
        channels=rows.shape[1],
        hidden=out_weight.shape[1],
        row_stride=rows.stride(0),
        eps=eps,
        width=native.vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


_feed_forward = register(
    "feed_forward",
    reference=feed_forward_reference,
    native=feed_forward_native,
    dtypes=ACTIVATION_DTYPES,
    flops=lambda x, _nw, _nb, weight, _b, out_weight, *_: 6 * math.prod(x) * out_weight[1],
)
