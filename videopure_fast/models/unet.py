"""A diffusers UNet3DConditionModel (ModelScope's text-to-video UNet) evaluated over its own weights, channels last."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .layers import (
    AttentionFn,
    Unsupported,
    Weights,
    check_known,
    check_transformer_block,
    conv,
    downsample,
    feed_forward,
    group_norm,
    layer_norm,
    merge_heads,
    project,
    resnet,
    self_attention,
    temporal_transformer,
    upsample,
)


class Constants(NamedTuple):
    """What the evaluations of one prompt at some timesteps share.

    texts: for each cross-attention the prompt's keys and values, (2, 1, heads, tokens, head size); for a prompt of one
        token, to which every query attends with weight 1, the layer's whole result (C,).
    embeddings: (timesteps, sum of the resnets' widths), for each resnet the projected time embedding plus the bias of
        its first convolution.
    """

    texts: tuple[Tensor, ...]
    embeddings: Tensor


class PlainUNet:
    """diffusers' own forward of any UNet, with FastUNet's arguments."""

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet

    @property
    def dtype(self) -> torch.dtype:
        return self._unet.dtype

    def constants(self, prompt_embeds: Tensor, timesteps: Tensor) -> Constants:
        return Constants((prompt_embeds,), timesteps[:, None])

    def __call__(
        self, sample: Tensor, texts: tuple[Tensor, ...], embeddings: Tensor, *, first_frame: bool = False
    ) -> Tensor:
        # UNetMotionModel wants the prompt once a frame, the others once a clip.
        copies = len(sample) * (sample.shape[2] if type(self._unet).__name__ == "UNetMotionModel" else 1)
        prompt = texts[0].to(sample.dtype).expand(copies, -1, -1)
        noise = self._unet(sample, embeddings[:, 0], prompt).sample
        return noise[:, :, :1] if first_frame else noise


class FastMotionUNet(PlainUNet):
    """diffusers' own forward of a UNetMotionModel (AnimateDiff), with its motion modules evaluated channels last."""

    def __init__(self, unet: nn.Module, attention_fn: AttentionFn | None = None) -> None:
        # A second tree of modules over the same weights: the caller's stays as it is.
        tensors = [*unet.parameters(), *unet.buffers()]
        super().__init__(copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors}))
        for name, module in list(self._unet.named_modules()):
            if type(module).__name__ == "AnimateDiffTransformer3D":
                self._unet.set_submodule(name, _FastMotionModule(name, module))


class _FastMotionModule(nn.Module):
    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        for block in module.transformer_blocks:
            check_transformer_block(name, block)
        self._module = module
        self._weights = Weights(module)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        timestep: Tensor | None = None,
        class_labels: None = None,
        num_frames: int = 1,
        cross_attention_kwargs: None = None,
    ) -> Tensor:
        """AnimateDiffTransformer3D's arguments, of which it uses the first and the number of frames."""
        x = hidden_states.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames))
        return temporal_transformer(self._weights, self._module, x).flatten(0, 1).permute(0, 3, 1, 2)


class FastUNet:
    """Evaluates `unet`, whose weights it shares or copies into better layouts. Unsupported if it cannot.

    attention_fn: for spatial and cross-attention.
    """

    def __init__(self, unet: nn.Module, attention_fn: AttentionFn = F.scaled_dot_product_attention) -> None:
        _check(unet)
        self._weights = Weights(unet)
        self._unet = unet
        self._attention_fn = attention_fn
        self._resnets = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
        spatial = [module for module in unet.modules() if type(module).__name__ == "Transformer2DModel"]
        self._cross_attentions = [block.attn2 for model in spatial for block in model.transformer_blocks]

    @property
    def dtype(self) -> torch.dtype:
        return self._unet.dtype

    @property
    def width(self) -> int:
        """Channels of the first activation."""
        return self._unet.config.block_out_channels[0]

    @torch.no_grad()
    def constants(self, prompt_embeds: Tensor, timesteps: Tensor) -> Constants:
        """prompt_embeds: (1, tokens, dim). timesteps: (T,)."""
        unet, dtype = self._unet, self._unet.dtype
        time = F.silu(unet.time_embedding(unet.time_proj(timesteps).to(dtype)))
        embeddings = [r.time_emb_proj(time) + r.conv1.bias for r in self._resnets]
        texts = []
        for attention in self._cross_attentions:
            keys, values = attention.to_k(prompt_embeds.to(dtype)), attention.to_v(prompt_embeds.to(dtype))
            if prompt_embeds.shape[1] == 1:
                texts.append(attention.to_out[0](values)[0, 0])
            else:
                texts.append(torch.stack([keys, values]).unflatten(-1, (attention.heads, -1)).transpose(2, 3))
        return Constants(tuple(texts), torch.cat(embeddings, -1))

    def __call__(
        self, sample: Tensor, texts: tuple[Tensor, ...], embeddings: Tensor, *, first_frame: bool = False
    ) -> Tensor:
        """The noise prediction for a sample (B, C, F, h, w), of the same shape; its memory is channels last.

        texts: as in Constants. embeddings: (B, width), the row of Constants.embeddings for each clip's timestep.
        first_frame: predict frame 0 alone, (B, C, 1, h, w), and leave out what only the others need.
        """
        unet, weights = self._unet, self._weights
        given = dict(zip(self._cross_attentions, texts, strict=True))
        rows = embeddings.split([r.out_channels for r in self._resnets], -1)
        given.update(zip(self._resnets, rows, strict=True))

        x = conv(weights, unet.conv_in, sample.movedim(1, -1))
        x = temporal_transformer(weights, unet.transformer_in, x)
        skips = [x]
        for block in unet.down_blocks:
            for i in range(len(block.resnets)):
                x = self._conv_block(block, i, x, given)
                x = self._attention_block(block, i, x, given)
                skips.append(x)
            for layer in block.downsamplers or ():
                x = downsample(weights, layer, x)
                skips.append(x)

        x = self._conv_block(unet.mid_block, 0, x, given)
        for i in range(len(unet.mid_block.attentions)):
            x = self._attention_block(unet.mid_block, i, x, given)
            x = self._conv_block(unet.mid_block, i + 1, x, given)

        for block in unet.up_blocks:
            for i in range(len(block.resnets)):
                x = self._conv_block(block, i, torch.cat([x, skips.pop()], -1), given)
                x = self._attention_block(block, i, x, given, first_frame=first_frame and not skips)
            for layer in block.upsamplers or ():
                x = upsample(weights, layer, x, skips[-1].shape[2:4])
        x = group_norm(unet.conv_norm_out, x[:, :1] if first_frame else x)
        return conv(weights, unet.conv_out, x).movedim(-1, 1)

    def _conv_block(self, block: nn.Module, i: int, x: Tensor, given: dict[nn.Module, Tensor]) -> Tensor:
        """The block's i-th resnet and the convolutions over frames that follow it."""
        x = h = resnet(self._weights, block.resnets[i], x, given[block.resnets[i]])
        convs = block.temp_convs[i]
        for sequence in (convs.conv1, convs.conv2, convs.conv3, convs.conv4):
            norm, layer = sequence[0], sequence[-1]
            residual = x if sequence is convs.conv4 else None
            settings = {"groups": norm.num_groups, "eps": norm.eps}
            h = ops.temporal_conv(h, norm.weight, norm.bias, self._weights[layer], layer.bias, residual, **settings)
        return h

    def _attention_block(
        self, block: nn.Module, i: int, x: Tensor, given: dict[nn.Module, Tensor], *, first_frame: bool = False
    ) -> Tensor:
        """The block's i-th spatial and temporal transformers, if it has any."""
        if not hasattr(block, "attentions"):
            return x
        x = self._spatial_transformer(block.attentions[i], x, given)
        return temporal_transformer(self._weights, block.temp_attentions[i], x, first_frame=first_frame)

    def _spatial_transformer(self, model: nn.Module, x: Tensor, given: dict[nn.Module, Tensor]) -> Tensor:
        h = project(model.proj_in, group_norm(model.norm, x, silu=False))
        for block in model.transformer_blocks:
            h = self_attention(self._weights, block.attn1, layer_norm(block.norm1, h), h, self._attention_fn)
            h = self._cross_attention(block, h, given[block.attn2])
            h = feed_forward(block, h)
        return project(model.proj_out, h, x)

    def _cross_attention(self, block: nn.Module, h: Tensor, text: Tensor) -> Tensor:
        if text.ndim == 1:
            return h + text
        attention = block.attn2
        # All frames of all clips ask the same prompt: they are one sequence of queries.
        q = F.linear(layer_norm(block.norm2, h), attention.to_q.weight)
        q = q.view(1, -1, attention.heads, q.shape[-1] // attention.heads).transpose(1, 2)
        return project(attention.to_out[0], merge_heads(self._attention_fn(q, *text), h), h)


def _check(unet: nn.Module) -> None:
    """Unsupported unless FastUNet knows every module of it and every setting."""
    check_known(unet, _KINDS)
    if unet.config.time_cond_proj_dim is not None or unet.conv_norm_out is None:
        raise Unsupported("it has a conditioned time embedding, or no last norm")
    for name, module in unet.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            check_transformer_block(name, module)
            if module.pos_embed is not None:
                raise Unsupported(f"{name} embeds positions")
        if getattr(module, "b1", None):
            raise Unsupported(f"{name} has FreeU switched on")


_KINDS = frozenset(
    """
    UNet3DConditionModel CrossAttnDownBlock3D DownBlock3D UNetMidBlock3DCrossAttn CrossAttnUpBlock3D UpBlock3D
    Transformer2DModel TransformerTemporalModel BasicTransformerBlock FeedForward GEGLU TemporalConvLayer
    Timesteps TimestepEmbedding
    """.split()
)
