"""Self-attention over the frames of every pixel, its LayerNorm folded into the projection before it."""

from __future__ import annotations

from torch import Tensor

from ._checks import check_activations, check_heads
from ._register import register
from .backend import ACTIVATION_DTYPES
from .folded_linear import check_folded, folded_linear_reference
from .linear_residual import linear_flops
from .temporal_attention import MAX_TRITON_FRAMES, attention_flops, temporal_attention_reference


def folded_temporal_attention(
    x: Tensor,
    moments: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    bias: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """`temporal_attention` of the queries, keys and values that a `folded_linear` makes of x.

    x: (B, F, H, W, C). weight: (3D, C), three Linear weights one after another, folded. moments, weight_sums, bias: as
    for `folded_linear`.

    Returns (B, F, H, W, D). ValueError for tensors that do not fit together, or heads that do not divide D.
    """
    check_activations("x", x)
    check_folded(x, moments, weight, weight_sums, bias, eps)
    check_heads("weight's rows", weight.shape[0], heads)
    return _folded_temporal_attention(x, moments, weight, weight_sums, bias, heads, eps)


def folded_temporal_attention_reference(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, heads: int, eps: float
) -> Tensor:
    return temporal_attention_reference(folded_linear_reference(x, moments, weight, weight_sums, bias, eps), heads)


_folded_temporal_attention = register(
    "folded_temporal_attention",
    reference=folded_temporal_attention_reference,
    dtypes={"triton": ACTIVATION_DTYPES["triton"]},
    max_triton_frames=MAX_TRITON_FRAMES,
    fake=lambda x, _m, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0] // 3),
    flops=lambda x, _m, weight, _s, _b, heads, *_: (
        linear_flops(x, weight) + attention_flops((*x[:-1], weight[0]), heads)
    ),
)
