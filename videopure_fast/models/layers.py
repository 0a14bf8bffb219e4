"""The layers that diffusers' UNets and VAEs are made of, evaluated over their own weights, channels last.

Activations are (B, F, H, W, C): spatial tokens, temporal tokens and the images of a convolution are views of that one
layout. The operators of `ops` do everything between the library's matrix products, convolutions and spatial attention.

A convolution on a GPU leaves out its bias, which its library would add in a pass of its own, and a residual block its
last addition: whatever reads the result adds both. Until then the activation is a `Pending`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .state import departure
from .weights import Owed, Weights


class Unsupported(Exception):
    """A model that cannot be evaluated here; the message says what is unknown in it."""


class Pending(NamedTuple):
    """An activation that is not summed yet: x + addend + the biases of `owed`.

    x, addend: (B, F, H, W, C). owed: convolutions that have left out their biases.
    """

    x: Tensor
    addend: Tensor | None = None
    owed: tuple[nn.Module, ...] = ()

    def part(self) -> Owed:
        return Owed(self.owed, self.x.shape[-1])


def settle(weights: Weights, pending: Pending) -> Tensor:
    """The activation itself."""
    bias = weights.bias(pending.owed)
    if pending.addend is not None:
        return ops.residual_add(pending.x, pending.addend, bias)
    return pending.x if bias is None else pending.x + bias


def conv(weights: Weights, layer: nn.Conv2d, x: Tensor, *, bias: bool = True) -> Tensor:
    """A Conv2d over every frame of x (B, F, H, W, C)."""
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [BF, C, H, W], a view
    y = F.conv2d(images, weights[layer], layer.bias if bias else None, layer.stride, layer.padding)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()  # channels last already: no copy


def pending_conv(weights: Weights, layer: nn.Conv2d, x: Tensor) -> Pending:
    """A Conv2d over every frame of x, its bias left out on a GPU."""
    return Pending(conv(weights, layer, x, bias=not weights.for_gpu), owed=_left_out(weights, layer))


def _left_out(weights: Weights, layer: nn.Conv2d) -> tuple[nn.Module, ...]:
    return (layer,) if weights.for_gpu and layer.bias is not None else ()


def downsample(weights: Weights, layer: nn.Module, x: Tensor) -> Pending:
    """A Downsample2D: a convolution of stride 2, after zeros at the right and bottom where the layer pads nothing."""
    return pending_conv(weights, layer.conv, F.pad(x, (0, 0, 0, 1, 0, 1)) if layer.padding == 0 else x)


def upsample(weights: Weights, layer: nn.Module, x: Tensor, size: tuple[int, int]) -> Pending:
    """An Upsample2D: nearest neighbors to `size` (height, width), then the layer's convolution.

    Doubling and a 3x3 convolution are one transposed convolution of stride 2, with 4 products in place of 9: each
    pixel of the result depends on 2x2 pixels of x, and the weights that meet the same pixel are summed beforehand.
    """
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    if layer not in weights or size != (2 * x.shape[2], 2 * x.shape[3]):
        images = F.interpolate(images, size=size, mode="nearest")
        return pending_conv(weights, layer.conv, images.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]))
    bias = None if weights.for_gpu else layer.conv.bias
    y = F.conv_transpose2d(images, weights[layer], bias, stride=2, padding=1)
    return Pending(y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous(), owed=_left_out(weights, layer.conv))


def group_norm(
    weights: Weights,
    norm: nn.GroupNorm,
    pending: Pending,
    skip: Pending | None = None,
    *,
    embedding: Tensor | None = None,
    silu: bool = True,
    over_frames: bool = False,
) -> tuple[Tensor, Pending]:
    """The norm of an activation, of x and skip side by side if there is a skip; and the activation, its sum done.

    embedding: (B, C), added before the norm, or (C,).
    """
    settings = {"groups": norm.num_groups, "eps": norm.eps, "over_frames": over_frames, "silu": silu}
    if pending.addend is not None and skip is None and embedding is None:
        bias = weights.bias(pending.owed)
        arguments = (pending.x, pending.addend, bias, norm.weight, norm.bias)
        total, normalized = ops.add_group_norm_silu(*arguments, **settings)
        return normalized, Pending(total)
    if pending.addend is not None:
        pending = Pending(settle(weights, pending))
    owed = weights.bias_of([part.part() for part in (pending, skip) if part is not None])
    if owed is not None:
        embedding = owed if embedding is None else embedding + owed
    if embedding is not None:
        embedding = embedding.expand(len(pending.x), -1)
    beside = None if skip is None else skip.x
    normalized = ops.group_norm_silu(pending.x, norm.weight, norm.bias, embedding, beside, **settings)
    return normalized, pending


def resnet(
    weights: Weights, block: nn.Module, pending: Pending, skip: Pending | None = None, embedding: Tensor | None = None
) -> Pending:
    """A ResnetBlock2D, over x and skip side by side if there is a skip.

    embedding: (B, C), the projected time embedding plus the first convolution's bias.
    """
    if skip is not None and not weights.for_gpu:
        pending, skip = Pending(torch.cat([pending.x, skip.x], -1)), None
    h, pending = group_norm(weights, block.norm1, pending, skip)
    if embedding is None:
        h, _ = group_norm(weights, block.norm2, pending_conv(weights, block.conv1, h))
    else:
        h = conv(weights, block.conv1, h, bias=False)
        h, _ = group_norm(weights, block.norm2, Pending(h), embedding=embedding)
    last = pending_conv(weights, block.conv2, h)
    if block.conv_shortcut is None:
        assert skip is None, "more channels than a resnet's own need a shortcut"
        result = Pending(pending.x, last.x, (*pending.owed, *last.owed))
    else:
        layer = block.conv_shortcut
        bias = weights.bias_through(layer, [part.part() for part in (pending, skip) if part is not None], last.owed)
        beside = None if skip is None else skip.x
        result = Pending(ops.linear_residual(pending.x, layer.weight.flatten(1), bias, last.x, beside))
    if block.output_scale_factor == 1:
        return result
    return Pending(settle(weights, result) / block.output_scale_factor)


def check_known(model: nn.Module, kinds: Collection[str]) -> None:
    """Unsupported unless a model is as its configuration makes it, of modules of `kinds`, with no unusual setting."""
    if reason := departure(model):
        raise Unsupported(reason)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind not in kinds and kind not in _COMMON_KINDS:
            raise Unsupported(f"{name or 'the model'} is a {kind}")
        if not _plain(kind, module):
            raise Unsupported(f"{name} is a {kind} with unusual settings")


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
