"""Train the packaged classifier, VAE and UNet from scratch: `python -m videopure_fast.tiny.train --help`.

Seeded; takes an hour or more on two CPU cores. Every step draws new clips, from seeds that no test, demo or study
uses. The UNet is trained to purify, not to generate: it learns the first 300 of the 1000 timesteps, the ones that
purification uses.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..config import PurifyConfig
from ..purifier import Purifier
from ..schedule import Schedule
from .clips import FRAMES, SIZE, sample_clips
from .models import UNET_CONFIG, VAE_CONFIG, ActionClassifier

_SEED = 7_000_000  # step s of a stage draws clips with seed _SEED + offset of the stage + s
_MAX_TIMESTEP = 300  # the UNet is trained on timesteps below
# Guidance weights, as a share of those of the full-size model after rescaling. Chosen among 0, 0.5, 1, 2 and 4 on 96
# attacked clips of seed 777: robust accuracy fell with every increase, a little up to 0.5 and much from 1 on.
_GUIDANCE_SHARE = 0.5


def fit(
    name: str, model: nn.Module, loss: Callable[[int], Tensor], *, steps: int, lr: float, decay: float = 1e-2
) -> nn.Module:
    """Train with AdamW, warm-up and cosine decay, on `loss(step)`.

    lr: largest learning rate; decay: weight decay. Returns the exponential moving average of the weights, in eval mode.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    smooth = None
    progress = tqdm(range(steps), desc=name, mininterval=10)
    for step in progress:
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        progress.set_postfix(loss=f"{smooth:.5f}", refresh=False)
    return average.module.eval()


def train_classifier(steps: int) -> nn.Module:
    """A classifier of clips, trained on 32 of them a step."""
    model = ActionClassifier()

    def loss(step: int) -> Tensor:
        clips, labels = sample_clips(32, _SEED + step)
        return F.cross_entropy(model(clips), labels)

    return fit("classifier", model, loss, steps=steps, lr=2e-3)


def train_vae(steps: int) -> AutoencoderKL:
    """A VAE of frames, trained on 4 frames of 16 clips a step. Its scaling factor gives latents unit variance."""
    model = AutoencoderKL(**VAE_CONFIG)
    with torch.no_grad():  # start with a small posterior variance: with a large one the KL term prevents reconstruction
        model.quant_conv.bias[VAE_CONFIG["latent_channels"] :] = -6.0

    def loss(step: int) -> Tensor:
        clips, _ = sample_clips(16, _SEED + 1_000_000 + step)
        frames = clips[:, :, torch.randperm(clips.shape[2])[:4]].transpose(1, 2).flatten(0, 1)
        posterior = model.encode(2 * frames - 1).latent_dist
        restored = model.decode(posterior.sample()).sample / 2 + 0.5
        return F.mse_loss(restored, frames) + 1e-6 * posterior.kl().mean()

    model = fit("vae", model, loss, steps=steps, lr=2e-3)
    clips, _ = sample_clips(64, _SEED - 1)
    frames = clips.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        latents = model.encode(2 * frames - 1).latent_dist.mode()
        restored = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    print(f"vae: {-10 * F.mse_loss(restored, frames).log10():.2f} dB, scaling factor {model.config.scaling_factor}")
    return model


def train_unet(vae: AutoencoderKL, steps: int) -> UNet3DConditionModel:
    """A UNet that predicts the noise in latents of the VAE, without a prompt."""
    model = UNet3DConditionModel(**UNET_CONFIG).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    prompt = torch.zeros(1, 1, UNET_CONFIG["cross_attention_dim"])
    alphas_cumprod = torch.tensor(Schedule(PurifyConfig()).alphas_cumprod)

    def loss(step: int) -> Tensor:
        # Train on 16 crops of 8x8 latents for three quarters of the steps, then on 4 whole latents of 16x16. Both cost
        # the same.
        whole = step >= 0.75 * steps
        clips, _ = sample_clips(4 if whole else 8, _SEED + 2_000_000 + step)
        latents = encode(vae, clips)
        if not whole:
            corners = torch.randint(0, 9, (16, 2)).tolist()
            latents = torch.stack([latents[i // 2, ..., y : y + 8, x : x + 8] for i, (y, x) in enumerate(corners)])
        batch = len(latents)
        latents = torch.where(torch.rand(batch, 1, 1, 1, 1) < 0.5, latents.flip(2), latents)  # half of them in reverse
        # Draw small timesteps more often than large ones: purification uses them most.
        timesteps = (_MAX_TIMESTEP * torch.rand(batch) ** 1.5).long()
        level = alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        return F.mse_loss(model(noisy, timesteps, prompt.expand(batch, -1, -1)).sample, noise)

    return fit("unet", model, loss, steps=steps, lr=2e-3)


@torch.no_grad()
def encode(vae: AutoencoderKL, clips: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [0, 1] -> scaled latents (B, 4, F, H/2, W/2)."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    latents = vae.encode(2 * frames - 1).latent_dist.mode() * vae.config.scaling_factor
    return latents.unflatten(0, (len(clips), -1)).transpose(1, 2)


def save(model: AutoencoderKL | UNet3DConditionModel, folder: Path) -> None:
    """Save a model in half precision; the folder appears when it is complete."""
    unfinished = folder.with_suffix(".unfinished")
    model.half().save_pretrained(unfinished)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished stages, which are not redone")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the finished prior and classifier")
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--unet-steps", type=int, default=2000)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already; give a new folder")
    options.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(_SEED)
    classifier_file = options.work / "classifier.safetensors"
    if not classifier_file.exists():
        classifier = train_classifier(options.classifier_steps)
        save_file(classifier.state_dict(), classifier_file)
    torch.manual_seed(_SEED + 1)
    if not (options.work / "vae").exists():
        save(train_vae(options.vae_steps), options.work / "vae")
    vae = AutoencoderKL.from_pretrained(options.work / "vae").eval()
    torch.manual_seed(_SEED + 2)
    if not (options.work / "unet").exists():
        save(train_unet(vae, options.unet_steps), options.work / "unet")
    unet = UNet3DConditionModel.from_pretrained(options.work / "unet")

    prompt = torch.zeros(1, 1, UNET_CONFIG["cross_attention_dim"])
    config = PurifyConfig().rescaled(FRAMES, SIZE // 2, SIZE // 2)
    config = replace(
        config,
        spatial_weight=_GUIDANCE_SHARE * config.spatial_weight,
        temporal_weight=_GUIDANCE_SHARE * config.temporal_weight,
        window_overlap=2,  # in proportion to the overlap of the full-size model's windows
    )
    purifier = Purifier(unet, vae, prompt, flow="dis", config=config, max_frames=FRAMES)
    purifier.half().save_pretrained(options.out)
    shutil.copy(classifier_file, options.out)
    print(f"wrote {options.out}: {sum(f.stat().st_size for f in options.out.rglob('*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
