"""The transformers over pixels and over frames, evaluated over their own weights on activations (B, F, H, W, C).

On a GPU a LayerNorm costs no pass over memory: the product that writes tokens also measures their rows, and the product
that reads them has the norm folded into its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.backend import is_available
from .layers import Pending, Unsupported, group_norm
from .weights import Weights

# (queries, keys, values), each (N, heads, tokens, head size) -> attended values, with scale 1/sqrt(head size).
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_function(name: str) -> AttentionFn:
    """ "sdpa", torch's, or "xformers", its memory_efficient_attention. ImportError where that is not installed."""
    if name == "sdpa":
        return F.scaled_dot_product_attention
    if name != "xformers":
        raise ValueError(f"unknown attention {name!r}; accepted: 'sdpa', 'xformers'")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImportError(
            f"attention 'xformers' needs xformers: pip install 'videopure-fast[xformers]' ({error})"
        ) from error

    def attention_fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return attention_fn


class Tokens(NamedTuple):
    """Tokens (B, F, H, W, C) and, where a norm that follows is folded, the moments of each (B, F, H, W, parts, 2)."""

    x: Tensor
    moments: Tensor | None = None


def project(layer: nn.Module, x: Tensor, residual: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """A Linear, or a 1x1 convolution, added to the residual if there is one. bias: in place of the layer's."""
    weight, bias = layer.weight.flatten(1), layer.bias if bias is None else bias
    return F.linear(x, weight, bias) if residual is None else ops.linear_residual(x, weight, bias, residual)


def project_tokens(
    layer: nn.Module, x: Tensor, residual: Tensor | None = None, *, measured: bool, bias: Tensor | None = None
) -> Tokens:
    """`project`, for tokens that a LayerNorm reads next. measured: it is folded, and needs their moments."""
    if not measured:
        return Tokens(project(layer, x, residual, bias=bias))
    weight, bias = layer.weight.flatten(1), layer.bias if bias is None else bias
    return Tokens(*ops.linear_moments(x, weight, bias, residual))


def normed_product(weights: Weights, norm: nn.LayerNorm, layers: Sequence[nn.Module], tokens: Tokens) -> Tensor:
    """Linear layers as one product, (B, F, H, W, sum of their outputs), of the tokens' LayerNorm."""
    if tokens.moments is not None:
        return ops.folded_linear(tokens.x, tokens.moments, *weights.folded(norm, layers), eps=norm.eps)
    normed = F.layer_norm(tokens.x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return F.linear(normed, *weights.beside(layers))


def spatial_transformer(
    weights: Weights, model: nn.Module, pending: Pending, texts: Sequence[Tensor], attention_fn: AttentionFn
) -> Tensor:
    """A Transformer2DModel. A block is self-attention over the pixels of each frame, cross-attention, a feed-forward.

    texts: for each block, as in `unet.Constants`.
    """
    h, pending = group_norm(weights, model.norm, pending, silu=False)
    measured = weights.for_gpu
    tokens = project_tokens(model.proj_in, h, measured=measured)
    for block, text in zip(model.transformer_blocks, texts, strict=True):
        # A prompt of one token adds the same to every pixel: it is a part of the bias before it.
        single = text if text.ndim == 1 else None
        attention = block.attn1
        qkv = normed_product(weights, block.norm1, (attention.to_q, attention.to_k, attention.to_v), tokens)
        attended = attend_pixels(qkv, attention.heads, attention_fn)
        tokens = project_tokens(attention.to_out[0], attended, tokens.x, measured=measured, bias=single)
        if single is None:
            attended = _attend_text(weights, block, tokens, text, attention_fn)
            tokens = project_tokens(block.attn2.to_out[0], attended, tokens.x, measured=measured)
        if block is not model.transformer_blocks[-1]:
            tokens = _feed_forward(weights, block, tokens)
    return _last_feed_forward(weights, model, tokens, pending)


def temporal_transformer(weights: Weights, model: nn.Module, pending: Pending, *, first_frame: bool = False) -> Tensor:
    """A TransformerTemporalModel: norm, projection, blocks, projection, added to its input.

    A block is self-attention over the frames of each pixel, twice, and a feed-forward. first_frame: compute the result
    for frame 0 alone, (B, 1, H, W, C).
    """
    h, pending = group_norm(weights, model.norm, pending, silu=False, over_frames=True)
    # A position is added after the norm, which cannot be folded then.
    measured = weights.for_gpu and all(block.pos_embed is None for block in model.transformer_blocks)
    tokens = project_tokens(model.proj_in, h, measured=measured)
    for block in model.transformer_blocks:
        last = block is model.transformer_blocks[-1]
        for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
            attended = _attend_frames(weights, block, norm, attention, tokens)
            if first_frame and last and attention is block.attn2:
                attended, tokens = attended[:, :1], Tokens(tokens.x[:, :1])
                pending = pending._replace(x=pending.x[:, :1])
            tokens = project_tokens(attention.to_out[0], attended, tokens.x, measured=measured)
        if not last:
            tokens = _feed_forward(weights, block, tokens)
    return _last_feed_forward(weights, model, tokens, pending)


def attend_pixels(qkv: Tensor, heads: int, attention_fn: AttentionFn) -> Tensor:
    """Self-attention over the pixels of each frame: (B, F, H, W, 3D) -> (B, F, H, W, D)."""
    sequences, channels = qkv.flatten(0, 1).flatten(1, 2), qkv.shape[-1] // 3
    small = channels <= 8 * heads and attention_fn is F.scaled_dot_product_attention
    wanted = torch.is_grad_enabled() and qkv.requires_grad
    if small and not wanted and is_available("cpu", "temporal_attention", sequences):
        # torch's own attention takes 1.5 times as long for heads so small. The pixels take the place of frames.
        return ops.temporal_attention(sequences[:, :, None, None], heads=heads).view(*qkv.shape[:-1], -1)
    attended = attention_fn(*sequences.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4))
    return _merge_heads(attended, qkv)


def _attend_text(weights: Weights, block: nn.Module, tokens: Tokens, text: Tensor, attention_fn: AttentionFn) -> Tensor:
    """Cross-attention to a prompt's keys and values, text (2, 1, heads, tokens, head size)."""
    q = normed_product(weights, block.norm2, (block.attn2.to_q,), tokens)
    # All frames of all clips ask the same prompt: they are one sequence of queries.
    queries = q.view(1, -1, block.attn2.heads, q.shape[-1] // block.attn2.heads).transpose(1, 2)
    return _merge_heads(attention_fn(queries, *text), q)


def _attend_frames(
    weights: Weights, block: nn.Module, norm: nn.LayerNorm, attention: nn.Module, tokens: Tokens
) -> Tensor:
    """Self-attention over the frames of each pixel, before its output projection."""
    layers, settings = (attention.to_q, attention.to_k, attention.to_v), {"heads": attention.heads, "eps": norm.eps}
    if tokens.moments is not None:
        folded = weights.folded(norm, layers)
        return ops.folded_temporal_attention(tokens.x, tokens.moments, *folded, **settings)
    position = None if block.pos_embed is None else block.pos_embed.pe[0, : tokens.x.shape[1]].to(tokens.x.dtype)
    weight, _ = weights.beside(layers)
    return ops.norm_temporal_attention(tokens.x, norm.weight, norm.bias, weight, position, **settings)


def _feed_forward(weights: Weights, block: nn.Module, tokens: Tokens) -> Tokens:
    """A block's feed-forward that is followed by another block."""
    norm, first, last = block.norm3, block.ff.net[0].proj, block.ff.net[2]
    if tokens.moments is not None:
        gated = ops.folded_linear_geglu(tokens.x, tokens.moments, *weights.folded(norm, (first,)), eps=norm.eps)
        return project_tokens(last, gated, tokens.x, measured=True)
    parameters = (norm.weight, norm.bias, first.weight, first.bias, last.weight, last.bias)
    return Tokens(ops.feed_forward(tokens.x, *parameters, eps=norm.eps))


def _last_feed_forward(weights: Weights, model: nn.Module, tokens: Tokens, pending: Pending) -> Tensor:
    """The last block's feed-forward and the projection after it, added to the transformer's input.

    Both are linear after the gate, so that on a GPU they are one product, of the tokens and the gated values.
    """
    block = model.transformer_blocks[-1]
    norm, first, last = block.norm3, block.ff.net[0].proj, block.ff.net[2]
    if tokens.moments is None:
        h = _feed_forward(weights, block, tokens).x
        return project(model.proj_out, h, pending.x, bias=weights.bias((model.proj_out, *pending.owed)))
    gated = ops.folded_linear_geglu(tokens.x, tokens.moments, *weights.folded(norm, (first,)), eps=norm.eps)
    weight, bias = weights.merged(last, model.proj_out, pending.owed)
    return ops.linear_residual(tokens.x, weight, bias, pending.x, gated)


def _merge_heads(attended: Tensor, like: Tensor) -> Tensor:
    """(N, heads, tokens, head size) -> (B, F, H, W, heads x head size), for the B, F, H, W of `like`."""
    return attended.transpose(1, 2).reshape(*like.shape[:-1], -1)


def check_transformer_block(name: str, block: nn.Module) -> None:
    """Unsupported unless a BasicTransformerBlock is two attentions and a GEGLU feed-forward behind plain LayerNorms."""
    plain = block.norm_type == "layer_norm" and block.norm_elementwise_affine and block.attn2 is not None
    plain = plain and not block.only_cross_attention and block._chunk_size is None
    if not plain or block.attn1.use_bias or block.attn2.use_bias or type(block.ff.net[0]).__name__ != "GEGLU":
        raise Unsupported(f"{name} is a transformer block with unusual settings")
