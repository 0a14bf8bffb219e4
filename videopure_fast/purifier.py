"""The purifier: encode -> invert -> denoise -> guided votes -> decode (arXiv 2501.14999)."""

from __future__ import annotations

import copy
import logging
import os
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import PurifyConfig
from .inputs import (
    check_callback,
    check_flag,
    check_video,
    gray_video,
    like_video,
    replace_config,
    resolve_device,
    resolve_dtype,
)
from .models.flow import Flow, flow_name, load_flow, no_flow
from .models.hub import HubOptions, commit_hash
from .models.prior import (
    Models,
    Settings,
    find_prior,
    load_decoder,
    load_models,
    models_of_pipe,
    read_settings,
    save_prior,
)
from .models.weights import lay_out_in_place
from .ops import backend
from .runtime import compile_ahead
from .runtime.allocator import tune_allocator
from .runtime.cuda_graph import SideStream
from .runtime.replay import is_observed
from .runtime.spans import progress_bar, unheard
from .sampling import Callback, Generators, copied
from .schedule import without
from .stages import PurifierStages
from .windows import cross_fade, window_starts

if TYPE_CHECKING:
    from .measure.profile import Profile

_logger = logging.getLogger("videopure_fast")
# The kinds of calls of each UNet whose kernels are known to be in Triton's cache, or were left to their launches.
_rehearsed: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


class LatentVotes(NamedTuple):
    """Votes that wait to be decoded: of each window its first frame and its latents (V, B, 4, F, h, w)."""

    video: Tensor
    windows: tuple[tuple[int, Tensor], ...]

    @property
    def num_votes(self) -> int:
        return len(self.windows[0][1])


class WarmUp(NamedTuple):
    """What a warm-up did: GPU kernels compiled beforehand, calls run, and the seconds that all of it took."""

    kernels: int
    calls: int
    seconds: float


class Purifier(PurifierStages):
    """Purifies video clips with a text-to-video diffusion model, frozen and always in eval mode.

    Takes the arguments of `PurifierStages`, whose stages it runs for whole videos.

    Attributes:
        commit_hash: the commit of the Hugging Face repository from which the models were loaded; None for others.
    """

    commit_hash: str | None = None

    @classmethod
    @torch.inference_mode(False)  # weights made in inference mode would shut autograd out for good
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "tiny",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        flow: str | Flow | None = None,
        decoder: str | os.PathLike[str] | None = None,
        config: PurifyConfig | None = None,
        fast: bool = True,
        attention: str = "sdpa",
        capture: bool = True,
        revision: str = "main",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        variant: str | None = None,
        **overrides: Any,
    ) -> Purifier:
        """Load a prior: "tiny" (packaged, offline), a folder, or a Hugging Face text-to-video repository.

        `device` is the accelerator where there is one, else the CPU; `dtype` is float16 on an accelerator, else
        float32. `flow` and `config` are the prior's own; `overrides` are fields of PurifyConfig replaced into it.
        `decoder` is "taesd", for priors with Stable Diffusion's VAE, or a folder or repository with an
        AutoencoderTiny. `fast`, `attention` and `capture` as for a Purifier. FileNotFoundError for a model or network
        that is not there.

        As in diffusers, `torch_dtype` is another name of `dtype`, and of a repository `revision` is the branch, tag or
        commit, `token` the right to read it, `cache_dir` the folder of downloads, and with `local_files_only` nothing
        is asked of the network. `variant`, such as "fp16", chooses weights: of the UNet, and of other parts that have
        it. All but `revision` and `variant` serve the decoder too. `commit_hash` of the purifier is what was loaded.
        """
        place = resolve_device(device)
        dtype = resolve_dtype(torch_dtype if dtype is None else dtype, torch_dtype, place)
        # Whatever can be wrong with the settings is found before a model is loaded.
        replace_config(PurifyConfig() if config is None else config, overrides)
        options = HubOptions(revision, token, cache_dir, local_files_only, variant)
        folder = find_prior(name, options)
        settings = read_settings(folder)
        wanted = settings.flow if flow is None else flow
        if wanted is None:
            raise ValueError(f"{name} was saved with a flow of the caller's own: pass it again as flow=...")
        estimator = load_flow(wanted)
        models = load_models(folder, dtype=dtype, variant=variant)
        options = options._replace(revision="main", variant=None)  # the decoder's
        purifier = cls(
            models.unet,
            models.vae,
            models.prompt_embeds,
            negative_prompt_embeds=models.negative_prompt_embeds,
            flow=estimator,
            config=replace_config(settings.config if config is None else config, overrides),
            scheduler_config=without(settings.scheduler_config, overrides),
            max_frames=settings.max_frames,
            decoder=None if decoder is None else load_decoder(decoder, dtype=dtype, options=options),
            fast=fast,
            attention=attention,
            capture=capture,
        )
        purifier.commit_hash = commit_hash(folder)
        purifier.to(device=place, dtype=dtype)
        if place.type != "cpu":
            for model in (purifier.unet, purifier.vae):
                lay_out_in_place(model)
        return purifier

    @classmethod
    @torch.inference_mode(False)
    def from_pipe(cls, pipe: Any, *, prompt_embeds: Tensor | None = None, **settings: Any) -> Purifier:
        """A purifier of the UNet and VAE of a diffusers pipeline: TextToVideoSDPipeline, or AnimateDiffPipeline.

        It shares them, where and in what dtype they are; they become frozen and stay in eval mode. The pipeline's text
        encoder encodes the empty prompt, in whose place `prompt_embeds` may be given; its scheduler's training schedule
        is read. `settings` are arguments of a Purifier and fields of PurifyConfig; the flow is "raft" by default.
        TypeError or ValueError for a pipeline of other parts.
        """
        models = models_of_pipe(pipe, prompt_embeds)
        scheduler = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
        given: dict[str, Any] = {"flow": "raft", "config": PurifyConfig(), "scheduler_config": scheduler, **settings}
        overrides = {field.name: given.pop(field.name) for field in fields(PurifyConfig) if field.name in given}
        given["config"] = replace_config(given["config"], overrides)
        given["scheduler_config"] = without(given["scheduler_config"], overrides)
        return cls(models.unet, models.vae, models.prompt_embeds, **given)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write everything that `from_pretrained` needs to a new folder; a flow callable of your own is not saved."""
        models = Models(self.unet, self.vae, self.prompt_embeds, self.negative_prompt_embeds)
        save_prior(models, Settings(self.config, flow_name(self.flow), self.max_frames), folder)

    def forward(
        self,
        video: Tensor,
        *,
        return_votes: bool = False,
        generator: Generators = None,
        progress: bool = False,
        callback: Callback | None = None,
        capture: bool | None = None,
    ) -> Tensor:
        """Purify a batch of clips; each clip as if it were alone.

        Args:
            video: (B, 3, F, H, W) or (3, F, H, W); floats in [0, 1] or uint8; F >= 2, H and W >= 16.
            return_votes: return all V votes, T + 2 for videopure and 1 for the baselines.
            generator: randomness of "ddim" and "ddpm": one generator, or one for each clip. The same seeds give the
                same noise for any batching and any device.
            progress: show a progress bar over UNet evaluations; captured ones advance it together.
            callback: called as (stage, step, timestep, latents) after each step; stage "inversion" or "denoising",
                latents (B, 4, F, h, w). Do not modify them. It needs eager steps: nothing is captured, which on a GPU
                takes twice the time. It is called for all steps again where a write through `.data` is seen late.
            capture: overrides the purifier's own setting for this call.

        Returns the last vote, or with `return_votes` (B, V, 3, F, H, W) (no B for an unbatched clip), in the video's
        dtype, device and range. Gradients flow if grad mode is on and `video.requires_grad`; the backward pass is the
        caller's, and runs under the caller's TF32 settings.
        """
        votes = self._votes_maker(video, not return_votes, generator, progress, callback, capture)
        found = self._computed(lambda: self._decode_votes(votes()), video)
        return found if return_votes else found.select(-5, 0)

    def latent_votes(
        self,
        video: Tensor,
        *,
        last: bool = False,
        generator: Generators = None,
        progress: bool = False,
        callback: Callback | None = None,
        capture: bool | None = None,
    ) -> LatentVotes:
        """The votes of a batch before they are decoded, or the last alone; keywords and gradients as in a call."""
        return self._computed(self._votes_maker(video, last, generator, progress, callback, capture), video)

    def _votes_maker(
        self,
        video: Tensor,
        last: bool,
        generator: Generators,
        progress: bool,
        callback: Callback | None,
        capture: bool | None,
    ) -> Callable[[], LatentVotes]:
        """What makes the votes of a call whose arguments are right."""
        check_video(video)
        check_callback(callback)
        capture = self.capture if capture is None else check_flag("capture", capture)
        generators = self._generators(generator, len(video) if video.ndim == 5 else 1)

        def make() -> LatentVotes:
            drawn = copied(generators)  # on through the windows
            clips = self._preprocess(video if video.ndim == 5 else video[None])
            self._compile_ahead(clips.shape, last=last, progress=progress)
            starts = window_starts(clips.shape[2], self.max_frames, self.config.window_overlap)
            what = f"{self.config.method} {len(clips)}x{'x'.join(map(str, clips.shape[2:]))}"
            with progress_bar(what, len(starts) * self.evaluations, enabled=progress):
                windows = (clips[:, :, start : start + self.max_frames] for start in starts)
                votes = [self._window_votes(window, last, drawn, callback, capture) for window in windows]
            return LatentVotes(video, tuple(zip(starts, votes, strict=True)))

        return make

    def decode_votes(self, latent_votes: LatentVotes, votes: slice = slice(None)) -> Tensor:
        """Clips of some of the votes, (B, votes, 3, F, H, W), or without B for an unbatched clip, like the video.

        The models must be as they were when the votes were made: they are not looked at again for every slice.
        """
        if not isinstance(votes, slice) or not range(latent_votes.num_votes)[votes]:
            raise ValueError(f"votes must be a slice of one or more of {latent_votes.num_votes} votes, got {votes!r}")
        return self._checked(lambda: self._decode_votes(latent_votes, votes), latent_votes.video)

    def _decode_votes(self, latent_votes: LatentVotes, votes: slice = slice(None)) -> Tensor:
        video, starts = latent_votes.video, [start for start, _ in latent_votes.windows]
        windows = (self._decode(latents[votes]) for _, latents in latent_votes.windows)
        if len(starts) == 1:
            clips = next(windows)
        else:
            clips = torch.cat(list(cross_fade(windows, starts, self.config.window_overlap)), -3).clamp(0, 1)
        clips = like_video(clips.transpose(0, 1), video)
        return clips if video.ndim == 5 else clips[0]

    def warmup(
        self, shape: Sequence[int], *, return_votes: bool = True, progress: bool = False, capture: bool | None = None
    ) -> WarmUp:
        """Make everything that a call makes once, so that the next one on a video of this shape is a fast one.

        On a GPU the kernels that its cache on disk lacks are compiled, side by side in processes, and the call is run
        and captured. On a CPU it is run, and once more where it can be recorded.

        Args:
            shape: the video's, (B, 3, F, H, W) or (3, F, H, W): what a service batches, another shape is as cold.
            return_votes, progress, capture: as in the calls to come. Those of a DefendedClassifier return votes.
        """
        began = time.perf_counter()
        video = gray_video(shape)
        check_flag("return_votes", return_votes)
        check_flag("progress", progress)
        self._refresh()
        calls = 0
        with torch.no_grad():
            with self._inference(video):
                clips = self._preprocess(video if video.ndim == 5 else video[None])
                kernels = self._compile_ahead(clips.shape, last=not return_votes, progress=progress)
            while not calls or (calls == 1 and self._captures.records_next):
                self(video, return_votes=return_votes, progress=progress, capture=capture)
                calls += 1
        if self._executor.device.type == "cuda":
            torch.cuda.synchronize(self._executor.device)
        return WarmUp(kernels, calls, time.perf_counter() - began)

    def profile(
        self, video: Tensor, *, return_votes: bool = True, trace: str | os.PathLike[str] | None = None
    ) -> Profile:
        """Where the time of a call goes: `print` the result for a table, or take its `to_json()` or `to_dict()`.

        Runs the call several times, without gradients: first as it is, then each stage to its end. A stage has its
        time, launches, FLOPs, the fraction achieved of what this device's matrix products and copies allow, which are
        measured along with it, and its peak memory.

        Args:
            video: the video of a call.
            return_votes: decode all votes, as a DefendedClassifier needs them, or the last alone.
            trace: also write a torch.profiler trace of eager steps to this file, for chrome://tracing or Perfetto.
        """
        from .measure.profile import profile

        return profile(self, video, return_votes=return_votes, trace=trace)

    def _preprocess(self, clips: Tensor) -> Tensor:
        """Checked clips -> the models' device, floats in [0, 1], replicate-padded to multiples of the VAE's factor."""
        least = 2 * self.vae_factor
        if min(clips.shape[-2:]) < least:
            raise ValueError(f"video has shape {tuple(clips.shape)}; this model accepts sides of {least} or more")
        if self._executor.device.type == "cpu":
            tune_allocator()
        device, dtype, most = self._executor.device, self._state_dtype, 255 if clips.dtype == torch.uint8 else 1
        if clips.itemsize < dtype.itemsize:  # torch widens before it copies to another device: more bytes to copy
            clips = clips.to(device)
        clips = clips.to(device, dtype) / most
        bottom, right = (-side % self.vae_factor for side in clips.shape[-2:])
        if not bottom and not right:
            return clips
        return F.pad(clips.flatten(0, 1), (0, right, 0, bottom), mode="replicate").unflatten(0, clips.shape[:2])

    def _compile_ahead(self, shape: Sequence[int], *, last: bool, progress: bool) -> int:
        """Before the first call of a kind on a GPU, compile together the kernels that its cache lacks, if many.

        shape: of the preprocessed clips. Returns how many were compiled.
        """
        device = self._executor.device
        clips, channels, frames, *sides = shape
        window = (clips, channels, min(frames, self.max_frames), *sides)
        kind = (window, last, self.config, self._executor.dtype, device, backend.in_use())
        known = _rehearsed.setdefault(self.unet, set())
        if kind in known or not compile_ahead.serves(device) or is_observed():
            return 0
        known.add(kind)
        try:
            with compile_ahead.recorded(device) as kernels, unheard(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the call itself says it again
                self._rehearse(window, last)
        except Exception as error:  # of a model or a Triton unlike those known: the launches compile, one by one
            _logger.debug("which kernels a call needs is not known: %s", error)
            return 0
        missing = [kernel for kernel in kernels if not kernel.cached]
        if len(missing) < compile_ahead.LEAST_KERNELS:
            return 0
        _logger.warning("compiling %d GPU kernels, once; Triton keeps them on disk", len(missing))
        with tqdm(total=len(missing), desc="compiling", unit="kernel", disable=not progress) as bar:
            return compile_ahead.compile_kernels(missing, bar.update)

    def _rehearse(self, shape: tuple[int, ...], last: bool) -> None:
        """Do what a call does with a window of preprocessed clips, on a copy on the meta device, in as few steps."""
        memo: dict[int, Any] = {id(self.flow): no_flow}
        memo |= {id(tensor): tensor.detach().to("meta") for tensor in (*self.parameters(), *self.buffers())}
        twin = copy.deepcopy(self, memo)
        if len(self._prompts) == 1:
            twin.negative_prompt_embeds = None
        chunk = self._frames_at_once(*shape[-2:])
        twin.config = replace(self.config, inversion_steps=0, decode_chunk=chunk)
        generators = [torch.Generator()] * shape[0] if self.properties["randomized"] else []
        clips = torch.empty(shape, dtype=self._state_dtype, device="meta")
        latents = twin._window_votes(clips, last, generators, None, capture=False)
        votes = 1 if last or self.config.method != "videopure" else len(self._schedule.vote_coefficients())
        twin._decode(latents[:1].expand(votes, *latents.shape[1:]))

    def _window_votes(
        self,
        clips: Tensor,
        last: bool,
        generators: Sequence[torch.Generator],
        callback: Callback | None,
        capture: bool,
    ) -> Tensor:
        """Votes (V, B, 4, F, h, w) of one window of preprocessed clips, or the last alone."""
        target = self._encode(clips)
        if self.config.feedback:
            return self._feedback_votes(target, self._latent_flow(clips), callback)[-1 if last else 0 :]
        beside = SideStream(clips.device)
        states, noise_preds = self._run_chain(target, generators, callback, capture)
        if self.config.method != "videopure":
            return states
        with beside:
            flow = self._latent_flow(clips)
        flow = beside.hand_over(flow)
        coefficients = self._schedule.vote_coefficients()
        return self._vote(states, noise_preds, target, flow, coefficients, 1 if last else None)
