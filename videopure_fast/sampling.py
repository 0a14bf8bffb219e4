"""The method as loops one reads beside the paper (arXiv 2501.14999): invert, denoise, vote.

Latents are (B, 4, F, h, w), in float32 at least. A loop runs over prepared tables. It draws no random numbers and reads
nothing on the host, so that it can be captured, unless it is given functions that do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import ops
from .config import PurifyConfig
from .models.unet import Constants, FastUNet, PlainUNet
from .ops.guided_update import soft_guided_update
from .runtime.checkpointing import checkpointed
from .runtime.spans import span
from .schedule import SamplerStep, VoteCoefficients

UNetForm: TypeAlias = FastUNet | PlainUNet
Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"
# (stage, step, timestep, latents) after each step; the stage is "inversion" or "denoising".
Callback: TypeAlias = Callable[[str, int, int, Tensor], None]


class SamplerTables(NamedTuple):
    """The steps of one loop as tensors on the models' device.

    constants: for each prompt, the conditional one and, under classifier-free guidance, the unconditional one.
    coefficients: (steps, 2), scale and noise_scale, in the latents' dtype.
    """

    steps: tuple[SamplerStep, ...]
    constants: tuple[Constants, ...]
    coefficients: Tensor
    guidance_scale: float


@torch.inference_mode(False)
@torch.no_grad()
def prepare(
    unet: UNetForm, steps: Sequence[SamplerStep], prompts: Sequence[Tensor], guidance_scale: float, like: Tensor
) -> SamplerTables:
    """Whatever a loop over `steps` needs beside the latents. like: a tensor of the latents' dtype and device."""
    timesteps = torch.tensor([step.timestep for step in steps], device="cpu")
    constants = tuple(unet.constants(prompt, timesteps) for prompt in prompts)
    # Each row begins at a multiple of 16 bytes: Triton compiles a kernel once more for an address that does not.
    coefficients = like.new_tensor([(step.scale, step.noise_scale, 0, 0) for step in steps])[:, :2]
    return SamplerTables(tuple(steps), constants, coefficients, guidance_scale)


def predict_noise(
    unet: UNetForm, latents: Tensor, tables: SamplerTables, step: int, *, first_frame: bool = False
) -> Tensor:
    """Epsilon at a step, in the UNet's dtype, with classifier-free guidance where there is a second prompt.

    first_frame: predict the noise of frame 0 alone, (B, 4, 1, h, w).
    """

    texts = [constants.texts for constants in tables.constants]
    embeddings = [constants.embeddings[step].expand(len(latents), -1) for constants in tables.constants]

    def predict(latents: Tensor) -> Tensor:
        return _guided_noise(unet, latents, texts, embeddings, tables.guidance_scale, first_frame)

    with span("evaluation", latents):
        return checkpointed(predict, latents)


def _guided_noise(
    unet: UNetForm,
    latents: Tensor,
    texts: Sequence[tuple[Tensor, ...]],
    embeddings: Sequence[Tensor],
    guidance_scale: float | Tensor,
    first_frame: bool,
) -> Tensor:
    """Epsilon for clips at timesteps of their own. texts, embeddings: for each prompt; a row for each clip.

    guidance_scale: a number, or one for each clip, (B, 1, 1, 1, 1), in float32 at least.
    """
    sample = latents.to(unet.dtype)
    conditional, *unconditional = (
        unet(sample, text, rows, first_frame=first_frame) for text, rows in zip(texts, embeddings, strict=True)
    )
    for other in unconditional:
        conditional = other + (guidance_scale * (conditional - other)).to(other.dtype)
    return conditional


def invert(
    unet: UNetForm,
    latents: Tensor,
    tables: SamplerTables,
    *,
    first_frame_noise: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM inversion: encoded latents, step by step into noise.

    first_frame_noise: frame 0's noise prediction is used for every frame, and it alone is computed (temporal DDIM
        inversion).
    """
    with span("inversion", latents) as work:
        for i, step in enumerate(tables.steps):
            noise_pred = predict_noise(unet, latents, tables, i, first_frame=first_frame_noise).expand_as(latents)
            coefficients = tables.coefficients[i].expand(len(latents), 2)
            latents = ops.ddim_step(latents, noise_pred, coefficients, first_frame_noise=first_frame_noise)
            if callback is not None:
                callback("inversion", i, step.timestep, latents)
        work.leave(latents)
    return latents


def denoise(
    unet: UNetForm,
    latents: Tensor,
    tables: SamplerTables,
    *,
    all_states: bool = True,
    noise_sampler: Callable[[], Tensor] | None = None,
    guidance_fn: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor]:
    """DDIM denoising, or DDPM's ancestral sampling where steps have a sigma.

    all_states: keep the latents before every step and after the last one; else those after the last one alone.
    noise_sampler: draws fresh noise of the latents' shape, for steps that have a sigma.
    guidance_fn: (step, latents, noise_pred) -> the latents from which the step starts in their place.

    Returns states (S + 1, B, 4, F, h, w) and noise predictions (S, ...) of S steps, or the last of both alone.
    """
    with span("denoising", latents) as work:
        states: list[Tensor] = [latents]
        noise_preds: list[Tensor] = []
        for i, step in enumerate(tables.steps):
            noise_pred = predict_noise(unet, latents, tables, i)
            if guidance_fn is not None:
                latents = guidance_fn(i, latents, noise_pred)
            latents = ops.ddim_step(latents, noise_pred, tables.coefficients[i].expand(len(latents), 2))
            if step.sigma and noise_sampler is not None:
                latents = latents + step.sigma * noise_sampler()
            if callback is not None:
                callback("denoising", i, step.timestep, latents)
            if not all_states:
                states.clear()
                noise_preds.clear()
            states.append(latents)
            noise_preds.append(noise_pred)
        stacked = torch.stack(states), torch.stack(noise_preds)
        work.leave(*stacked)
    return stacked


def vote(
    states: Tensor,
    noise_preds: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Sequence[VoteCoefficients],
    config: PurifyConfig,
    *,
    num_votes: int | None = None,
) -> Tensor:
    """The guided votes of denoising's states, or the last `num_votes` of them, (votes, B, 4, F, h, w).

    states: (T + 2, B, 4, F, h, w). noise_preds: (T + 1, ...); the final state shares the last one. target:
    (B, 4, F, h, w), the encoded clips. flow: (B, F-1, 2, h, w) in latent pixels. coefficients: one for each state.
    """
    kept = slice(0 if num_votes is None else len(states) - num_votes, None)
    with span("guidance", states[kept], noise_preds[kept], target, flow) as work:
        shared = torch.cat([noise_preds, noise_preds[-1:]])
        votes = guide(states[kept], shared[kept], target, flow, coefficients[kept], config)
        work.leave(votes)
    return votes


def guide(
    states: Tensor,
    noise_preds: Tensor,
    target: Tensor,
    flow: Tensor,
    coefficients: Sequence[VoteCoefficients],
    config: PurifyConfig,
) -> Tensor:
    """The guided update of each state (V, B, 4, F, h, w) with its own noise prediction; else as `vote`."""
    table = _table(tuple(coefficients), target.dtype, target.device)[:, None].expand(-1, len(target), -1)
    weights = {"spatial_weight": config.spatial_weight, "temporal_weight": config.temporal_weight}
    if config.sign_temperature:
        weights["sign_temperature"] = config.sign_temperature
        return soft_guided_update(states, noise_preds, target, flow, table, **weights)
    return ops.guided_update(states, noise_preds, target, flow, table, **weights)


@functools.lru_cache(maxsize=64)
def _table(coefficients: tuple[VoteCoefficients, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(votes, 4). Made once: a copy to a GPU waits for all work before it."""
    with torch.inference_mode(False):
        return torch.tensor(coefficients, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Chain:
    """Inversion and denoising of one configuration over one state of the models, prepared: the object to capture.

    inversion: None where a method starts from diffused latents. voting: inversion uses frame 0's noise, and the states
    of all steps are kept, for their votes.
    """

    unet: UNetForm
    inversion: SamplerTables | None
    denoising: SamplerTables
    voting: bool

    def __call__(
        self,
        latents: Tensor,
        *,
        noise_sampler: Callable[[], Tensor] | None = None,
        guidance_fn: Callable[[int, Tensor, Tensor], Tensor] | None = None,
        callback: Callback | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encoded, or diffused, latents -> what `denoise` returns."""
        if self.inversion is not None:
            latents = invert(self.unet, latents, self.inversion, first_frame_noise=self.voting, callback=callback)
        return denoise(
            self.unet,
            latents,
            self.denoising,
            all_states=self.voting,
            noise_sampler=noise_sampler,
            guidance_fn=guidance_fn,
            callback=callback,
        )

    def clip_steps(self) -> list[ClipStep]:
        """The steps of both loops for one clip, in order."""
        loops = [(self.inversion, self.voting)] if self.inversion is not None else []
        return [
            ClipStep(
                tuple(constants.embeddings[i] for constants in tables.constants),
                tables.coefficients[i],
                tables.guidance_scale,
                inverts,
            )
            for tables, inverts in [*loops, (self.denoising, False)]
            for i in range(len(tables.steps))
        ]

    def first_activation(self, latents: Tensor) -> int | None:
        """Values of a clip's first activation; None where diffusers' own forward runs, of which nothing is known."""
        return latents[:, 0].numel() * self.unet.width if isinstance(self.unet, FastUNet) else None


class ClipStep(NamedTuple):
    """What one step of a loop needs to know of one clip: the tables' rows for it.

    inverts: a step of temporal inversion, in which frame 0's noise prediction serves every frame.
    """

    embeddings: tuple[Tensor, ...]
    coefficients: Tensor
    guidance_scale: float
    inverts: bool


@dataclass(frozen=True, eq=False)
class BatchStep:
    """One step for clips that are each at a step of their own, of inversion or of denoising: the object to capture.

    invert: every clip is at a step of temporal inversion, so that frame 0's noise alone is computed.
    """

    unet: UNetForm
    texts: tuple[tuple[Tensor, ...], ...]
    invert: bool

    def __call__(
        self, latents: Tensor, coefficients: Tensor, inverts: Tensor, guidance_scale: Tensor, *embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latents after the step, and the noise predictions; all arguments have a row for each clip."""
        noise_pred = _guided_noise(self.unet, latents, self.texts, embeddings, guidance_scale, self.invert)
        if self.invert:
            noise_pred = noise_pred.expand_as(latents)
        elif len(latents) > 1:
            noise_pred = torch.where(inverts, noise_pred[:, :, :1], noise_pred)
        return ops.ddim_step(latents, noise_pred, coefficients, first_frame_noise=self.invert), noise_pred


def batch_rows(steps: Sequence[ClipStep], like: Tensor) -> tuple[Tensor, ...]:
    """The arguments of a `BatchStep` beside the latents. like: a tensor on the models' device."""
    per_clip = (len(steps), 1, 1, 1, 1)
    inverts = torch.tensor([step.inverts for step in steps], device="cpu")
    scales = torch.tensor([step.guidance_scale for step in steps], dtype=like.dtype, device="cpu")
    # Copied without waiting for the work before: a GPU would idle between two steps.
    inverts, scales = (rows.to(like.device, non_blocking=True).view(per_clip) for rows in (inverts, scales))
    embeddings = [torch.stack(rows) for rows in zip(*(step.embeddings for step in steps), strict=True)]
    return torch.stack([step.coefficients for step in steps]), inverts, scales, *embeddings


def per_clip_generators(generator: Generators, clips: int) -> list[torch.Generator]:
    """One CPU generator a clip, seeded from the given ones, so that its noise depends on no other clip and no device.

    generator: one for all clips, one for each, or None for torch's own; checked by `inputs.check_generators`.
    """
    sources: Sequence[Any] = generator if isinstance(generator, (list, tuple)) else [generator] * clips
    forks = []
    for source in sources:
        seed = torch.randint(2**63 - 1, (), generator=source, device="cpu" if source is None else source.device)
        forks.append(torch.Generator().manual_seed(seed.item()))
    return forks


def copied(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Generators that draw the same, for a computation that may be done again."""
    return [generator.clone_state() for generator in generators]


def standard_normal(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of like's shape, each clip's from its own CPU generator."""
    shape = like.shape[1:]
    noise = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
    return torch.stack(noise).to(like)
