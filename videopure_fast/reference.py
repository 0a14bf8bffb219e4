"""Each op of the method in plain torch, slow and clear: the truth for tests, and the differentiable path.

Latents are (B, C, F, h, w), a stack of votes (V, B, C, F, h, w), latent flow (B, F-1, 2, h, w) in latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PurifyConfig
from .schedule import Schedule, VoteCoefficients


def ddim_step(latents: Tensor, noise: Tensor, scale: float, noise_scale: float) -> Tensor:
    """scale z + noise_scale e (DDIM, eq. 12 without x0). `noise` broadcasts: one frame's serves temporal inversion.

    Computed in and returned as the latents' dtype, the wider of the two.
    """
    return scale * latents + noise_scale * noise.to(latents.dtype)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of (N, C, h, w) at (x + flow_x, y + flow_y), zeros outside; flow (N, 2, h, w) in pixels."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=flow.dtype, device=flow.device),
        torch.arange(width, dtype=flow.dtype, device=flow.device),
        indexing="ij",
    )
    # align_corners=True puts the first pixel's centre at -1 and the last one's at 1.
    # Beyond reach, or not finite: any place outside will do.
    x = (x + flow[:, 0]).nan_to_num(nan=-2.0).clamp(-2, width + 1)
    y = (y + flow[:, 1]).nan_to_num(nan=-2.0).clamp(-2, height + 1)
    grid_x = 2 * x / max(width - 1, 1) - 1
    grid_y = 2 * y / max(height - 1, 1) - 1
    grid = torch.stack([grid_x, grid_y], -1).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def guided_update(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Sequence[VoteCoefficients],
    *,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """Guided spatial-temporal optimisation of all votes (arXiv 2501.14999, section 3), in closed form.

    latents, noise: (V, B, C, F, h, w), state and noise prediction of each vote; noise may be of a narrower dtype.
    target: (B, C, F, h, w), the encoded clip. flow: (B, F-1, 2, h, w), from frame j to j+1 in latent pixels.
    coefficients: V of them. Returns the votes (V, B, C, F, h, w), in the latents' dtype.
    """
    votes = []
    for z, e, step in zip(latents, noise.to(latents.dtype), coefficients, strict=True):
        p = (z - step.sqrt_beta * e) / step.sqrt_alpha
        gradient = spatial_weight * 2 * (p - target) / p[0].numel()
        # The warped frame is a constant: the pull reaches frames 0 .. F-2, each by the sign of its own residual.
        # A sign has no derivative to hand on.
        fixed = p.detach()
        following = fixed[:, :, 1:].transpose(1, 2).flatten(0, 1)
        warped = warp(following, flow.flatten(0, 1)).unflatten(0, flow.shape[:2]).transpose(1, 2)
        pull = temporal_weight * torch.sign(warped - fixed[:, :, :-1]) / p[0, :, 0].numel()
        gradient = gradient + F.pad(pull, (0, 0, 0, 0, 0, 1))
        optimised = z + step.update * gradient
        votes.append((optimised - step.sqrt_beta * e) / step.sqrt_alpha if step.predicts_x0 else optimised)
    return torch.stack(votes)


def guidance_by_autograd(
    latents: Tensor, noise: Tensor, target: Tensor, flow: Tensor, step: VoteCoefficients, config: PurifyConfig
) -> Tensor:
    """The guided update of one state (B, C, F, h, w) as the gradient that `guided_update` has in closed form.

    The log variance is negative: the update climbs the distance to the target and descends the temporal one.
    """
    with torch.enable_grad():
        z = latents.detach().requires_grad_()
        p = (z - step.sqrt_beta * noise) / step.sqrt_alpha
        objective = config.spatial_weight * (p - target).square().mean((1, 2, 3, 4)).sum()
        for j in range(p.shape[2] - 1):
            warped = warp(p[:, :, j + 1].detach(), flow[:, j])
            objective = objective - config.temporal_weight * (warped - p[:, :, j]).abs().mean((1, 2, 3)).sum()
        (gradient,) = torch.autograd.grad(objective, z)
    # step.update holds the 1/sqrt(a) of the chain rule, which autograd has already applied.
    return latents + step.update * step.sqrt_alpha * gradient


@torch.no_grad()
def videopure(
    unet: nn.Module, vae: nn.Module, prompt_embeds: Tensor, clip: Tensor, flow: Tensor, config: PurifyConfig
) -> Tensor:
    """All votes (V, 3, F, H, W) of one clip (3, F, H, W) in [0, 1], step by step as the paper has it.

    flow: (F-1, 2, h, w) in latent pixels. Guidance by autograd, frames decoded one by one, classifier-free guidance
    with its doubled batch: nothing here is fast.
    """
    schedule = Schedule(config)

    def predict_noise(z: Tensor, timestep: int, scale: float) -> Tensor:
        both = unet(torch.cat([z, z]), timestep, torch.cat([prompt_embeds, prompt_embeds])).sample
        unconditional, conditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def ddim(z: Tensor, e: Tensor, source: int, target: int) -> Tensor:
        a, a_target = schedule.alpha(source), schedule.alpha(target)
        x0 = (z - math.sqrt(1 - a) * e) / math.sqrt(a)
        return math.sqrt(a_target) * x0 + math.sqrt(1 - a_target) * e

    frames = clip.transpose(0, 1)
    encoded = torch.cat([vae.encode(2 * frame[None] - 1).latent_dist.mode() for frame in frames])
    target = z = vae.config.scaling_factor * encoded.transpose(0, 1)[None]
    for t in schedule.timesteps:
        e = predict_noise(z, t, config.cfg_inversion)[:, :, :1]
        z = ddim(z, e, t - schedule.step, t)

    votes = []
    *loop, final = schedule.votes()
    for t, step in zip(reversed(schedule.timesteps), loop, strict=True):
        e = predict_noise(z, t, config.cfg_denoise)
        optimised = guidance_by_autograd(z, e, target, flow[None], step, config)
        votes.append((optimised - step.sqrt_beta * e) / step.sqrt_alpha)
        z = ddim(z, e, t, t - schedule.step)
    votes.append(guidance_by_autograd(z, e, target, flow[None], final, config))

    latents = torch.cat(votes).transpose(1, 2) / vae.config.scaling_factor  # [V, F, C, h, w]
    decoded = torch.stack([torch.cat([vae.decode(frame[None]).sample for frame in vote]) for vote in latents])
    return (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)
