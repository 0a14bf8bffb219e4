"""The convolution over frames of normalized, activated features, and its residual."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_activations, check_eps, check_fit, check_groups, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES
from .group_norm_silu import group_norm_silu_native, group_norm_silu_reference


def temporal_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
) -> Tensor:
    """residual + bias + the (3, 1, 1) convolution of SiLU(GroupNorm(x)), with zero frames before and after the clip.

    x: (B, F, H, W, C); statistics are of the whole clip. norm_weight, norm_bias: (C,). weight: (3, N, C), a Conv3d's
    (N, C, 3, 1, 1) with the taps first; fast when contiguous. bias: (N,). residual: (B, F, H, W, N) or None.

    Returns (B, F, H, W, N). ValueError for tensors that do not fit together, or groups that do not divide C.
    """
    check_activations("x", x)
    channels = x.shape[-1]
    outputs = count_outputs("bias", bias)
    check_fit(
        x,
        "x",
        norm_weight=(norm_weight, (channels,)),
        norm_bias=(norm_bias, (channels,)),
        weight=(weight, (3, outputs, channels)),
        bias=(bias, (outputs,)),
        residual=(residual, (*x.shape[:-1], outputs)),
    )
    check_groups(x, groups)
    check_eps(eps)
    return _temporal_conv(x, norm_weight, norm_bias, weight, bias, residual, groups, eps)


def temporal_conv_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    """The taps' products with frames t-1, t and t+1 are summed one after another."""
    y = group_norm_silu_reference(x, norm_weight, norm_bias, None, groups, eps, True, True)
    before, at, after = weight
    padded = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 1))
    out = F.linear(padded[:, :-2], before) + F.linear(y, at, bias) + F.linear(padded[:, 2:], after)
    return out if residual is None else residual + out


def temporal_conv_native(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    normed = group_norm_silu_native(x, norm_weight, norm_bias, None, groups, eps, True, True).flatten(2, 3)
    output = x.new_empty(*x.shape[:-1], len(bias))
    weight, bias = weight.contiguous(), bias.contiguous()
    residual = None if residual is None else native.merge_pixels(residual)
    native.call(
        "temporal_conv_cpu",
        normed.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        native.address(residual),
        output.data_ptr(),
        sizes=normed.shape,
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
    shape=lambda x, _nw, _nb, weight, *_: (*x.shape[:-1], weight.shape[1]),
    flops=lambda x, _nw, _nb, weight, *_: 6 * math.prod(x) * weight[1],
)
