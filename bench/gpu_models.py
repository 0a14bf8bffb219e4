"""The models and clips that bench/gpu.py measures, and the gate: votes must be as near to float32's as the authors'.

Weights are random, in the shape of ModelScope's text-to-video UNet and Stable Diffusion's VAE, made on the device in
float16. A quick run takes the packaged models' shapes.
"""

from __future__ import annotations

import copy
import gc
import sys
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from baselines import PATHS
from diffusers import AutoencoderKL, UNet3DConditionModel
from gpu_runner import GateFailed
from torch import Tensor, nn

from videopure_fast import Purifier, PurifyConfig
from videopure_fast.models.flow import RaftFlow
from videopure_fast.tiny.models import UNET_CONFIG, VAE_CONFIG

DTYPE = torch.float16
FULL_UNET = {}  # diffusers' defaults are ModelScope's
FULL_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
TOKENS = 77

# Errors against float32 that are accepted, as multiples of the authors' in the same precision.
MAX_RELATIVE_ERROR = 1.25
LARGE_ERROR, SHARE_SLACK = 0.05, 1e-4
# The gate means nothing if the authors' votes are this far from float32's, or if float32's are this flat.
MAX_AUTHORS_ERROR, MIN_DEVIATION = 0.05, 1e-3


class Workload(NamedTuple):
    """Clips of a call; flow: "given", which costs next to nothing, or "raft"."""

    clips: int
    frames: int
    height: int
    width: int
    flow: str = "given"

    def __str__(self) -> str:
        shape = "x".join(map(str, self[:4]))
        return shape if self.flow == "given" else f"{self.flow} flow, {shape}"


class Error(NamedTuple):
    """Absolute errors of votes against float32: their mean, and the share above LARGE_ERROR."""

    mean: float
    share: float


class BenchModels:
    """The models under test, made when first asked for, their inputs, and the votes they are checked against."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick

    @cached_property
    def models(self) -> tuple[nn.Module, nn.Module, Tensor]:
        """UNet, VAE and prompt embeddings (1, 77, D)."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with self.device:
                unet = redraw_zeros(UNet3DConditionModel(**(UNET_CONFIG if self.quick else FULL_UNET)))
                vae = redraw_zeros(AutoencoderKL(**(VAE_CONFIG if self.quick else FULL_VAE)))
                prompt = torch.randn(1, TOKENS, unet.config.cross_attention_dim)
                calibrate(unet, vae, prompt, torch.rand(2, 3, 64, 64))
        finally:
            torch.set_default_dtype(before)
        return unet, vae, prompt

    @cached_property
    def raft(self) -> RaftFlow:
        from torchvision.models.optical_flow import raft_large

        torch.manual_seed(0)
        return RaftFlow(raft_large(weights=None).to(self.device))

    def purifier(
        self,
        workload: Workload,
        dtype: torch.dtype = DTYPE,
        *,
        fast: bool = False,
        decoder: nn.Module | None = None,
    ) -> Purifier:
        """A purifier over the models; another dtype takes copies of them. fast: on our models, else on diffusers'.

        Weights over images are laid out in place as each wants them: channels last, as `from_pretrained` leaves them,
        or else as diffusers loads them.
        """
        unet, vae, prompt = self.models
        if dtype != DTYPE:
            unet, vae = (copy.deepcopy(module).to(dtype) for module in (unet, vae))
        for module in (*unet.modules(), *vae.modules()):
            if isinstance(module, nn.Conv2d):
                layout = torch.channels_last if fast else torch.contiguous_format
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        config = PurifyConfig(inversion_steps=1 if self.quick else 5, window_overlap=0)
        if self.quick:  # one flipped sign among so few latents would fail the gate
            config = replace(config, temporal_weight=0.1 * config.temporal_weight)
        return Purifier(
            unet,
            vae,
            prompt,
            flow=self.raft if workload.flow == "raft" else rotation_flow,
            config=config.rescaled(workload.frames, workload.height // factor, workload.width // factor),
            max_frames=workload.frames,
            decoder=decoder,
            fast=fast,
        )

    def clips(self, workload: Workload, seeds: range | tuple[int, ...] | None = None) -> Tensor:
        """(B, 3, F, H, W), uniform in [0, 1), a clip for each seed; default: 0, 1, ... for each of the workload."""
        shape = (3, workload.frames, workload.height, workload.width)
        seeds = range(workload.clips) if seeds is None else seeds
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def expected(self, workload: Workload) -> dict[int, tuple[Tensor, Error]]:
        """What the first and the last clip of a workload are checked against, by seed: see `expected_of_clip`."""
        alone = workload._replace(clips=1)
        return {seed: self.expected_of_clip(alone, seed) for seed in sorted({0, workload.clips - 1})}

    @cache  # noqa: B019  (one object lives as long as the script)
    def expected_of_clip(self, workload: Workload, seed: int) -> tuple[Tensor, Error]:
        """Votes of one clip in float32, on the CPU, and the error of the authors' algorithm in half precision.

        GateFailed where either says nothing about what is measured.
        """
        clip = self.clips(workload, (seed,))
        votes = self.purifier(workload, torch.float32)(clip, return_votes=True).cpu()
        self.free_memory()
        if not votes.isfinite().all() or votes.std() < MIN_DEVIATION:
            raise GateFailed(
                f"the float32 votes have a standard deviation of {votes.std():.1e}, needed: {MIN_DEVIATION:.0e} or more"
            )
        error = error_of(PATHS["authors"](self.purifier(workload))(clip), votes)
        if not error.mean <= MAX_AUTHORS_ERROR:
            raise GateFailed(
                f"the authors' algorithm in half precision has a mean error of {error.mean:.1e}, too large to compare "
                f"others with; needed: {MAX_AUTHORS_ERROR} or less"
            )
        return votes, error

    def check_votes(self, workload: Workload, votes: Tensor) -> dict[str, float]:
        """GateFailed unless the first and the last clip's votes (V, 3, F, H, W) are correct; else the larger error."""
        worst = {"mean_error": 0.0, "mean_error_of_authors": 0.0}
        for seed, (expected, authors) in self.expected(workload).items():
            if votes[seed].shape != expected[0].shape:
                raise GateFailed(f"votes of a clip are {tuple(votes[seed].shape)}, expected {tuple(expected[0].shape)}")
            error = error_of(votes[seed : seed + 1], expected)
            for name, seen, limit in (
                ("mean error", error.mean, MAX_RELATIVE_ERROR * authors.mean),
                (f"share of errors over {LARGE_ERROR}", error.share, MAX_RELATIVE_ERROR * authors.share + SHARE_SLACK),
            ):
                if not seen <= limit:
                    raise GateFailed(f"clip {seed}: {name} against float32 is {seen:.3g}, accepted: {limit:.3g}")
            if error.mean >= worst["mean_error"]:
                worst = {"mean_error": error.mean, "mean_error_of_authors": authors.mean}
        return worst

    def free_memory(self) -> None:
        """Free what a row left behind, so that the next row's peak memory is its own."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def error_of(votes: Tensor, expected: Tensor) -> Error:
    error = (votes.float().cpu() - expected).abs()
    return Error(error.mean().item(), (error > LARGE_ERROR).float().mean().item())


def describe(workload: Workload) -> dict[str, Any]:
    """A workload's fields in a row."""
    return {**workload._asdict(), "dtype": name_of(DTYPE)}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def redraw_zeros(module: nn.Module) -> nn.Module:
    """The module, frozen; parameters that diffusers starts at zero are drawn, as they hide the layers before them."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def calibrate(unet: nn.Module, vae: nn.Module, prompt: Tensor, frames: Tensor) -> None:
    """Scale the last layers so that latents and noise have deviation 1, and images 0.25, as trained models' have.

    Otherwise the guidance would be as large as the latents, and its signs, which rounding flips, would decide a vote.
    frames: (F, 3, H, W) in [0, 1].
    """
    latents = vae.encode(2 * frames - 1).latent_dist.mode()
    _scale(vae.quant_conv, 1 / (vae.config.scaling_factor * latents.std()))
    latents = vae.encode(2 * frames - 1).latent_dist.mode() * vae.config.scaling_factor
    _scale(unet.conv_out, 1 / unet(latents.transpose(0, 1)[None], 1, prompt).sample.std())
    _scale(vae.decoder.conv_out, 0.5 / vae.decode(latents / vae.config.scaling_factor).sample.std())


def _scale(layer: nn.Module, factor: Tensor) -> None:
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


def rotation_flow(prev: Tensor, next: Tensor) -> Tensor:
    """A rotation by a few pixels about the middle, whatever the frames (N, 3, H, W) -> (N, 2, H, W) in pixels."""
    height, width = prev.shape[-2:]
    y = torch.linspace(-4, 4, height, device=prev.device)[:, None].expand(height, width)
    x = torch.linspace(-4, 4, width, device=prev.device).expand(height, width)
    return torch.stack([-y, x]).expand(len(prev), 2, height, width)
