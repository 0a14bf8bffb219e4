"""The convolution over frames, and its residual."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_activations, check_fit, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + bias + the (3, 1, 1) convolution of x, with zero frames before and after the clip.

    x: (B, F, H, W, C). weight: (3, N, C), a Conv3d's (N, C, 3, 1, 1) with the taps first; fast when contiguous.
    bias: (N,). residual: (B, F, H, W, N) or None.

    Returns (B, F, H, W, N). ValueError for tensors that do not fit together.
    """
    check_activations("x", x)
    outputs = count_outputs("bias", bias)
    check_fit(
        x,
        "x",
        optional=("residual",),
        weight=(weight, (3, outputs, x.shape[-1])),
        bias=(bias, (outputs,)),
        residual=(residual, (*x.shape[:-1], outputs)),
    )
    return _temporal_conv(x, weight, bias, residual)


def temporal_conv_reference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """The taps' products with frames t-1, t and t+1 are summed one after another."""
    before, at, after = weight
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
    out = F.linear(padded[:, :-2], before) + F.linear(x, at, bias) + F.linear(padded[:, 2:], after)
    return out if residual is None else residual + out


def temporal_conv_native(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    pixels = x.flatten(2, 3).contiguous()
    output = x.new_empty(*x.shape[:-1], len(bias))
    weight, bias = weight.contiguous(), bias.contiguous()
    residual = None if residual is None else native.merge_pixels(residual)
    native.call(
        "temporal_conv_cpu",
        pixels.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        native.address(residual),
        output.data_ptr(),
        sizes=pixels.shape,
        residual_strides=(0, 0, 0) if residual is None else residual.stride()[:3],
        outputs=len(bias),
        width=native.vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


_temporal_conv = register(
    "temporal_conv",
    reference=temporal_conv_reference,
    native=temporal_conv_native,
    dtypes=ACTIVATION_DTYPES,
    fake=lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[1]),
    flops=lambda x, weight, *_: 6 * math.prod(x) * weight[1],
)
