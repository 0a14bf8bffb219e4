import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ["COLUMNS"] = "200"  # wide enough for every table, whatever the terminal: rich reads it when it is imported

import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel

from videopure_fast import Purifier, PurifyConfig, sampling
from videopure_fast.ops.backend import full_float32

# A shell starts what it runs in the background with SIGINT ignored, and tests of Ctrl-C send it to this process.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

UNET = {
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


TINY_DECODER = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def shift_flow(prev, next):
    """A flow estimator that depends on the frames, and on nothing else."""
    motion = (next - prev).mean((1, 2, 3))
    return motion.view(-1, 1, 1, 1).expand(-1, 2, *prev.shape[-2:]) * 40


def build_purifier(*, dtype=torch.float32, max_frames=8, prompts=1, flow=shift_flow, fast=True, **config):
    """A small random purifier. Layers that diffusers starts at zero are drawn anew: they would hide the time axis."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        unet, vae = UNet3DConditionModel(**UNET), AutoencoderKL(**VAE)
        for parameter in unet.parameters():
            if parameter.count_nonzero() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
        embeds = torch.randn(prompts, 1, 3, 8)
    config = {"inversion_steps": 1, "spatial_weight": 20.0, "temporal_weight": 0.2, "window_overlap": 2} | config
    return Purifier(
        unet,
        vae,
        embeds[0],
        negative_prompt_embeds=embeds[1] if prompts == 2 else None,
        flow=flow,
        config=PurifyConfig(**config),
        max_frames=max_frames,
        fast=fast,
    ).to(dtype)


def rebuilt(purifier, **options):
    """Another purifier of the same models and settings."""
    settings = {"flow": purifier.flow, "config": purifier.config, "max_frames": purifier.max_frames, **options}
    return Purifier(purifier.unet, purifier.vae, purifier.prompt_embeds, **settings)


def walk(purifier, latents, steps, guidance_scale, *, first_frame_noise=False, noise_sampler=None):
    """All states of a loop over `steps`, the first included, and all noise predictions, at float32 that is float32."""
    unet = purifier._executor.unet
    with full_float32(latents.device):
        tables = sampling.prepare(unet, steps, purifier._prompts, guidance_scale, latents)
        if not first_frame_noise:
            states, noise_preds = sampling.denoise(unet, latents, tables, noise_sampler=noise_sampler)
            return list(states), list(noise_preds)
        states = [latents]
        sampling.invert(unet, latents, tables, first_frame_noise=True, callback=lambda *step: states.append(step[3]))
        predicted = (sampling.predict_noise(unet, z, tables, i, first_frame=True) for i, z in enumerate(states[:-1]))
        return states, [noise_pred.expand_as(latents) for noise_pred in predicted]


class Classifier(torch.nn.Module):
    """A small random classifier of 3 classes."""

    def __init__(self, seed=1):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features, self.head = torch.nn.Conv3d(3, 6, 3, stride=2), torch.nn.Linear(6, 3)

    def forward(self, x):
        return 50 * self.head(torch.tanh(4 * self.features(x - 0.5)).mean((2, 3, 4)))


def run_main(monkeypatch, capsys, *arguments):
    """The exit status and what the whole program prints: (status, stdout, stderr)."""
    from videopure_fast import cli

    monkeypatch.setattr(sys, "argv", ["videopure-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, *capsys.readouterr()


def run_in_threads(count, run):
    """run(i) for i in range(count), each in a thread of its own, to the end; an error in one is raised here."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))


def clips(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def purifier():
    return build_purifier()
