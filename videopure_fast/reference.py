"""The whole purification in plain torch, slow and clear: the truth that tests hold the fast one against.

The truth of a single op is its reference in ops/<op>.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import PurifyConfig
from .ops.guided_update import warp
from .schedule import Schedule, VoteCoefficients


@torch.no_grad()
def videopure(
    unet: nn.Module, vae: nn.Module, prompt_embeds: Tensor, clip: Tensor, flow: Tensor, config: PurifyConfig
) -> Tensor:
    """All votes (V, 3, F, H, W) of one clip (3, F, H, W) in [0, 1], step by step as the paper has it.

    flow: (F-1, 2, h, w) in latent pixels. Guidance by autograd, frames decoded one by one, classifier-free guidance
    with its doubled batch: nothing here is fast. Everything is in the models' dtype, as the authors run it in half
    precision, but the guided update, which is float32 at least.
    """
    schedule = Schedule(config)
    prompt_embeds = prompt_embeds.to(unet.dtype)

    def predict_noise(z: Tensor, timestep: int, scale: float) -> Tensor:
        both = unet(torch.cat([z, z]), timestep, torch.cat([prompt_embeds, prompt_embeds])).sample
        unconditional, conditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def ddim(z: Tensor, e: Tensor, source: int, target: int) -> Tensor:
        a, a_target = schedule.alpha(source), schedule.alpha(target)
        x0 = (z - math.sqrt(1 - a) * e) / math.sqrt(a)
        return math.sqrt(a_target) * x0 + math.sqrt(1 - a_target) * e

    def guide(z: Tensor, e: Tensor, step: VoteCoefficients) -> Tensor:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        return guidance_by_autograd(wide, e, target, flow[None], step, config).to(z.dtype)

    frames = clip.to(vae.dtype).transpose(0, 1)
    encoded = torch.cat([vae.encode(2 * frame[None] - 1).latent_dist.mode() for frame in frames])
    target = z = vae.config.scaling_factor * encoded.transpose(0, 1)[None]
    for t in schedule.timesteps:
        e = predict_noise(z, t, config.cfg_inversion)[:, :, :1]
        z = ddim(z, e, t - schedule.step, t)

    votes = []
    *loop, final = schedule.vote_coefficients()
    for t, step in zip(reversed(schedule.timesteps), loop, strict=True):
        e = predict_noise(z, t, config.cfg_denoise)
        optimized = guide(z, e, step)
        votes.append((optimized - step.sqrt_beta * e) / step.sqrt_alpha)
        z = ddim(z, e, t, t - schedule.step)
    votes.append(guide(z, e, final))

    latents = torch.cat(votes).transpose(1, 2) / vae.config.scaling_factor  # [V, F, C, h, w]
    decoded = torch.stack([torch.cat([vae.decode(frame[None]).sample for frame in vote]) for vote in latents])
    return (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)


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
