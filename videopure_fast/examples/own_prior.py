"""Purify with a prior of your own: any UNet3DConditionModel and AutoencoderKL of diffusers, saved and loaded again.

    python -m videopure_fast.examples.own_prior NEW_FOLDER

The models made here are untrained, to show the calls: what they return is noise. Put trained ones in their place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel

from videopure_fast import Purifier, PurifyConfig


def build_purifier() -> Purifier:
    """A purifier of clips of 8 frames, with a VAE that halves each side and a UNet of two levels."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
    )
    unet = UNet3DConditionModel(
        down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
        up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"],
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    # The text encoder's embedding of the prompt, (1, tokens, cross_attention_dim). The paper's prompt is empty.
    prompt_embeds = torch.zeros(1, 1, 16)
    # The guidance weights fit the paper's latents of 32x28x28; here a clip of 8x32x32 has latents of 8x16x16.
    config = PurifyConfig(inversion_steps=2).rescaled(8, 16, 16)
    return Purifier(unet, vae, prompt_embeds, flow="dis", config=config, max_frames=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder for the prior")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    purifier = build_purifier()
    purifier.save_pretrained(options.folder)  # weights, configurations, prompt, and the flow's name
    loaded = Purifier.from_pretrained(options.folder, device="cpu")

    clips = torch.rand(2, 3, 8, 32, 32)
    purified = loaded(clips, progress=True)
    assert torch.equal(purified, purifier(clips))
    print(f"{options.folder}: {loaded.config.method}, T={loaded.config.inversion_steps}, {tuple(purified.shape)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # a sentence says what is wrong
        raise SystemExit(f"error: {error}") from error
