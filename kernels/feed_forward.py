"""A feed-forward block of two products in Triton, with torch's LayerNorm before them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .linear_geglu import linear_geglu
from .linear_residual import linear_residual


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> Tensor:
    """As the op's reference, for float16, bfloat16 and float32."""
    tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return linear_residual(linear_geglu(tokens, weight, bias), out_weight, out_bias, x, None)
