"""Self-attention over the frames of every pixel, with the norm and the projection before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_activations, check_eps, check_fit, check_heads, count_outputs
from ._register import register
from .backend import ACTIVATION_DTYPES
from .linear_residual import linear_flops
from .temporal_attention import MAX_TRITON_FRAMES, attention_flops, temporal_attention_reference


def norm_temporal_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    position: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """`temporal_attention` of the queries, keys and values that `weight` makes of LayerNorm(x).

    x: (B, F, H, W, C). norm_weight, norm_bias: (C,). weight: (3D, C), three Linear weights one after another.
    position: (F, C) or None, an embedding of each frame's position, added after the norm (AnimateDiff).

    Returns (B, F, H, W, D). ValueError for tensors that do not fit together, or heads that do not divide D.
    """
    check_activations("x", x)
    frames, channels = x.shape[1], x.shape[-1]
    check_fit(
        x,
        "x",
        optional=("position",),
        norm_weight=(norm_weight, (channels,)),
        norm_bias=(norm_bias, (channels,)),
        weight=(weight, (count_outputs("weight", weight), channels)),
        position=(position, (frames, channels)),
    )
    check_heads("weight's rows", weight.shape[0], heads)
    check_eps(eps)
    return _norm_temporal_attention(x, norm_weight, norm_bias, weight, position, heads, eps)


def norm_temporal_attention_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: Tensor | None, heads: int, eps: float
) -> Tensor:
    tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if position is not None:
        tokens = tokens + position[:, None, None]
    return temporal_attention_reference(F.linear(tokens, weight), heads)


def norm_temporal_attention_native(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: Tensor | None, heads: int, eps: float
) -> Tensor:
    channels = weight.shape[0] // 3
    output = x.new_empty(*x.shape[:-1], channels)
    x = native.merge_pixels(x)
    constants = [native.contiguous(tensor) for tensor in (norm_weight, norm_bias, weight, position)]
    native.call(
        "norm_temporal_attention_cpu",
        x.data_ptr(),
        *map(native.address, constants),
        output.data_ptr(),
        sizes=x.shape,
        strides=x.stride()[:3],
        channels=channels,
        heads=heads,
        eps=eps,
        width=native.vector_width(),
        threads=torch.get_num_threads(),
    )
    return output


def _flops(x: Sequence[int], _w: Any, _b: Any, weight: Sequence[int], _p: Any, heads: int, *_: Any) -> int:
    return linear_flops(x, weight) + attention_flops((*x[:-1], weight[0]), heads)


_norm_temporal_attention = register(
    "norm_temporal_attention",
    reference=norm_temporal_attention_reference,
    native=norm_temporal_attention_native,
    dtypes=ACTIVATION_DTYPES,
    kernel="temporal_attention",
    max_triton_frames=MAX_TRITON_FRAMES,
    fake=lambda x, _w, _b, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0] // 3),
    flops=_flops,
)
