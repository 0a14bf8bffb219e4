"""The layers that diffusers' UNets and VAEs are made of, evaluated over their own weights, channels last.

Activations are (B, F, H, W, C): spatial tokens, temporal tokens and the images of a convolution are views of that one
layout. The operators of `ops` do everything between the library's matrix products, convolutions and spatial attention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.backend import is_available

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


class Unsupported(Exception):
    """A model that cannot be evaluated here; the message says what is unknown in it."""


class Weights:
    """A model's weights in the layouts of this evaluation: copies, or the weights themselves where they fit.

    Convolutions over images are channels last, those over frames (3, N, C); the queries', keys' and values' weights of
    a self-attention are one (3D, C); on a CPU an upsampler's are those of its transposed convolution, (C, N, 4, 4).
    """

    def __init__(self, model: nn.Module) -> None:
        laid_out = ((module, _laid_out_weight(module)) for module in model.modules())
        self._weights = {module: weight for module, weight in laid_out if weight is not None}

    def __getitem__(self, module: nn.Module) -> Tensor:
        return self._weights[module]

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._weights


def _laid_out_weight(module: nn.Module) -> Tensor | None:
    """A module's weight in the layout of this evaluation; None where the module's own serves as it is."""
    if type(module).__name__ == "Upsample2D":
        # A transposed convolution is 1.6 times as fast on a CPU; on a GPU it has not been measured.
        fits = module.conv.kernel_size == (3, 3) and module.conv.weight.device.type == "cpu"
        return _upsampling_weight(module.conv.weight.detach()) if fits else None
    if isinstance(module, nn.Conv3d):
        return module.weight.detach().flatten(2).permute(2, 0, 1).contiguous()
    if isinstance(module, nn.Conv2d):
        return module.weight.detach().contiguous(memory_format=torch.channels_last)
    if type(module).__name__ == "Attention" and not module.is_cross_attention:
        return torch.cat([layer.weight.detach() for layer in (module.to_q, module.to_k, module.to_v)])
    return None


def _upsampling_weight(weight: Tensor) -> Tensor:
    """The transposed convolution that doubles an image and convolves it: (N, C, 3, 3) -> (C, N, 4, 4).

    Weights that meet the same pixel are summed in float64 and rounded once.
    """
    summed = weight.new_zeros(*weight.shape[:2], 4, 4, dtype=torch.float64)
    for row in range(2):
        for column in range(2):
            summed[..., row : row + 3, column : column + 3] += weight
    return summed.flip(2, 3).transpose(0, 1).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def conv(weights: Weights, layer: nn.Conv2d, x: Tensor, *, bias: bool = True) -> Tensor:
    """A Conv2d over every frame of x (B, F, H, W, C)."""
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [BF, C, H, W], a view
    y = F.conv2d(images, weights[layer], layer.bias if bias else None, layer.stride, layer.padding)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()  # channels last already: no copy


def downsample(weights: Weights, layer: nn.Module, x: Tensor) -> Tensor:
    """A Downsample2D: a convolution of stride 2, after zeros at the right and bottom where the layer pads nothing."""
    return conv(weights, layer.conv, F.pad(x, (0, 0, 0, 1, 0, 1)) if layer.padding == 0 else x)


def upsample(weights: Weights, layer: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """An Upsample2D: nearest neighbors to `size` (height, width), then the layer's convolution.

    Doubling and a 3x3 convolution are one transposed convolution of stride 2, with 4 products in place of 9: each
    pixel of the result depends on 2x2 pixels of x, and the weights that meet the same pixel are summed beforehand.
    """
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    if layer in weights and size == (2 * x.shape[2], 2 * x.shape[3]):
        y = F.conv_transpose2d(images, weights[layer], layer.conv.bias, stride=2, padding=1)
        return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()
    images = F.interpolate(images, size=size, mode="nearest")
    return conv(weights, layer.conv, images.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]))


def group_norm(
    norm: nn.GroupNorm, x: Tensor, embedding: Tensor | None = None, *, silu: bool = True, over_frames: bool = False
) -> Tensor:
    settings = {"groups": norm.num_groups, "eps": norm.eps, "over_frames": over_frames, "silu": silu}
    return ops.group_norm_silu(x, norm.weight, norm.bias, embedding, **settings)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def project(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """A Linear, or a 1x1 convolution, added to the residual if there is one."""
    weight = layer.weight.flatten(1)
    return F.linear(x, weight, layer.bias) if residual is None else ops.linear_residual(x, weight, layer.bias, residual)


def resnet(weights: Weights, block: nn.Module, x: Tensor, embedding: Tensor | None = None) -> Tensor:
    """A ResnetBlock2D. embedding: (B, C), the projected time embedding plus the first convolution's bias."""
    h = conv(weights, block.conv1, group_norm(block.norm1, x), bias=embedding is None)
    h = conv(weights, block.conv2, group_norm(block.norm2, h, embedding))
    h = x + h if block.conv_shortcut is None else project(block.conv_shortcut, x, h)
    return h if block.output_scale_factor == 1 else h / block.output_scale_factor


def self_attention(
    weights: Weights, attention: nn.Module, x: Tensor, residual: Tensor, attention_fn: AttentionFn
) -> Tensor:
    """Self-attention over the pixels of each frame of x, which has been normalized, added to the residual."""
    layers, heads = (attention.to_q, attention.to_k, attention.to_v), attention.heads
    bias = torch.cat([layer.bias for layer in layers]) if attention.use_bias else None
    qkv = F.linear(x, weights[attention], bias).flatten(0, 1).flatten(1, 2)
    small = layers[0].out_features <= 8 * heads and attention_fn is F.scaled_dot_product_attention
    wanted = torch.is_grad_enabled() and qkv.requires_grad
    if small and not wanted and is_available("cpu", "temporal_attention", qkv):
        # torch's own attention takes 1.5 times as long for heads so small. The pixels take the place of frames.
        attended = ops.temporal_attention(qkv[:, :, None, None], heads=heads).view(*x.shape[:-1], -1)
    else:
        attended = merge_heads(attention_fn(*qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)), x)
    return project(attention.to_out[0], attended, residual)


def temporal_transformer(weights: Weights, model: nn.Module, x: Tensor, *, first_frame: bool = False) -> Tensor:
    """A TransformerTemporalModel: norm, projection, blocks, projection, added to x.

    A block is self-attention over the frames of each pixel, twice, and a feed-forward. first_frame: compute the result
    for frame 0 alone, (B, 1, H, W, C).
    """
    h = project(model.proj_in, group_norm(model.norm, x, silu=False, over_frames=True))
    for block in model.transformer_blocks:
        position = None if block.pos_embed is None else block.pos_embed.pe[0, : x.shape[1]].to(h.dtype)
        for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
            settings = {"heads": attention.heads, "eps": norm.eps}
            attended = ops.norm_temporal_attention(h, norm.weight, norm.bias, weights[attention], position, **settings)
            if first_frame and attention is model.transformer_blocks[-1].attn2:
                attended, h, x = attended[:, :1], h[:, :1], x[:, :1]
            h = project(attention.to_out[0], attended, h)
        h = feed_forward(block, h)
    return project(model.proj_out, h, x)


def feed_forward(block: nn.Module, h: Tensor) -> Tensor:
    norm, first, last = block.norm3, block.ff.net[0].proj, block.ff.net[2]
    weights = (norm.weight, norm.bias, first.weight, first.bias, last.weight, last.bias)
    return ops.feed_forward(h, *weights, eps=norm.eps)


def merge_heads(attended: Tensor, like: Tensor) -> Tensor:
    """(N, heads, tokens, head size) -> (B, F, H, W, heads x head size), for the B, F, H, W of `like`."""
    return attended.transpose(1, 2).reshape(*like.shape[:-1], -1)


def check_known(model: nn.Module, kinds: Collection[str]) -> None:
    """Unsupported unless every module of the model is of one of `kinds`, has no hooks, and no unusual setting."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind not in kinds and kind not in _COMMON_KINDS:
            raise Unsupported(f"{name or 'the model'} is a {kind}")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f"{name or 'the model'} has forward hooks")
        if hasattr(module, "parametrizations"):
            raise Unsupported(f"{name} is parametrized")
        if not _plain(kind, module):
            raise Unsupported(f"{name} is a {kind} with unusual settings")


def check_transformer_block(name: str, block: nn.Module) -> None:
    """Unsupported unless a BasicTransformerBlock is two attentions and a GEGLU feed-forward behind plain LayerNorms."""
    plain = block.norm_type == "layer_norm" and block.norm_elementwise_affine and block.attn2 is not None
    plain = plain and not block.only_cross_attention and block._chunk_size is None
    if not plain or block.attn1.use_bias or block.attn2.use_bias or type(block.ff.net[0]).__name__ != "GEGLU":
        raise Unsupported(f"{name} is a transformer block with unusual settings")


def _plain(kind: str, module: nn.Module) -> bool:
    if kind == "ResnetBlock2D":
        return (
            module.time_embedding_norm in ("default", "group")
            and isinstance(module.nonlinearity, nn.SiLU)
            and not module.skip_time_act
            and module.upsample is None
            and module.downsample is None
        )
    if kind == "Attention":
        return (
            type(module.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")
            and not (module.upcast_attention or module.norm_q or module.norm_k or module.spatial_norm)
            and not (module.norm_cross or module.added_kv_proj_dim or module.fused_projections)
            and module.rescale_output_factor == 1
            and module.scale == (module.inner_dim // module.heads) ** -0.5
        )
    if kind == "Upsample2D":
        return module.name == "conv" and module.use_conv and not module.use_conv_transpose and module.norm is None
    if kind == "Downsample2D":
        return module.use_conv and module.norm is None
    return True


_COMMON_KINDS = frozenset(
    """
    ModuleList Sequential Linear Conv2d Conv3d GroupNorm LayerNorm SiLU Dropout
    Attention ResnetBlock2D Downsample2D Upsample2D
    """.split()
)
