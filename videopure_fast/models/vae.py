"""A diffusers AutoencoderKL (Stable Diffusion's VAE) evaluated over its own weights, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    AttentionFn,
    Unsupported,
    Weights,
    check_known,
    conv,
    downsample,
    group_norm,
    project,
    resnet,
    self_attention,
    upsample,
)


class PlainVAE:
    """diffusers' own encode and decode of any VAE, with FastVAE's arguments."""

    def __init__(self, vae: nn.Module) -> None:
        self._vae = vae

    def encode(self, images: Tensor) -> Tensor:
        return self._vae.encode(images).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        return self._vae.decode(latents).sample


class FastVAE:
    """Evaluates `vae`, whose weights it shares or copies into better layouts. Unsupported if it cannot."""

    def __init__(self, vae: nn.Module, attention_fn: AttentionFn = F.scaled_dot_product_attention) -> None:
        check_known(vae, _KINDS)
        if vae.use_slicing or vae.use_tiling:
            raise Unsupported("it has slicing or tiling switched on")
        self._weights = Weights(vae)
        self._vae = vae
        self._attention_fn = attention_fn

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> the posterior's means (N, C, h, w), unscaled."""
        encoder, weights = self._vae.encoder, self._weights
        x = conv(weights, encoder.conv_in, images.movedim(1, -1)[None])
        for block in encoder.down_blocks:
            for layer in block.resnets:
                x = resnet(weights, layer, x)
            for layer in block.downsamplers or ():
                x = downsample(weights, layer, x)
        x = conv(weights, encoder.conv_out, group_norm(encoder.conv_norm_out, self._middle(encoder.mid_block, x)))
        if self._vae.quant_conv is not None:
            x = project(self._vae.quant_conv, x)
        return x.chunk(2, -1)[0][0].movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (N, C, h, w) -> images (N, 3, H, W), around [-1, 1]."""
        decoder, weights = self._vae.decoder, self._weights
        x = latents.movedim(1, -1)[None]
        if self._vae.post_quant_conv is not None:
            x = project(self._vae.post_quant_conv, x)
        x = self._middle(decoder.mid_block, conv(weights, decoder.conv_in, x))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = resnet(weights, layer, x)
            for layer in block.upsamplers or ():
                x = upsample(weights, layer, x, (2 * x.shape[2], 2 * x.shape[3]))
        return conv(weights, decoder.conv_out, group_norm(decoder.conv_norm_out, x))[0].movedim(-1, 1)

    def _middle(self, block: nn.Module, x: Tensor) -> Tensor:
        x = resnet(self._weights, block.resnets[0], x)
        for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                tokens = group_norm(attention.group_norm, x, silu=False)
                x = self_attention(self._weights, attention, tokens, x, self._attention_fn)
            x = resnet(self._weights, layer, x)
        return x


_KINDS = frozenset("AutoencoderKL Encoder Decoder DownEncoderBlock2D UNetMidBlock2D UpDecoderBlock2D".split())


# Values of the largest activation at once on a CPU: enough work to share, and little enough for its caches. The best of
# 2^19 to 2^22, measured with the packaged prior on two cores.
_CPU_ACTIVATION = 2**21


def frames_at_once(vae: nn.Module, height: int, width: int) -> int:
    """How many frames of (height, width) pixels should go through the VAE together, where it is."""
    # The largest activation is that of the last upsampler.
    widths, device = vae.config.block_out_channels, vae.device
    largest = height * width * widths[min(1, len(widths) - 1)]
    if device.type != "cuda":
        return max(1, _CPU_ACTIVATION // largest)
    # About four of its size are alive at once, and kernels index a tensor with 32 bits.
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(free // (4 * largest * vae.dtype.itemsize), (2**31 - 1) // largest))
