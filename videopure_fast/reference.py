"""Each op of the method in plain torch, slow and clear: the truth for tests, and the differentiable path.

Latents are (B, C, F, h, w), a stack of votes (V, B, C, F, h, w), latent flow (B, F-1, 2, h, w) in latent pixels.
Activations of the models are (B, F, H, W, C), channels last; weights are those of torch's modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PurifyConfig
from .schedule import Schedule, VoteCoefficients


def ddim_step(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    """scale z + noise_scale e, each clip at its own step (DDIM, eq. 12 without x0).

    latents: (B, C, F, h, w). noise: the same shape, any floating dtype; with `first_frame_noise` frame 0's serves all
    frames (temporal inversion). coefficients: (B, 2), scale and noise_scale. Returns the latents' shape and dtype.
    """
    scale, noise_scale = coefficients[:, :, None, None, None, None].unbind(1)
    noise = (noise[:, :, :1] if first_frame_noise else noise).to(latents.dtype)
    return scale * latents + noise_scale * noise


def ddim_step_(latents: Tensor, noise: Tensor, coefficients: Tensor, first_frame_noise: bool = False) -> Tensor:
    """`ddim_step` in place."""
    return latents.copy_(ddim_step(latents, noise, coefficients, first_frame_noise))


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of (N, C, h, w) at (x + flow_x, y + flow_y), zeros outside; flow (N, 2, h, w) in pixels."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=flow.dtype, device=flow.device),
        torch.arange(width, dtype=flow.dtype, device=flow.device),
        indexing="ij",
    )
    # align_corners=True puts the first pixel's center at -1 and the last one's at 1.
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
    coefficients: Tensor,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """Guided spatial-temporal optimization of all votes (arXiv 2501.14999, section 3), in closed form.

    latents, noise: (V, B, C, F, h, w), state and noise prediction of each vote; noise may be of a narrower dtype.
    target: (B, C, F, h, w), the encoded clip. flow: (B, F-1, 2, h, w), from frame j to j+1 in latent pixels.
    coefficients: (V, B, 4), a schedule.VoteCoefficients for each vote of each clip; predicts_x0 is 0 or 1.
    Returns the votes (V, B, C, F, h, w), in the latents' dtype.
    """
    # A sign has no derivative to hand on.
    return _guided_update(
        latents, noise, target, flow, coefficients, spatial_weight, temporal_weight, lambda m: m.detach().sign()
    )


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
    return _guided_update(
        *(latents, noise, target, flow, coefficients, spatial_weight, temporal_weight),
        lambda m: torch.tanh(m / sign_temperature),
    )


def _guided_update(
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
        p = (z - sqrt_beta * e) / sqrt_alpha
        gradient = spatial_weight * 2 * (p - target) / p[0].numel()
        # The warped frame is a constant: the pull reaches frames 0 .. F-2, each by the sign of its own residual.
        following = p[:, :, 1:].transpose(1, 2).flatten(0, 1)
        warped = warp(following, flow.flatten(0, 1)).unflatten(0, flow.shape[:2]).transpose(1, 2)
        pull = temporal_weight * sign(warped - p[:, :, :-1]) / p[0, :, 0].numel()
        gradient = gradient + F.pad(pull, (0, 0, 0, 0, 0, 1))
        optimized = z + update * gradient
        votes.append(torch.where(predicts_x0 != 0, (optimized - sqrt_beta * e) / sqrt_alpha, optimized))
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


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over the frames of every pixel (Attention Is All You Need, eq. 1, scale 1/sqrt(head size)).

    qkv: (B, F, H, W, 3C), queries, keys and values one after another, each split into heads of C/heads channels.
    Returns (B, F, H, W, C).
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(4, 0, 2, 3, 5, 1, 6).unbind()  # [B, H, W, heads, F, d]
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    return (weights @ v).permute(0, 4, 1, 2, 3, 5).flatten(-2)


def norm_temporal_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, position: Tensor | None, heads: int, eps: float
) -> Tensor:
    """`temporal_attention` of the queries, keys and values of LayerNorm(x), plus an embedding of each frame's position.

    x: (B, F, H, W, C). norm_weight, norm_bias: (C,). weight: (3D, C), three Linear weights one after another.
    position: (F, C) or None, added after the norm (AnimateDiff). Returns (B, F, H, W, D).
    """
    tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if position is not None:
        tokens = tokens + position[:, None, None]
    return temporal_attention(F.linear(tokens, weight), heads)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x weight^T + bias. x: (..., K), weight: (N, K), bias: (N,), residual: (..., N)."""
    return residual + F.linear(x, weight, bias)


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels times the GELU of the second (arXiv 2002.05202). x: (..., 2D) -> (..., D)."""
    values, gate = x.chunk(2, -1)
    return values * F.gelu(gate)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`geglu` of x weight^T + bias. x: (..., K), weight: (2D, K), bias: (2D,). Returns (..., D)."""
    return geglu(F.linear(x, weight, bias))


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> Tensor:
    """x + out_bias + (`linear_geglu` of LayerNorm(x)) out_weight^T, for (..., C), (2D, C) and (C, D)."""
    tokens = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return x + F.linear(linear_geglu(tokens, weight, bias), out_weight, out_bias)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    embedding: Tensor | None,
    groups: int,
    eps: float,
    over_frames: bool,
    silu: bool,
) -> Tensor:
    """SiLU(GroupNorm(x + embedding)) (arXiv 1803.08494). x: (B, F, H, W, C). weight, bias: (C,).

    embedding: (B, C) or None, the time embedding of each clip. Statistics are of each frame, or with `over_frames` of
    the whole clip. `silu` off leaves the activation out. Returns (B, F, H, W, C).
    """
    if embedding is not None:
        x = x + embedding[:, None, None, None]
    samples = x.movedim(-1, 1) if over_frames else x.flatten(0, 1).movedim(-1, 1)  # [B, C, F, H, W] or [BF, C, H, W]
    y = torch.group_norm(samples, groups, weight, bias, eps)  # F.group_norm refuses groups of one value
    y = y.movedim(1, -1) if over_frames else y.movedim(1, -1).unflatten(0, x.shape[:2])
    return F.silu(y) if silu else y


def temporal_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    eps: float,
) -> Tensor:
    """residual + bias + the convolution of SiLU(GroupNorm(x)) over frames t-1, t, t+1, with zero frames at both ends.

    x: (B, F, H, W, C); statistics are of the whole clip. weight: (3, N, C), a Conv3d's (N, C, 3, 1, 1) with the taps
    first. bias: (N,). residual: (B, F, H, W, N) or None. Returns (B, F, H, W, N).
    """
    y = group_norm_silu(x, norm_weight, norm_bias, None, groups, eps, True, True)
    before, at, after = weight
    padded = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 1))
    out = F.linear(padded[:, :-2], before) + F.linear(y, at, bias) + F.linear(padded[:, 2:], after)
    return out if residual is None else residual + out


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
