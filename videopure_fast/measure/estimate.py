"""How long a purification takes, before it begins: its FLOPs, counted without data, at a share of the device's rate."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..purifier import Purifier
from ..windows import window_starts
from .profile import measure_roofline

# What purifications by the packaged prior reach of the rate of matrix products on a CPU, about.
_SHARE_OF_PRODUCTS = 0.35


def estimate_seconds(purifier: Purifier, frames: int, height: int, width: int) -> float | None:
    """Seconds in which a video of so many frames is purified, one vote decoded; right within a factor of three or so.

    height, width: of a frame, in pixels. None for models that cannot be counted. A GPU's compilation comes on top.
    """
    windows = len(window_starts(frames, purifier.max_frames, purifier.config.window_overlap))
    length = min(frames, purifier.max_frames)
    try:
        flops = windows * _window_flops(purifier, length, height, width)
    except Exception:  # a model of another's may raise anything on the meta device
        return None
    rate = measure_roofline(purifier.unet.device, purifier.unet.dtype).matrix
    return flops / (_SHARE_OF_PRODUCTS * rate)


@torch.no_grad()
def _window_flops(purifier: Purifier, frames: int, height: int, width: int) -> int:
    """FLOPs of a window: it is encoded, each evaluation predicts noise for every prompt, and one vote is decoded."""
    factor = purifier.vae_factor
    rows, columns = (-(-side // factor) for side in (height, width))
    unet, vae = _on_meta(purifier.unet), _on_meta(purifier.vae)

    def empty(*shape: int) -> Any:
        return torch.empty(*shape, dtype=purifier.unet.dtype, device="meta")

    latents = empty(1, unet.config.in_channels, frames, rows, columns)
    with FlopCounterMode(display=False) as evaluation:
        unet(latents, torch.empty(1, device="meta"), encoder_hidden_states=empty(*purifier.prompt_embeds.shape))
    with FlopCounterMode(display=False) as frame:
        vae.encode(empty(1, vae.config.in_channels, rows * factor, columns * factor))
        vae.decode(latents[:, :, 0])
    passes = purifier.evaluations * len(purifier._prompts)
    return passes * evaluation.get_total_flops() + frames * frame.get_total_flops()


def _on_meta(model: nn.Module) -> Any:
    """A copy of a model without its values, which takes no memory."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor.detach().to("meta") for tensor in tensors})
