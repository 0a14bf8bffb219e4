"""The purifier: encode -> invert -> denoise -> guided votes -> decode (arXiv 2501.14999)."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from . import ops, reference
from .config import PurifyConfig
from .inputs import (
    MOST_FRAMES,
    check_count,
    check_decoder,
    check_embeddings,
    check_models,
    check_video,
    replace_config,
    resolve_device,
)
from .models.flow import Flow, flow_name, load_flow, no_flow, resize_flow
from .models.layers import attention_function
from .models.prior import Models, Settings, find_prior, load_decoder, load_models, read_settings, save_prior
from .ops.backend import full_float32
from .runtime.engine import Engine, SamplerTables, SideStream
from .schedule import SamplerStep, Schedule, VoteCoefficients, read_scheduler
from .windows import window_starts, window_weights

if TYPE_CHECKING:
    from .measure.profile import Profile

Generators = torch.Generator | Sequence[torch.Generator] | None
Callback = Callable[[str, int, int, Tensor], None]


class LatentVotes(NamedTuple):
    """Votes that wait to be decoded: of each window its first frame and its latents (V, B, 4, F, h, w)."""

    video: Tensor
    windows: tuple[tuple[int, Tensor], ...]

    @property
    def num_votes(self) -> int:
        return len(self.windows[0][1])


class Purifier(nn.Module):
    """Purifies video clips with a text-to-video diffusion model, frozen and always in eval mode.

    Args:
        unet: diffusers UNet3DConditionModel predicting epsilon; kept untouched as `.unet`.
        vae: diffusers AutoencoderKL; kept untouched as `.vae`.
        prompt_embeds: (1, tokens, dim), the text embedding of the prompt, which is empty in the paper.
        negative_prompt_embeds: the same shape; classifier-free guidance runs only if it differs from `prompt_embeds`.
        flow: callable `(prev, next) -> flow` or a name of `videopure_fast.models.flow.FLOWS`; None is no flow. Frames
            (N, 3, H, W) in [0, 1], flow (N, 2, H, W) in pixels from prev to next; called once for every clip
            (or window) with its F-1 pairs in order, in float32, on the padded clip.
        config: settings of the method.
        scheduler_config: a diffusers scheduler's configuration; its training schedule is read into `config`.
        max_frames: longest clip that the UNet sees at once; longer clips go through overlapping windows.
        decoder: diffusers AutoencoderTiny that decodes in the VAE's place: many times cheaper, and lossy.
        fast: evaluate the models channels last with fused ops, and on a GPU the whole loop as one captured graph;
            off, or for models that the fast forms do not know, diffusers' own forward runs.
        attention: of pixels, in the fast forms: "sdpa" (torch's) or "xformers", which must be installed.

    The modules stay on their device and in their dtype until `.to()`; float16, bfloat16, float32 and float64 work.
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
        max_frames: int = 32,
        decoder: nn.Module | None = None,
        fast: bool = True,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        check_models(unet, vae)
        check_decoder(vae, decoder)
        check_embeddings(unet, prompt_embeds, negative_prompt_embeds)
        check_count("max_frames", max_frames, least=2, most=MOST_FRAMES)
        self.unet, self.vae, self.decoder = unet, vae, decoder
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.detach().clone().to(unet.device)
        self.register_buffer("prompt_embeds", prompt_embeds.detach().clone().to(unet.device))
        self.register_buffer("negative_prompt_embeds", negative_prompt_embeds)
        # The two halves of classifier-free guidance are equal for equal embeddings: it is then the identity.
        self._guided = negative_prompt_embeds is not None and not torch.equal(
            negative_prompt_embeds.to(prompt_embeds), prompt_embeds
        )
        # In a tuple, a flow network is no submodule: casting the purifier to half must not cast the flow.
        self._flow = (no_flow if flow is None else load_flow(flow),)
        self._engine = Engine(unet, vae, fast=fast, attend=attention_function(attention))
        self.max_frames = max_frames
        self.config = config  # once for its own checks
        self.config = read_scheduler(config, scheduler_config)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    @torch.inference_mode(False)  # weights made in inference mode would shut autograd out for good
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "tiny",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        flow: str | Flow | None = None,
        decoder: str | os.PathLike[str] | None = None,
        config: PurifyConfig | None = None,
        fast: bool = True,
        attention: str = "sdpa",
        **overrides: Any,
    ) -> Purifier:
        """Load a prior: "tiny" (packaged, offline), a folder, or a Hugging Face text-to-video repository.

        `device` is the accelerator where there is one, else the CPU; `dtype` is float16 on an accelerator, else
        float32. `flow` and `config` are the prior's own; `overrides` are fields of PurifyConfig replaced into it.
        `decoder` is "taesd", for priors with Stable Diffusion's VAE, or a folder or repository with an
        AutoencoderTiny. `fast` and `attention` as for a Purifier. FileNotFoundError for a model or network that is
        not there.
        """
        device = resolve_device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.float16
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {dtype!r}")
        # Whatever can be wrong with the settings is found before a model is loaded.
        replace_config(PurifyConfig() if config is None else config, overrides)
        folder = find_prior(name)
        settings = read_settings(folder)
        if flow is None and settings.flow is None:
            raise ValueError(f"{name} was saved with a flow of the caller's own: pass it again as flow=...")
        flow = load_flow(settings.flow if flow is None else flow)
        models = load_models(folder, dtype=dtype)
        purifier = cls(
            models.unet,
            models.vae,
            models.prompt_embeds,
            negative_prompt_embeds=models.negative_prompt_embeds,
            flow=flow,
            config=settings.config if config is None else config,
            scheduler_config=settings.scheduler_config,
            max_frames=settings.max_frames,
            decoder=None if decoder is None else load_decoder(decoder, dtype=dtype),
            fast=fast,
            attention=attention,
        )
        purifier.config = replace_config(purifier.config, overrides)
        return purifier.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write everything that `from_pretrained` needs to a new folder; a flow callable of your own is not saved."""
        models = Models(self.unet, self.vae, self.prompt_embeds, self.negative_prompt_embeds)
        save_prior(models, Settings(self.config, flow_name(self.flow), self.max_frames), folder)

    @property
    def flow(self) -> Flow:
        return self._flow[0]

    @property
    def config(self) -> PurifyConfig:
        return self._config

    @config.setter
    def config(self, config: PurifyConfig) -> None:
        if not isinstance(config, PurifyConfig):
            raise TypeError(f"config must be a PurifyConfig, got {type(config).__name__}")
        if config.window_overlap >= self.max_frames:
            raise ValueError(f"window_overlap {config.window_overlap} must be less than max_frames {self.max_frames}")
        self._schedule = Schedule(config)
        self._config = config

    @property
    def properties(self) -> dict[str, bool]:
        """What an evaluation has to know of this defense.

        randomized: equal clips may be purified unequally, so that an attack needs the expectation over its randomness
            (EOT). dynamic: it optimizes at test time; the guided update does, by a closed form in which no check that
            looks for autograd in a forward pass can see it.
        """
        return {"randomized": self.config.method in ("ddim", "ddpm"), "dynamic": self.config.method == "videopure"}

    def with_config(self, **overrides: Any) -> Purifier:
        """A purifier over the same modules with other settings: fields of PurifyConfig. TypeError for unknown ones."""
        twin = copy.copy(self)
        twin.config = replace_config(self.config, overrides)
        return twin

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def evaluations(self) -> int:
        """UNet evaluations that one window takes; clips of a batch share them."""
        return sum(map(len, self._plan()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Purifier:
        """Moves and casts reach the models here: what was made of their weights is made anew."""
        super()._apply(fn, recurse)
        self._engine.refresh()
        return self

    def train(self, mode: bool = True) -> Purifier:
        """Stays in eval mode whatever `mode`: dropout in the UNet would change the method."""
        return super().train(False)

    def forward(
        self,
        video: Tensor,
        *,
        return_votes: bool = False,
        generator: Generators = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Purify a batch of clips; each clip as if it were alone.

        Args:
            video: (B, 3, F, H, W) or (3, F, H, W); floats in [0, 1] or uint8; F >= 2, H and W >= 16.
            return_votes: return all V votes, T + 2 for videopure and 1 for the baselines.
            generator: randomness of "ddim" and "ddpm": one generator, or one for each clip. The same seeds give the
                same noise for any batching and any device.
            progress: show a progress bar over UNet evaluations.
            callback: called as (stage, step, timestep, latents) after each step; stage "inversion" or "denoising",
                latents (B, 4, F, h, w). Do not modify them.

        Returns the last vote, or with `return_votes` (B, V, 3, F, H, W) (no B for an unbatched clip), in the video's
        dtype, device and range. Gradients flow if grad mode is on and `video.requires_grad`; the backward pass is the
        caller's, and runs under the caller's TF32 settings.
        """
        options = {"generator": generator, "progress": progress, "callback": callback}
        denoised = self.denoise(video, last=not return_votes, **options)
        votes = self.decode_votes(denoised)
        return votes if return_votes else votes.select(-5, 0)

    def denoise(
        self,
        video: Tensor,
        *,
        last: bool = False,
        generator: Generators = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> LatentVotes:
        """The votes of a batch before they are decoded, or the last alone. Arguments and gradients as of a call."""
        check_video(video)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        self._engine.refresh()
        generators = self._fork(generator, len(video) if video.ndim == 5 else 1)
        with self._running(video):
            clips = self._admit(video if video.ndim == 5 else video[None])
            frames = clips.shape[2]
            starts = window_starts(frames, self.max_frames, self.config.window_overlap)
            what = f"{self.config.method} {len(clips)}x{frames}x{clips.shape[-2]}x{clips.shape[-1]}"
            total = len(starts) * self.evaluations
            with tqdm(total=total, desc=what, unit="eval", disable=not progress) as bar:

                def report(stage: str, step: int, timestep: int, latents: Tensor) -> None:
                    bar.update()
                    if callback is not None:
                        callback(stage, step, timestep, latents)

                windows = [clips[:, :, start : start + self.max_frames] for start in starts]
                watcher = report if progress or callback is not None else None
                votes = [self._latent_votes(window, last, generators, watcher) for window in windows]
        return LatentVotes(video, tuple(zip(starts, votes, strict=True)))

    def decode_votes(self, denoised: LatentVotes, votes: slice = slice(None)) -> Tensor:
        """Clips of some of the votes, (B, votes, 3, F, H, W), or without B for an unbatched clip, like the video."""
        video = denoised.video
        with self._running(video):
            if len(denoised.windows) == 1:
                clips = self.decode(denoised.windows[0][1][votes])
            else:
                clips = self._blend([(start, self.decode(latents[votes])) for start, latents in denoised.windows])
            clips = clips.transpose(0, 1)[..., : video.shape[-2], : video.shape[-1]].to(video.device)
            clips = (clips * 255).round().to(torch.uint8) if video.dtype == torch.uint8 else clips.to(video.dtype)
            return (clips if video.ndim == 5 else clips[0]).contiguous()

    def profile(
        self, video: Tensor, *, return_votes: bool = True, trace: str | os.PathLike[str] | None = None
    ) -> Profile:
        """Where the time of a call goes: `print` the result for a table, or take its `to_json()` or `to_dict()`.

        Runs the call several times, without gradients: first as it is, then each stage to its end. A stage has its
        time, launches, FLOPs, the fraction achieved of what this device's matrix products and copies allow, which are
        measured along with it, and its peak memory.

        Args:
            video: as of a call.
            return_votes: decode all votes, as a DefendedClassifier needs them, or the last alone.
            trace: also write a torch.profiler trace to this file, for chrome://tracing or Perfetto.
        """
        from .measure.profile import profile

        return profile(self, video, return_votes=return_votes, trace=trace)

    @contextmanager
    def _running(self, video: Tensor) -> Iterator[None]:
        """A graph only if grad mode is on and the video needs it; float32 is float32."""
        differentiable = torch.is_grad_enabled() and video.requires_grad
        # Leaving inference mode makes the results ordinary tensors, fit for a later backward.
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable), full_float32(self.unet.device):
            yield

    def _without_keeping(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """function(*inputs). For a gradient it keeps its inputs alone, and is computed again in the backward pass."""
        if not torch.is_grad_enabled():
            return function(*inputs)

        def run(*inputs: Any) -> Tensor:
            with full_float32(self.unet.device):  # the backward pass runs under the caller's settings
                return function(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _blend(self, windows: list[tuple[int, Tensor]]) -> Tensor:
        """Windows (..., F, H, W) of one length and their first frames -> the clip, cross-faded where they overlap."""
        last, clips = windows[-1]
        length = clips.shape[-3]
        weights = window_weights(length, self.config.window_overlap).to(clips)[:, None, None]
        blended = clips.new_zeros(*clips.shape[:-3], last + length, *clips.shape[-2:])
        total = clips.new_zeros(last + length, 1, 1)
        for start, clips in windows:
            blended[..., start : start + length, :, :] += weights * clips
            total[start : start + length] += weights
        return (blended / total).clamp(0, 1)

    def encode(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [0, 1], sides multiples of the VAE's factor -> posterior means (B, 4, F, h, w)."""
        frames = (2 * clips - 1).transpose(1, 2).flatten(0, 1).to(self.vae.dtype)
        chunks = frames.split(self._frames_at_once(*clips.shape[-2:]))
        means = [self._without_keeping(self._engine.vae.encode, chunk) for chunk in chunks]
        latents = torch.cat(means).to(self._state_dtype) * self.vae.config.scaling_factor
        return latents.unflatten(0, (len(clips), -1)).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """(..., 4, F, h, w) -> clips (..., 3, F, H, W) in [0, 1]."""
        if self.decoder is None:
            decode, scale = self._engine.vae.decode, self.vae.config.scaling_factor
        else:
            decode, scale = (lambda z: self.decoder.decode(z).sample), self.decoder.config.scaling_factor
        frames = (latents / scale).transpose(-4, -3)
        flat = frames.flatten(0, -4).to(self.vae.dtype)
        sides = (side * self.vae_factor for side in latents.shape[-2:])
        chunks = flat.split(self._frames_at_once(*sides))
        decoded = torch.cat([self._without_keeping(decode, chunk) for chunk in chunks])
        clips = (decoded.to(self._state_dtype) / 2 + 0.5).clamp(0, 1)
        return clips.unflatten(0, frames.shape[:-3]).transpose(-4, -3)

    def _frames_at_once(self, height: int, width: int) -> int:
        """How many frames of (height, width) pixels go through the VAE at once."""
        if self.config.decode_chunk:
            return self.config.decode_chunk
        # The largest activation is that of the last upsampler.
        widths, device = self.vae.config.block_out_channels, self.vae.device
        largest = height * width * widths[min(1, len(widths) - 1)]
        if device.type != "cuda":
            return max(1, _CPU_ACTIVATION // largest)
        # About four of its size are alive at once, and kernels index a tensor with 32 bits.
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, min(free // (4 * largest * self.vae.dtype.itemsize), (2**31 - 1) // largest))

    def sample(
        self,
        latents: Tensor,
        transitions: Sequence[SamplerStep],
        guidance_scale: float,
        *,
        first_frame_noise: bool = False,
        draw: Callable[[], Tensor] | None = None,
        steer: Callable[[int, Tensor, Tensor], Tensor] | None = None,
        report: Callable[[int, int, Tensor], None] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """SamplerTables latents (B, 4, F, h, w) through `transitions`: the one loop of all methods.

        guidance_scale: of classifier-free guidance, which runs only where the prompts differ.
        first_frame_noise: frame 0's noise serves every frame (temporal DDIM inversion), and it alone is predicted.
        draw: fresh noise of the latents' shape for every transition that has a sigma.
        steer: called as (step, latents, noise) before each transition, which starts from what it returns.
        report: called as (step, timestep, latents) after each transition.

        Yields for each transition the noise prediction, in the UNet's dtype, and the latents it leads to.
        """
        walk = self._engine.prepare(transitions, self._prompts, latents)
        for i, step in enumerate(walk.transitions):
            noise = self._without_keeping(self._predict, latents, walk, i, guidance_scale, first_frame_noise)
            noise = noise.expand_as(latents)
            if steer is not None:
                latents = steer(i, latents, noise)
            each = walk.coefficients[i].expand(len(latents), 2)
            latents = ops.ddim_step(latents, noise, each, first_frame_noise=first_frame_noise)
            if step.sigma:
                latents = latents + step.sigma * draw()
            if report is not None:
                report(i, step.timestep, latents)
            yield noise, latents

    def _predict(
        self, latents: Tensor, walk: SamplerTables, step: int, guidance_scale: float, first_frame: bool
    ) -> Tensor:
        """The UNet's epsilon for latents (B, 4, F, h, w), or of their first frame, with classifier-free guidance."""
        sample = latents.to(self.unet.dtype)
        conditional, *unconditional = (
            self._engine.unet(
                sample, constants.texts, constants.embeddings[step].expand(len(sample), -1), first_frame=first_frame
            )
            for constants in walk.constants
        )
        for other in unconditional:
            conditional = other + guidance_scale * (conditional - other)
        return conditional

    def vote(self, states: Tensor, noises: Tensor, target: Tensor, flow: Tensor, *, votes: int) -> Tensor:
        """The last `votes` guided votes of videopure, (votes, B, 4, F, h, w).

        states: (T + 2, B, 4, F, h, w), of denoising from the first to the final one. noises: (T + 1, ...), the
        prediction at each but the final state, which shares the last one. target: the encoded clips. flow:
        (B, F-1, 2, h, w) in latent pixels.
        """
        noises = torch.cat([noises, noises[-1:]])[-votes:]
        return self._guide(states[-votes:], noises, target, flow, self._schedule.vote_coefficients()[-votes:])

    def _guide(
        self, states: Tensor, noises: Tensor, target: Tensor, flow: Tensor, coefficients: Sequence[VoteCoefficients]
    ) -> Tensor:
        table = target.new_tensor(coefficients)[:, None].expand(-1, len(target), -1)
        weights = {"spatial_weight": self.config.spatial_weight, "temporal_weight": self.config.temporal_weight}
        if self.config.sign_temperature:
            weights["sign_temperature"] = self.config.sign_temperature
            return reference.soft_guided_update(states, noises, target, flow, table, **weights)
        return ops.guided_update(states, noises, target, flow, table, **weights)

    @torch.no_grad()
    def latent_flow(self, clips: Tensor) -> Tensor:
        """Flow of clips (B, 3, F, H, W) at latent resolution: (B, F-1, 2, h, w) in latent pixels."""
        height, width = (side // self.vae_factor for side in clips.shape[-2:])
        flows = []
        for clip in clips.detach().float().transpose(1, 2):
            flow = self.flow(clip[:-1], clip[1:])
            if not isinstance(flow, Tensor) or flow.shape != (len(clip) - 1, 2, *clip.shape[-2:]):
                seen = tuple(flow.shape) if isinstance(flow, Tensor) else type(flow).__name__
                raise ValueError(f"flow must return {(len(clip) - 1, 2, *clip.shape[-2:])}, got {seen}")
            flows.append(resize_flow(flow.to(clip), height, width))
        return torch.stack(flows).to(self._state_dtype)

    @property
    def _prompts(self) -> tuple[Tensor, ...]:
        """The conditional prompt and, where guidance is more than the identity, the unconditional one."""
        return (self.prompt_embeds, self.negative_prompt_embeds) if self._guided else (self.prompt_embeds,)

    @property
    def _state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.unet.dtype, torch.float32)

    def _latent_votes(
        self, clips: Tensor, last: bool, generators: Sequence[torch.Generator], report: Callback | None
    ) -> Tensor:
        """Votes (V, B, 4, F, h, w) of one window of admitted clips, or the last alone."""
        target = self.encode(clips)
        draw = functools.partial(_normal, target, generators)
        if self.config.method != "videopure":
            return self._denoise(target, draw, report)[0]
        if self.config.feedback:
            return self._steered_votes(target, self.latent_flow(clips), report)[-1 if last else 0 :]
        beside = SideStream(clips.device)
        if report is None and not target.requires_grad:
            for walk in self._plan():  # before a capture, which must not make what outlives it
                self._engine.prepare(walk, self._prompts, target)
            prompts = tuple((prompt.data_ptr(), prompt._version) for prompt in self._prompts)
            states, noises = self._engine.captured((self.config, prompts), self._denoise, target)
        else:
            states, noises = self._denoise(target, draw, report)
        with beside:
            flow = self.latent_flow(clips)
        return self.vote(states, noises, target, flow, votes=1 if last else len(states))

    def _steered_votes(self, target: Tensor, flow: Tensor, report: Callback | None) -> Tensor:
        """All votes where each transition of denoising starts from the optimized latents."""
        optimized = []

        def steer(step: int, latents: Tensor, noise: Tensor) -> Tensor:
            coefficients = self._schedule.vote_coefficients()[step]._replace(predicts_x0=False)
            optimized.append(self._guide(latents[None], noise[None], target, flow, [coefficients])[0])
            return optimized[-1]

        states, noises = self._denoise(target, None, report, steer)
        # What was optimized already is only taken to its clean prediction; the final state has its turn now.
        *steps, final = self._schedule.vote_coefficients()
        coefficients = [*(step._replace(update=0.0) for step in steps), final]
        states = torch.stack([*optimized, states[-1]])
        return self._guide(states, torch.cat([noises, noises[-1:]]), target, flow, coefficients)

    def _denoise(
        self,
        target: Tensor,
        draw: Callable[[], Tensor] | None = None,
        report: Callback | None = None,
        steer: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The states of denoising, (steps, B, 4, F, h, w), and the noise predicted at each but the last of them.

        videopure's from the first to the final one; of the baselines the last of both alone.
        """
        inversion, denoising = self._plan()
        guided = self.config.method == "videopure"

        def reporter(stage: str) -> Callback | None:
            return None if report is None else functools.partial(report, stage)

        if inversion:
            options = {"first_frame_noise": guided, "report": reporter("inversion")}
            for _, latents in self.sample(target, inversion, self.config.cfg_inversion, **options):  # noqa: B007
                pass
        else:
            signal, deviation = self._schedule.diffusion()
            latents = signal * target + deviation * draw()
        states, noises = [latents], []
        options = {"draw": draw, "steer": steer, "report": reporter("denoising")}
        for noise, state in self.sample(latents, denoising, self.config.cfg_denoise, **options):
            states = [*states, state] if guided else [state]
            noises = [*noises, noise] if guided else [noise]
        return torch.stack(states), torch.stack(noises)

    def _plan(self) -> tuple[list[SamplerStep], list[SamplerStep]]:
        """The two walks of the configured method; a method without inversion starts from diffused latents."""
        inverts = self.config.method in ("videopure", "ddim_inversion")
        ancestral = self.config.method == "ddpm"
        return (
            self._schedule.inversion() if inverts else [],
            self._schedule.ancestral() if ancestral else self._schedule.denoising(),
        )

    def _admit(self, clips: Tensor) -> Tensor:
        """Checked clips -> the models' device, floats in [0, 1], replicate-padded to multiples of the VAE's factor."""
        least = 2 * self.vae_factor
        if min(clips.shape[-2:]) < least:
            raise ValueError(f"video has shape {tuple(clips.shape)}; this model accepts sides of {least} or more")
        clips = clips.to(self.unet.device, self._state_dtype) / (255 if clips.dtype == torch.uint8 else 1)
        bottom, right = (-side % self.vae_factor for side in clips.shape[-2:])
        if not bottom and not right:
            return clips
        return F.pad(clips.flatten(0, 1), (0, right, 0, bottom), mode="replicate").unflatten(0, clips.shape[:2])

    def _fork(self, generator: Generators, batch: int) -> list[torch.Generator]:
        """One CPU generator a clip, so that its noise depends on no other clip, no batching and no device."""
        if generator is not None and not isinstance(generator, (torch.Generator, list, tuple)):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
        sources = list(generator) if isinstance(generator, (list, tuple)) else [generator] * batch
        if len(sources) != batch:
            raise ValueError(f"got {len(sources)} generators for {batch} clips; accepted: one, or one for each clip")
        if generator is not None and not all(isinstance(source, torch.Generator) for source in sources):
            raise TypeError(f"generators must be torch.Generator, got {[type(g).__name__ for g in sources]}")
        if self.config.method in ("videopure", "ddim_inversion"):
            return []  # deterministic: the caller's generators stay where they are
        forks = []
        for source in sources:
            seed = torch.randint(2**63 - 1, (), generator=source, device="cpu" if source is None else source.device)
            forks.append(torch.Generator().manual_seed(seed.item()))
        return forks


# Values of the VAE's largest activation at once on a CPU: enough work to share, and little enough for its caches. Of
# 2^19 to 2^22, measured with the packaged prior on two cores.
_CPU_ACTIVATION = 2**21


def purify(
    video: Tensor,
    model: str | os.PathLike[str] = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    flow: str | Flow | None = None,
    decoder: str | os.PathLike[str] | None = None,
    config: PurifyConfig | None = None,
    **overrides: Any,
) -> Tensor:
    """Purify clips in one call; the loaded model is kept for the next.

    video: (B, 3, F, H, W) or (3, F, H, W), floats in [0, 1] or uint8. The other arguments are those of
    `Purifier.from_pretrained`; `overrides` are fields of PurifyConfig.
    """
    check_video(video)
    replace_config(PurifyConfig() if config is None else config, overrides)
    options = {"device": device, "dtype": dtype, "flow": flow, "decoder": decoder}
    for name, value in {"model": model, **options}.items():
        try:
            hash(value)
        except TypeError as error:
            seen = f"{name} is a {type(value).__name__}, which has no hash to keep the model by"
            raise TypeError(f"{seen}; Purifier.from_pretrained needs none") from error
    # A copy shares the models, and its settings are its own.
    purifier = copy.copy(_loaded(model, **options))
    purifier.config = replace_config(purifier.config if config is None else config, overrides)
    return purifier(video)


@functools.lru_cache(maxsize=2)
def _loaded(model: str | os.PathLike[str], **options: Any) -> Purifier:
    return Purifier.from_pretrained(model, **options)


def _normal(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of like's shape, each clip's from its own CPU generator."""
    shape = like.shape[1:]
    noise = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
    return torch.stack(noise).to(like)
