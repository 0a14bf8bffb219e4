"""The stages of a purification over one set of models, each of which may be called alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import PurifyConfig
from .frozen import FrozenModels
from .inputs import (
    MOST_FRAMES,
    check_callback,
    check_clips,
    check_count,
    check_flag,
    check_generators,
    check_latents,
    replace_config,
)
from .models.flow import Flow, load_flow, no_flow, resize_flow
from .models.vae import frames_at_once, scale_latents, unscale_latents
from .runtime import readback
from .runtime.checkpointing import checkpointed
from .runtime.spans import span
from .sampling import Callback, Chain, Generators, copied, guide, per_clip_generators, prepare, standard_normal, vote
from .schedule import Schedule, VoteCoefficients, read_scheduler

if TYPE_CHECKING:
    from typing_extensions import Self


_USUAL_FRAMES = 32


class PurifierStages(FrozenModels):
    """Encode, denoise, vote and decode, with a text-to-video diffusion model that is frozen and stays in eval mode.

    Args:
        unet: diffusers UNet3DConditionModel predicting epsilon. It becomes `.unet`, frozen and in eval mode; its
            weights are not changed.
        vae: diffusers AutoencoderKL, which becomes `.vae` likewise.
        prompt_embeds: (1, tokens, dim), the text embedding of the prompt, which is empty in the paper.
        negative_prompt_embeds: the same shape; classifier-free guidance runs only if it differs from `prompt_embeds`.
        flow: callable `(prev, next) -> flow` or a name of `videopure_fast.models.flow.FLOWS`; None is no flow. Frames
            (N, 3, H, W) in [0, 1], flow (N, 2, H, W) in pixels from prev to next; called once for every clip
            (or window) with its F-1 pairs in order, in float32, on the padded clip.
        config: settings of the method.
        scheduler_config: a diffusers scheduler's configuration; its training schedule is read into `config`.
        max_frames: longest clip that the UNet sees at once; longer clips go through overlapping windows. By default
            32, or as many as a motion model has positions for.
        decoder: diffusers AutoencoderTiny that decodes in the VAE's place: many times cheaper, and lossy.
        fast: evaluate the models channels last with fused ops; off, or for models that the fast forms do not know,
            diffusers' own forward runs.
        attention: the function for attention over pixels in the fast forms: "sdpa" (torch's), or "xformers", which must
            be installed.
        capture: run inversion and denoising as one CUDA graph on a GPU, and from the second call of a shape on as a
            replay on the CPU, where that pays. Results are equal bit for bit. Random methods, `feedback`, gradients and
            a `callback` take eager steps whatever it says.

    The modules stay on their device and in their dtype until `.to()`, which moves the caller's modules too; float16,
    bfloat16, float32 and float64 work.
    They may be changed at any time. Every call sees new weights, a load, a cast, a fused LoRA, an average that is
    copied through `.data`, hooks, processors, replaced forwards, FreeU, slicing and tiling, on any inner module. What
    its fast forms do not know runs in diffusers' own forward, with one warning, and uncaptured where it is the caller's
    code. Not seen are a write through `.data` that leaves the first 16 values of every weight as they were, and a
    change within an object that a module refers to, such as a processor's own state: call `refresh()` after them. Nor
    are methods of classes that are replaced, but for forward, encode and decode, and changes while a call runs.
    A result that is not finite is never returned: FloatingPointError names the stage and the dtype.
    The sampler's state, the votes and their arithmetic are float32 at least. float32 means float32: TF32 and
    autocast are off while the purifier runs.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        prompt_embeds: Tensor,
        *,
        negative_prompt_embeds: Tensor | None = None,
        flow: str | Flow | None = None,
        config: PurifyConfig = PurifyConfig(),  # noqa: B008  (frozen)
        scheduler_config: Mapping[str, Any] | None = None,
        max_frames: int | None = None,
        decoder: nn.Module | None = None,
        fast: bool = True,
        attention: str = "sdpa",
        capture: bool = True,
    ) -> None:
        super().__init__(unet, vae, prompt_embeds, negative_prompt_embeds, decoder, fast=fast, attention=attention)
        # In a tuple, a flow network is no submodule: casting the purifier to half must not cast the flow.
        self._flow = (no_flow if flow is None else load_flow(flow),)
        self.capture = capture
        self._config = config  # for the check of max_frames
        self.max_frames = min(_USUAL_FRAMES, self._most_frames) if max_frames is None else max_frames
        self.config = config  # checked before the scheduler's configuration is read into it
        self.config = read_scheduler(config, scheduler_config)

    @property
    def flow(self) -> Flow:
        return self._flow[0]

    @property
    def capture(self) -> bool:
        return self._capture

    @capture.setter
    def capture(self, capture: bool) -> None:
        self._capture = check_flag("capture", capture)

    @property
    def captured(self) -> bool:
        """Whether a call without gradients and without a callback is captured, where that pays."""
        return self.capture and not self.properties["randomized"] and not self.config.feedback

    @property
    def max_frames(self) -> int:
        return self._max_frames

    @max_frames.setter
    def max_frames(self, max_frames: int) -> None:
        check_count("max_frames", max_frames, least=2, most=self._most_frames)
        _check_overlap(self._config, max_frames)
        self._max_frames = max_frames

    @property
    def _most_frames(self) -> int:
        """As many as the UNet has learned positions for, where it has any."""
        most: int = getattr(self.unet.config, "motion_max_seq_length", None) or MOST_FRAMES
        return most

    @property
    def config(self) -> PurifyConfig:
        return self._config

    @config.setter
    def config(self, config: PurifyConfig) -> None:
        if not isinstance(config, PurifyConfig):
            raise TypeError(f"config must be a PurifyConfig, got {type(config).__name__}")
        _check_overlap(config, self.max_frames)
        self._schedule = Schedule(config)
        self._config = config

    def with_config(self, **overrides: Any) -> Self:
        """A purifier with other settings, fields of PurifyConfig. TypeError for unknown ones.

        It shares the modules: `.to()` moves and casts those of both.
        """
        twin = copy.copy(self)
        twin.config = replace_config(self.config, overrides)
        return twin

    @property
    def properties(self) -> dict[str, bool]:
        """What an evaluation has to know of this defense.

        randomized: equal clips may be purified unequally, so that an attack needs the expectation over its randomness
            (EOT). dynamic: it optimizes at test time; the guided update does, by a closed form in which no check that
            looks for autograd in a forward pass can see it.
        """
        return {"randomized": self.config.method in ("ddim", "ddpm"), "dynamic": self.config.method == "videopure"}

    @property
    def evaluations(self) -> int:
        """UNet evaluations that one window takes; clips of a batch share them."""
        return sum(map(len, self._schedule.steps))

    def encode(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [0, 1], sides multiples of the VAE's factor -> posterior means (B, 4, F, h, w).

        The means are shifted and scaled as the VAE's configuration says, and as the UNet takes them.
        """
        check_clips(clips)
        if any(side % self.vae_factor for side in clips.shape[-2:]):
            raise ValueError(
                f"clips have shape {tuple(clips.shape)}; accepted: sides of multiples of {self.vae_factor}"
            )
        return self._computed(lambda: self._encode(clips.to(self._executor.device)), clips)

    def _encode(self, clips: Tensor) -> Tensor:
        with span("encode", clips) as work:
            frames = (2 * clips - 1).transpose(1, 2).flatten(0, 1).to(self._executor.vae_dtype)
            chunks = frames.split(self._frames_at_once(*clips.shape[-2:]))
            means = [checkpointed(self._executor.vae.encode, chunk) for chunk in chunks]
            latents = scale_latents(torch.cat(means).to(self._state_dtype), self.vae.config)
            latents = latents.unflatten(0, (len(clips), -1)).transpose(1, 2)
            work.leave(latents)
        readback.check_finite("encode", latents, dtype=self._executor.vae_dtype)
        return latents

    def denoise(
        self,
        latents: Tensor,
        *,
        generator: Generators = None,
        callback: Callback | None = None,
        capture: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encoded latents (B, 4, F, h, w), inverted or diffused, and denoised.

        Returns for videopure all T + 2 states of denoising, (T + 2, B, 4, F, h, w), and its T + 1 noise predictions;
        for the baselines the final state and the last prediction, with a first axis of 1. The keywords are those of a
        call. `feedback`, which needs the flow, belongs to whole calls alone.
        """
        self._check_latents("latents", latents)
        check_callback(callback)
        capture = self.capture if capture is None else check_flag("capture", capture)
        generators = self._generators(generator, len(latents))

        def compute() -> tuple[Tensor, Tensor]:
            moved = latents.to(self._executor.device, self._state_dtype)
            return self._run_chain(moved, copied(generators), callback, capture)

        return self._computed(compute, latents)

    def vote(
        self, states: Tensor, noise_preds: Tensor, target: Tensor, flow: Tensor, *, num_votes: int | None = None
    ) -> Tensor:
        """The last `num_votes` guided votes of videopure, or all T + 2, (votes, B, 4, F, h, w).

        states, noise_preds: as `denoise` returns them; the final state shares the last prediction. target: the encoded
        clips. flow: (B, F-1, 2, h, w) in latent pixels, from `latent_flow`.
        """
        coefficients = self._schedule.vote_coefficients()
        for name, tensor, count in (("states", states, len(coefficients)), ("noise_preds", noise_preds, None)):
            self._check_latents(name, tensor, dims=6)
            if len(tensor) != (len(states) - 1 if count is None else count):
                raise ValueError(f"{name} has {len(tensor)} of {len(coefficients)} states; accepted: as of `denoise`")
        self._check_latents("target", target)
        check_count("num_votes", len(states) if num_votes is None else num_votes, most=len(states))
        return self._checked(
            lambda: self._vote(states, noise_preds, target, flow, coefficients, num_votes), states, noise_preds, target
        )

    def _vote(
        self,
        states: Tensor,
        noise_preds: Tensor,
        target: Tensor,
        flow: Tensor,
        coefficients: Sequence[VoteCoefficients],
        num_votes: int | None = None,
    ) -> Tensor:
        votes = vote(states, noise_preds, target, flow, coefficients, self.config, num_votes=num_votes)
        readback.check_finite("vote", votes, dtype=votes.dtype)
        return votes

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, F, h, w), or votes (V, B, 4, F, h, w) -> clips (..., 3, F, H, W) in [0, 1]."""
        check_latents("latents", latents, self.vae.config.latent_channels, most_dims=6)
        return self._computed(lambda: self._decode(latents.to(self._executor.device)), latents)

    def _decode(self, latents: Tensor) -> Tensor:
        decode: Callable[[Tensor], Tensor] = self._executor.vae.decode
        config = self.vae.config
        if self.decoder is not None:
            decode, config = functools.partial(_decode_lossily, self.decoder), self.decoder.config
        with span("decode", latents) as work:
            frames = unscale_latents(latents.transpose(-4, -3), config)
            flat = frames.flatten(0, -4).to(self._executor.vae_dtype)
            sides = (side * self.vae_factor for side in latents.shape[-2:])
            chunks = flat.split(self._frames_at_once(*sides))
            decoded = torch.cat([checkpointed(decode, chunk) for chunk in chunks])
            # Before infinite values become 0 and 1.
            readback.check_finite("decode", decoded, dtype=self._executor.vae_dtype)
            clips = (decoded.to(self._state_dtype) / 2 + 0.5).clamp(0, 1)
            clips = clips.unflatten(0, frames.shape[:-3]).transpose(-4, -3)
            work.leave(clips)
        return clips

    def latent_flow(self, clips: Tensor) -> Tensor:
        """Flow of clips (B, 3, F, H, W) in [0, 1] at latent resolution: (B, F-1, 2, h, w) in latent pixels."""
        check_clips(clips)
        return self._checked(lambda: self._latent_flow(clips))

    def _latent_flow(self, clips: Tensor) -> Tensor:
        height, width = (side // self.vae_factor for side in clips.shape[-2:])
        clips = clips.detach()
        with span("flow", clips) as work:
            flows = []
            for clip in clips.float().transpose(1, 2):
                flow = self.flow(clip[:-1], clip[1:])
                if not isinstance(flow, Tensor) or flow.shape != (len(clip) - 1, 2, *clip.shape[-2:]):
                    seen = tuple(flow.shape) if isinstance(flow, Tensor) else type(flow).__name__
                    raise ValueError(f"flow must return {(len(clip) - 1, 2, *clip.shape[-2:])}, got {seen}")
                readback.check_finite("flow", flow, dtype=flow.dtype)
                flows.append(resize_flow(flow.to(clip), height, width))
            found = torch.stack(flows).to(self._state_dtype)
            work.leave(found)
        return found

    def _run_chain(
        self, target: Tensor, generators: Sequence[torch.Generator], callback: Callback | None, capture: bool
    ) -> tuple[Tensor, Tensor]:
        """Inversion and denoising; captured where that was asked for and nobody draws, watches or differentiates."""
        chain = self._chain(target)
        with span("chain", target, evaluations=self.evaluations) as work:
            eager = generators or callback is not None or target.requires_grad or not self._executor.capturable
            if capture and not eager:
                results = self._captures(chain, target, first_activation=chain.first_activation(target))
            else:
                latents, noise_sampler = target, functools.partial(standard_normal, target, generators)
                if chain.inversion is None:
                    signal, deviation = self._schedule.diffusion()
                    latents = signal * target + deviation * noise_sampler()
                results = chain(latents, noise_sampler=noise_sampler, callback=callback)
            work.leave(*results)
        readback.check_finite("denoise", *results, dtype=self._executor.dtype)
        return results

    def _feedback_votes(self, target: Tensor, flow: Tensor, callback: Callback | None) -> Tensor:
        """All votes where each step of denoising starts from the optimized latents."""
        optimized = []
        *steps, final = self._schedule.vote_coefficients()

        def guidance_fn(step: int, latents: Tensor, noise_pred: Tensor) -> Tensor:
            coefficients = steps[step]._replace(predicts_x0=False)
            (guided,) = guide(latents[None], noise_pred[None], target, flow, [coefficients], self.config)
            optimized.append(guided)
            return guided

        chain = self._chain(target)
        with span("chain", target, evaluations=self.evaluations):
            states, noise_preds = chain(target, guidance_fn=guidance_fn, callback=callback)
        readback.check_finite("denoise", states, noise_preds, dtype=self._executor.dtype)
        # What was optimized already is only taken to its clean prediction; the final state has its turn now.
        coefficients = [*(step._replace(update=0.0) for step in steps), final]
        states = torch.stack([*optimized, states[-1]])
        return self._vote(states, noise_preds, target, flow, coefficients)

    def _chain(self, like: Tensor) -> Chain:
        """The prepared chain of these settings, for latents of like's dtype and device; made once."""
        with self._executor.lock:
            return self._chains.get_or_make((self.config, like.dtype, like.device), lambda: self._prepare(like))

    def _prepare(self, like: Tensor) -> Chain:
        inversion, denoising = self._schedule.steps
        unet, config = self._executor.unet, self.config
        prompts = self._prompts
        return Chain(
            unet,
            prepare(unet, inversion, prompts, config.cfg_inversion, like) if inversion else None,
            prepare(unet, denoising, prompts, config.cfg_denoise, like),
            voting=config.method == "videopure",
        )

    def _generators(self, generator: Generators, clips: int) -> list[torch.Generator]:
        """The random methods' generators; none of a deterministic one, whose caller's stay where they are."""
        check_generators(generator, clips)
        return per_clip_generators(generator, clips) if self.properties["randomized"] else []

    def _frames_at_once(self, height: int, width: int) -> int:
        """How many frames of (height, width) pixels go through the VAE at once."""
        return self.config.decode_chunk or frames_at_once(self.vae, height, width)

    def _check_latents(self, name: str, latents: Tensor, *, dims: int = 5) -> None:
        check_latents(name, latents, self.vae.config.latent_channels, least_dims=dims, most_dims=dims)


def _check_overlap(config: PurifyConfig, max_frames: int) -> None:
    if isinstance(config, PurifyConfig) and config.window_overlap >= max_frames:
        raise ValueError(f"window_overlap {config.window_overlap} must be less than max_frames {max_frames}")


def _decode_lossily(decoder: Any, latents: Tensor) -> Tensor:
    """diffusers' own forward of an AutoencoderTiny."""
    return decoder.decode(latents).sample
