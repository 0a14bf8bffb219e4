"""A diffusers UNet3DConditionModel (ModelScope's text-to-video UNet) evaluated over its own weights, channels last."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .layers import (
    Pending,
    Unsupported,
    check_known,
    conv,
    downsample,
    group_norm,
    pending_conv,
    resnet,
    settle,
    upsample,
)
from .state import departure
from .transformers import AttentionFn, check_transformer_block, spatial_transformer, temporal_transformer
from .weights import Weights


class Constants(NamedTuple):
    """What the evaluations of one prompt at some timesteps share.

    texts: for each cross-attention the prompt's keys and values, (2, 1, heads, tokens, head size); for a prompt of one
        token, to which every query attends with weight 1, the layer's whole result plus the bias of the self-attention
        before it, (C,).
    embeddings: (timesteps, sum of the resnets' widths), for each resnet the projected time embedding plus the bias of
        its first convolution.
    """

    texts: tuple[Tensor, ...]
    embeddings: Tensor


class PlainUNet:
    """diffusers' own forward of any UNet, with FastUNet's arguments."""

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self.dtype: torch.dtype = unet.dtype

    def constants(self, prompt_embeds: Tensor, timesteps: Tensor) -> Constants:
        return Constants((prompt_embeds,), timesteps[:, None].to(prompt_embeds.device))

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
        if reason := departure(unet):
            raise Unsupported(reason)
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
        return temporal_transformer(self._weights, self._module, Pending(x)).flatten(0, 1).permute(0, 3, 1, 2)


class FastUNet:
    """Evaluates `unet`, whose weights it shares or copies into better layouts. Unsupported if it cannot.

    attention_fn: for spatial and cross-attention. for_gpu: as for `Weights`.
    """

    def __init__(
        self,
        unet: nn.Module,
        attention_fn: AttentionFn = F.scaled_dot_product_attention,
        *,
        for_gpu: bool | None = None,
    ) -> None:
        _check(unet)
        self._weights = Weights(unet, for_gpu=for_gpu)
        self._unet = unet
        self.dtype: torch.dtype = unet.dtype
        self._attention_fn = attention_fn
        self._resnets = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
        spatial = [module for module in unet.modules() if type(module).__name__ == "Transformer2DModel"]
        self._blocks = [block for model in spatial for block in model.transformer_blocks]

    @property
    def width(self) -> int:
        """Channels of the first activation."""
        return self._unet.config.block_out_channels[0]

    @torch.no_grad()
    def constants(self, prompt_embeds: Tensor, timesteps: Tensor) -> Constants:
        """prompt_embeds: (1, tokens, dim). timesteps: (T,), on the CPU.

        Their sines, in float32 whatever the dtype, are those of the CPU: a GPU's differ in the last digit.
        """
        unet, dtype = self._unet, self.dtype
        time = F.silu(unet.time_embedding(unet.time_proj(timesteps).to(prompt_embeds.device, dtype)))
        embeddings = [r.time_emb_proj(time) + r.conv1.bias for r in self._resnets]
        texts = []
        for block in self._blocks:
            attention = block.attn2
            keys, values = attention.to_k(prompt_embeds.to(dtype)), attention.to_v(prompt_embeds.to(dtype))
            if prompt_embeds.shape[1] == 1:
                texts.append(attention.to_out[0](values)[0, 0] + block.attn1.to_out[0].bias)
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
        given = dict(zip(self._blocks, texts, strict=True))
        rows = embeddings.split([r.out_channels for r in self._resnets], -1)
        given.update(zip(self._resnets, rows, strict=True))

        x = pending_conv(weights, unet.conv_in, sample.movedim(1, -1))
        x = Pending(temporal_transformer(weights, unet.transformer_in, x))
        skips = [x]
        for block in unet.down_blocks:
            for i in range(len(block.resnets)):
                x = self._conv_block(block, i, x, given)
                x = self._attention_block(block, i, x, given)
                skips.append(x)
            for layer in block.downsamplers or ():
                x = downsample(weights, layer, settle(weights, x))
                skips.append(x)

        x = self._conv_block(unet.mid_block, 0, x, given)
        for i in range(len(unet.mid_block.attentions)):
            x = self._attention_block(unet.mid_block, i, x, given)
            x = self._conv_block(unet.mid_block, i + 1, x, given)

        for block in unet.up_blocks:
            for i in range(len(block.resnets)):
                x = self._conv_block(block, i, x, given, skips.pop())
                x = self._attention_block(block, i, x, given, first_frame=first_frame and not skips)
            for layer in block.upsamplers or ():
                x = upsample(weights, layer, settle(weights, x), skips[-1].x.shape[2:4])
        if first_frame:
            x = Pending(settle(weights, x)[:, :1])
        h, _ = group_norm(weights, unet.conv_norm_out, x)
        return conv(weights, unet.conv_out, h).movedim(-1, 1)

    def _conv_block(
        self, block: nn.Module, i: int, x: Pending, given: dict[nn.Module, Tensor], skip: Pending | None = None
    ) -> Pending:
        """The block's i-th resnet and the convolutions over frames that follow it."""
        weights, convs = self._weights, block.temp_convs[i]
        h = resnet(weights, block.resnets[i], x, skip, given[block.resnets[i]])
        for sequence in (convs.conv1, convs.conv2, convs.conv3, convs.conv4):
            norm, layer = sequence[0], sequence[-1]
            activated, h = group_norm(weights, norm, h, over_frames=True)
            if sequence is convs.conv1:
                x = h
            residual = settle(weights, x) if sequence is convs.conv4 else None
            h = Pending(ops.temporal_conv(activated, weights[layer], layer.bias, residual))
        return h

    def _attention_block(
        self, block: nn.Module, i: int, x: Pending, given: dict[nn.Module, Tensor], *, first_frame: bool = False
    ) -> Pending:
        """The block's i-th spatial and temporal transformers, if it has any."""
        if not hasattr(block, "attentions"):
            return x
        weights, model = self._weights, block.attentions[i]
        texts = [given[inner] for inner in model.transformer_blocks]
        x = Pending(spatial_transformer(weights, model, x, texts, self._attention_fn))
        return Pending(temporal_transformer(weights, block.temp_attentions[i], x, first_frame=first_frame))


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


_KINDS = frozenset(
    """
    UNet3DConditionModel CrossAttnDownBlock3D DownBlock3D UNetMidBlock3DCrossAttn CrossAttnUpBlock3D UpBlock3D
    Transformer2DModel TransformerTemporalModel BasicTransformerBlock FeedForward GEGLU TemporalConvLayer
    Timesteps TimestepEmbedding
    """.split()
)
