"""Self-attention over the frames of every pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from ._checks import check_activations, check_heads
from ._register import register
from .backend import ACTIVATION_DTYPES

MAX_TRITON_FRAMES = 64  # one tile of the Triton form holds all frames of a pixel


def temporal_attention(qkv: Tensor, *, heads: int) -> Tensor:
    """Self-attention over the frames of every pixel (arXiv 1706.03762, eq. 1, scale 1/sqrt(head size)).

    qkv: (B, F, H, W, 3C), queries, keys and values one after another, each split into heads of C/heads channels.
    Returns (B, F, H, W, C). ValueError for another shape, or heads that do not divide C.
    """
    check_activations("qkv", qkv)
    check_heads("qkv's channels", qkv.shape[-1], heads)
    return _temporal_attention(qkv, heads)


def temporal_attention_reference(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(4, 0, 2, 3, 5, 1, 6).unbind()  # [B, H, W, heads, F, d]
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    return (weights @ v).permute(0, 4, 1, 2, 3, 5).flatten(-2)


def temporal_attention_native(qkv: Tensor, heads: int) -> Tensor:
    output = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    qkv = native.merge_pixels(qkv)
    native.call(
        "temporal_attention_cpu",
        qkv.data_ptr(),
        output.data_ptr(),
        sizes=(*qkv.shape[:3], output.shape[-1]),
        strides=qkv.stride()[:3],
        heads=heads,
        threads=torch.get_num_threads(),
    )
    return output


def attention_flops(qkv: Sequence[int], heads: int) -> int:
    """Operations of queries times keys and of weights times values."""
    frames, channels = qkv[1], qkv[-1] // 3
    return 4 * math.prod(qkv[:-1]) * frames * channels


_temporal_attention = register(
    "temporal_attention",
    reference=temporal_attention_reference,
    native=temporal_attention_native,
    dtypes=ACTIVATION_DTYPES,
    max_triton_frames=MAX_TRITON_FRAMES,
    fake=lambda qkv, _: qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3),
    flops=attention_flops,
)
