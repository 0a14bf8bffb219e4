"""The guided spatial-temporal optimization of all votes, in closed form; and the warp by optical flow that it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from ._checks import check_fit, check_noise, check_tensor
from ._register import register
from .backend import LATENT_DTYPES


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    *,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """Guided spatial-temporal optimization of all votes of all clips (arXiv 2501.14999, section 3), in closed form.

    latents, noise: (V, B, C, F, h, w), state and noise prediction of each vote; noise of any floating dtype.
    target: (B, C, F, h, w), the encoded clip. flow: (B, F-1, 2, h, w), from frame j to j+1 in latent pixels.
    coefficients: (V, B, 4), a schedule.VoteCoefficients for each vote of each clip, in the latents' dtype;
    predicts_x0 is 0 or 1.

    Returns the votes (V, B, C, F, h, w), in the latents' dtype. ValueError for tensors that do not fit together.
    """
    check_tensor("latents", latents)
    if latents.ndim != 6 or latents.numel() == 0 or min(latents.shape[-2:]) < 2:
        raise ValueError(
            f"latents must be (V, B, C, F, h, w), not empty and 2x2 pixels or larger, got {tuple(latents.shape)}"
        )
    votes, clips, channels, frames, height, width = latents.shape
    check_noise(latents, noise)
    check_fit(
        latents,
        "latents",
        target=(target, (clips, channels, frames, height, width)),
        flow=(flow, (clips, frames - 1, 2, height, width)),
        coefficients=(coefficients, (votes, clips, 4)),
    )
    return _guided_update(latents, noise, target, flow, coefficients, float(spatial_weight), float(temporal_weight))


def guided_update_reference(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """The closed form vote by vote. No gradient passes through the sign."""
    tensors = (latents, noise, target, flow, coefficients)
    return _update_votes(*tensors, spatial_weight, temporal_weight, lambda residual: residual.detach().sign())


def soft_guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
    sign_temperature: float,
) -> Tensor:
    """`guided_update` with tanh(residual / sign_temperature) for the sign, so that a gradient passes through it."""
    tensors = (latents, noise, target, flow, coefficients)
    return _update_votes(
        *tensors, spatial_weight, temporal_weight, lambda residual: torch.tanh(residual / sign_temperature)
    )


def _update_votes(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
    sign: Callable[[Tensor], Tensor],
) -> Tensor:
    votes = []
    for z, e, steps in zip(latents, noise.to(latents.dtype), coefficients, strict=True):
        sqrt_alpha, sqrt_beta, update, predicts_x0 = steps[:, :, None, None, None, None].unbind(1)
        x0 = (z - sqrt_beta * e) / sqrt_alpha
        gradient = spatial_weight * 2 * (x0 - target) / x0[0].numel()
        # The warped frame is a constant: frames 0 .. F-2 are pulled, each by the sign of its own residual.
        following = x0[:, :, 1:].transpose(1, 2).flatten(0, 1)
        warped = warp(following, flow.flatten(0, 1)).unflatten(0, flow.shape[:2]).transpose(1, 2)
        pull = temporal_weight * sign(warped - x0[:, :, :-1]) / x0[0, :, 0].numel()
        gradient = gradient + F.pad(pull, (0, 0, 0, 0, 0, 1))
        optimized = z + update * gradient
        votes.append(torch.where(predicts_x0 != 0, (optimized - sqrt_beta * e) / sqrt_alpha, optimized))
    return torch.stack(votes)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of (N, C, h, w) at (x + flow_x, y + flow_y), zeros outside; flow (N, 2, h, w) in pixels."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=flow.dtype, device=flow.device),
        torch.arange(width, dtype=flow.dtype, device=flow.device),
        indexing="ij",
    )
    # A position out of every pixel's reach, or not finite, samples zeros: any such position will do for it.
    x = (x + flow[:, 0]).nan_to_num(nan=-2.0).clamp(-2, width + 1)
    y = (y + flow[:, 1]).nan_to_num(nan=-2.0).clamp(-2, height + 1)
    # align_corners=True puts the first pixel's center at -1 and the last one's at 1.
    grid_x = 2 * x / max(width - 1, 1) - 1
    grid_y = 2 * y / max(height - 1, 1) - 1
    grid = torch.stack([grid_x, grid_y], -1).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def guided_update_native(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    output = latents.new_empty(latents.shape)
    others = (target, flow.transpose(1, 2), native.as_pixels(coefficients), output)
    weights = {"spatial_weight": spatial_weight, "temporal_weight": temporal_weight}
    native.call_with_latents("guided_update", latents, noise, *others, **weights)
    return output


_guided_update = register(
    "guided_update", reference=guided_update_reference, native=guided_update_native, dtypes=LATENT_DTYPES
)
