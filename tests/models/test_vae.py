"""The VAE's configuration: shifts and scales of latents are honored, what a purification cannot honor is refused."""

import copy
import math

import pytest
import torch
from conftest import TINY_DECODER, build_purifier, clips
from diffusers import AutoencoderKL, AutoencoderTiny, UNetMotionModel

from videopure_fast import Purifier
from videopure_fast.models.vae import scale_latents, unscale_latents

MEAN, STD = [0.3, -0.2, 0.1, 0.5], [2.0, 0.5, 1.5, 1.0]


def configured(purifier, *, fast=True, **settings):
    """A purifier like this one, whose VAE has other settings."""
    vae = copy.deepcopy(purifier.vae)
    vae.register_to_config(**settings)
    return Purifier(purifier.unet, vae, purifier.prompt_embeds, config=purifier.config, max_frames=8, fast=fast)


def images(purifier, clip):
    return (2 * clip - 1).transpose(1, 2).flatten(0, 1).to(purifier.vae.dtype)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("settings", [{}, {"shift_factor": 0.5}, {"latents_mean": MEAN, "latents_std": STD}])
def test_latents_are_shifted_and_scaled_as_diffusers_pipelines_do(settings, fast):
    purifier = configured(build_purifier(dtype=torch.float64), fast=fast, scaling_factor=0.7, **settings)
    clip = clips(2, 3, 3, 16, 16, dtype=torch.float64)
    means = purifier.vae.encode(images(purifier, clip)).latent_dist.mode()
    if "latents_mean" in settings:
        mean, std = (torch.tensor(value, dtype=torch.float64).view(1, 4, 1, 1) for value in (MEAN, STD))
        expected = (means - mean) * 0.7 / std
    else:
        expected = (means - settings.get("shift_factor", 0)) * 0.7
    latents = purifier.encode(clip)
    torch.testing.assert_close(latents, expected.unflatten(0, (2, 3)).transpose(1, 2), rtol=0, atol=1e-12)
    decoded = (purifier.vae.decode(means).sample / 2 + 0.5).clamp(0, 1).unflatten(0, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(purifier.decode(latents), decoded, rtol=0, atol=1e-10)
    votes = purifier.decode(torch.stack([latents, latents.flip(1)]))
    torch.testing.assert_close(votes[0], decoded, rtol=0, atol=1e-10)


def test_settings_of_latents_reach_the_result():
    purifier = build_purifier(inversion_steps=0)
    clip = clips(1, 3, 4, 16, 16)
    plain = configured(purifier)(clip)
    assert torch.equal(configured(purifier, shift_factor=0.0)(clip), plain)
    for settings in ({"shift_factor": 0.5}, {"latents_mean": MEAN, "latents_std": STD}):
        assert not torch.allclose(configured(purifier, **settings)(clip), plain, atol=1e-4)
    late = configured(purifier)
    late(clip)
    late.vae.register_to_config(shift_factor=0.5)
    assert torch.equal(late(clip), configured(purifier, shift_factor=0.5)(clip))


def test_the_decoder_has_a_scale_and_shift_of_its_own():
    purifier = configured(build_purifier(), shift_factor=0.5)
    purifier.decoder = AutoencoderTiny(**TINY_DECODER, scaling_factor=2.0, shift_factor=0.25)
    latents = clips(1, 4, 3, 8, 8)
    expected = purifier.decoder.decode(latents[0].transpose(0, 1) / 2 + 0.25).sample / 2 + 0.5
    torch.testing.assert_close(purifier.decode(latents)[0], expected.clamp(0, 1).transpose(0, 1), rtol=0, atol=1e-6)


def test_unscaling_is_the_inverse_in_every_dtype():
    config = AutoencoderKL(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5).config
    for dtype, atol in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        means = clips(2, 3, 4, 5, 6, dtype=dtype)
        latents = scale_latents(means, config)
        assert latents.dtype == dtype
        torch.testing.assert_close(unscale_latents(latents, config), means, rtol=0, atol=atol)


BAD_VAES = {
    "scaling_factor": [0, -1.0, math.nan, math.inf, True, "0.18", None, 10**400, 1e300, 1e-300],
    "shift_factor": [math.nan, math.inf, "0.5", 10**400, 1e300, [0.1]],
    "latents_mean": [MEAN, [0.1]],  # without the other
    "latents_std": [STD, [0.0] * 4],
    "in_channels": [4],
    "out_channels": [1],
}


@pytest.mark.parametrize("field", BAD_VAES)
def test_what_cannot_be_honored_is_refused(purifier, field):
    for value in BAD_VAES[field]:
        with pytest.raises(ValueError, match=field):
            configured(purifier, **{field: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latents_mean": MEAN, "latents_std": STD[:3]}, "latents_std"),
        ({"latents_mean": MEAN, "latents_std": [1.0, 1.0, 1.0, 0.0]}, "4 positive numbers"),
        ({"latents_mean": [math.nan] * 4, "latents_std": STD}, "4 finite numbers"),
        ({"latents_mean": 0.5, "latents_std": 1.0}, "latents_mean is 0.5"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "one of them"),
    ],
)
def test_means_and_deviations_go_together(purifier, settings, words):
    with pytest.raises(ValueError, match=words):
        configured(purifier, **settings)


def test_decoders_that_do_not_fit_are_refused(purifier):
    for settings, words in (
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor must be 2"),
        ({"out_channels": 4}, "out_channels must be 3"),
        ({"scaling_factor": 0.0}, "decoder's scaling_factor"),
        ({"shift_factor": math.nan}, "decoder's shift_factor"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder = AutoencoderTiny(**TINY_DECODER | settings)
            Purifier(purifier.unet, purifier.vae, purifier.prompt_embeds, decoder=decoder, max_frames=8)
    with pytest.raises(TypeError, match="pass that one as decoder"):
        Purifier(purifier.unet, AutoencoderTiny(**TINY_DECODER), purifier.prompt_embeds, max_frames=8)


@pytest.mark.parametrize(
    "settings",
    [
        {"time_cond_proj_dim": 8},
        {"addition_embed_type": "text_time"},
        {"encoder_hid_dim_type": "ip_image_proj"},
        {"class_embed_type": "timestep"},
        {"out_channels": 8},
    ],
)
def test_unets_that_want_more_than_a_prompt_are_refused(purifier, settings):
    unet = copy.deepcopy(purifier.unet)
    unet.register_to_config(**settings)
    with pytest.raises(ValueError, match="condition beside the prompt|the UNet returns 8"):
        Purifier(unet, purifier.vae, purifier.prompt_embeds, max_frames=8)


def test_a_motion_model_names_its_condition():
    blocks = {"down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"], "block_out_channels": [8]}
    small = {"norm_num_groups": 4, "cross_attention_dim": 8, "num_attention_heads": 2, "motion_num_attention_heads": 2}
    unet = UNetMotionModel(**blocks, **small, time_cond_proj_dim=4)
    with pytest.raises(ValueError, match="time_cond_proj_dim is 4"):
        Purifier(unet, build_purifier().vae, torch.zeros(1, 3, 8), max_frames=8)
