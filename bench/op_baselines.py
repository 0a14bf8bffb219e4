"""Each op by the library operators that serve it best, where its reference is not already that.

`LIBRARY[op](*tensors, **settings)` takes the op's arguments, its tensors in the layout of `in_library_layout`; the
result goes back by `from_library_layout`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from videopure_fast import PurifyConfig, reference
from videopure_fast.schedule import Schedule


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """qkv: (B, F, H, W, 3C) -> (B, F, H, W, C)."""
    leading = qkv.shape[:1] + qkv.shape[2:4]
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(4, 0, 2, 3, 5, 1, 6).flatten(1, 3).contiguous()
    attended = F.scaled_dot_product_attention(q, k, v)  # [BHW, heads, F, d]
    return attended.unflatten(0, leading).permute(0, 4, 1, 2, 3, 5).flatten(-2)


def norm_temporal_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: None, heads: int, eps: float
) -> Tensor:
    """x: (B, F, H, W, C), weight: (3C, C) -> (B, F, H, W, C); without a position embedding."""
    normalized = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return temporal_attention(F.linear(normalized, weight), heads)


def folded_temporal_attention(
    x: Tensor, moments: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor, heads: int, eps: float
) -> Tensor:
    """x: (B, F, H, W, C), weight: (3C, C) -> (B, F, H, W, C)."""
    return temporal_attention(F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), weight, bias), heads)


def group_norm_silu(
    images: Tensor, weight: Tensor, bias: Tensor, embedding: None, skip: None, groups: int, eps: float, **_: bool
) -> Tensor:
    """images: (BF, C, H, W) -> the same shape; statistics of single frames, without an embedding or a skip."""
    return F.silu(F.group_norm(images, groups, weight, bias, eps))


def temporal_conv(clips: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """clips and residual: (B, C, F, H, W), weight: (C, C, 3, 1, 1) -> (B, C, F, H, W)."""
    return residual + F.conv3d(clips, weight, bias, padding=(1, 0, 0))


def guided_update(
    latents: Tensor, noise: Tensor, target: Tensor, flow: Tensor, coefficients: Tensor, **weights: float
) -> Tensor:
    """The authors' loop over votes and frames, with gradients by autograd.

    latents and noise: (V, B, 4, F, h, w) -> the same shape. coefficients: not read, but made anew from the schedule.
    """
    config = PurifyConfig(**weights)
    votes = []
    for z, e, step in zip(latents, noise, Schedule(config).vote_coefficients(), strict=True):
        optimized = reference.guidance_by_autograd(z, e, target, flow, step, config)
        votes.append((optimized - step.sqrt_beta * e) / step.sqrt_alpha if step.predicts_x0 else optimized)
    return torch.stack(votes)


LIBRARY: dict[str, Callable[..., Tensor]] = {
    op.__name__: op
    for op in (
        *(guided_update, temporal_attention, norm_temporal_attention, folded_temporal_attention),
        *(group_norm_silu, temporal_conv),
    )
}


def in_library_layout(op: str, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """An op's tensors, channels first where the library wants that, so that its time has no copies in it."""
    if op == "group_norm_silu":
        return tensors[0].flatten(0, 1).movedim(-1, 1).contiguous(), *tensors[1:]
    if op == "temporal_conv":
        x, weight, bias, residual = tensors
        x, residual = (t.movedim(-1, 1).contiguous() for t in (x, residual))
        return x, weight.permute(1, 2, 0)[..., None, None].contiguous(), bias, residual
    return tensors


def from_library_layout(op: str, result: Tensor, like: Tensor) -> Tensor:
    """A library's result in the op's own layout. like: the op's first tensor, whose leading sizes it takes."""
    if op == "group_norm_silu":
        return result.movedim(1, -1).unflatten(0, like.shape[:2])
    return result.movedim(1, -1) if op == "temporal_conv" else result
