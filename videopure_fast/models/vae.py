"""A diffusers AutoencoderKL (Stable Diffusion's VAE) evaluated over its own weights, channels last."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    Pending,
    check_known,
    conv,
    downsample,
    group_norm,
    pending_conv,
    resnet,
    settle,
    upsample,
)
from .transformers import AttentionFn, attend_pixels, project
from .weights import Weights


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

    def __init__(
        self,
        vae: nn.Module,
        attention_fn: AttentionFn = F.scaled_dot_product_attention,
        *,
        for_gpu: bool | None = None,
    ) -> None:
        """attention_fn: for the attention in the middle. for_gpu: as for `Weights`."""
        check_known(vae, _KINDS)
        self._weights = Weights(vae, for_gpu=for_gpu)
        self._vae = vae
        self._attention_fn = attention_fn

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> the posterior's means (N, C, h, w), unscaled."""
        encoder, weights, last = self._vae.encoder, self._weights, self._vae.quant_conv
        x = pending_conv(weights, encoder.conv_in, images.movedim(1, -1)[None])
        for block in encoder.down_blocks:
            for layer in block.resnets:
                x = resnet(weights, layer, x)
            for layer in block.downsamplers or ():
                x = downsample(weights, layer, settle(weights, x))
        h, _ = group_norm(weights, encoder.conv_norm_out, self._middle(encoder.mid_block, x))
        if last is None:
            moments = conv(weights, encoder.conv_out, h)
        else:
            x = pending_conv(weights, encoder.conv_out, h)
            moments = project(last, x.x, bias=weights.bias_through(last, [x.part()], ()))
        return moments.chunk(2, -1)[0][0].movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (N, C, h, w) -> images (N, 3, H, W), around [-1, 1]."""
        decoder, weights = self._vae.decoder, self._weights
        h = latents.movedim(1, -1)[None]
        if self._vae.post_quant_conv is not None:
            h = project(self._vae.post_quant_conv, h)
        x = self._middle(decoder.mid_block, pending_conv(weights, decoder.conv_in, h))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = resnet(weights, layer, x)
            for layer in block.upsamplers or ():
                x = upsample(weights, layer, settle(weights, x), (2 * x.x.shape[2], 2 * x.x.shape[3]))
        h, _ = group_norm(weights, decoder.conv_norm_out, x)
        return conv(weights, decoder.conv_out, h)[0].movedim(-1, 1)

    def _middle(self, block: nn.Module, x: Pending) -> Pending:
        weights = self._weights
        x = resnet(weights, block.resnets[0], x)
        for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                h, x = group_norm(weights, attention.group_norm, x, silu=False)
                qkv = F.linear(h, *weights.beside((attention.to_q, attention.to_k, attention.to_v)))
                attended = attend_pixels(qkv, attention.heads, self._attention_fn)
                x = Pending(project(attention.to_out[0], attended, settle(weights, x)))
            x = resnet(weights, layer, x)
        return x


_KINDS = frozenset("AutoencoderKL Encoder Decoder DownEncoderBlock2D UNetMidBlock2D UpDecoderBlock2D".split())


# Values of the largest activation that go through at once. On a CPU: enough work to share, and little enough for its
# caches; the best of 2^19 to 2^22, measured with the packaged prior on two cores. On a GPU: those of 32 frames of
# 224x224. An H200 takes 3 % less time for five times as many, but 8 GiB more memory.
_CPU_ACTIVATION = 2**21
_GPU_ACTIVATION = 32 * 224 * 224 * 256


def frames_at_once(vae: nn.Module, height: int, width: int) -> int:
    """How many frames of (height, width) pixels should go through the VAE together, where it is."""
    # The largest activation is that of the last upsampler.
    widths = vae.config.block_out_channels
    largest = height * width * widths[min(1, len(widths) - 1)]
    on_gpu = next(vae.parameters()).device.type == "cuda"  # diffusers' own `vae.device` walks through all modules
    return max(1, (_GPU_ACTIVATION if on_gpu else _CPU_ACTIVATION) // largest)


def scale_latents(means: Tensor, config: Any) -> Tensor:
    """A VAE's means (..., C, h, w) as the UNet takes them: (z - shift) scale, with the shift and scale of its config.

    Latent channels that have a mean and a standard deviation are (z - mean) / std x scale.
    """
    shift, scale = _shift_and_scale(config, means)
    return (means if shift is None else means - shift) * scale


def unscale_latents(latents: Tensor, config: Any) -> Tensor:
    """The inverse of `scale_latents`: latents (..., C, h, w) as the VAE, or decoder, of this config decodes them."""
    shift, scale = _shift_and_scale(config, latents)
    unscaled = latents / scale
    return unscaled if shift is None else unscaled + shift


def _shift_and_scale(config: Any, latents: Tensor) -> tuple[Tensor | float | None, Tensor | float]:
    """Numbers, or for channels of their own (C, 1, 1). shift: None where there is none."""
    scale, mean, std = (
        config.scaling_factor,
        getattr(config, "latents_mean", None),
        getattr(config, "latents_std", None),
    )
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or None, scale
    return _of_channels(tuple(mean), tuple(std), scale, latents.dtype, latents.device)


@functools.lru_cache(maxsize=16)
def _of_channels(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Made once: a copy to a GPU waits for all work before it."""
    with torch.inference_mode(False):
        shift = torch.tensor(mean, dtype=dtype, device=device)
        return shift.view(-1, 1, 1), torch.tensor([scale / s for s in std], dtype=dtype, device=device).view(-1, 1, 1)
