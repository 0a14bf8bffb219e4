"""What is not finite never leaves a purifier."""

from __future__ import annotations

import pytest
import torch
from conftest import build_purifier, clips, shift_flow

from videopure_fast import Purifier
from videopure_fast.runtime import readback


def overflow(module):
    with torch.no_grad():
        module.weight.fill_(torch.finfo(module.weight.dtype).max)


STAGES = {
    "encode": lambda purifier: purifier.vae.encoder.conv_in,
    "denoise": lambda purifier: purifier.unet.conv_in,
    "decode": lambda purifier: purifier.vae.decoder.conv_in,
}


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "diffusers"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_in_half_precision(stage, fast, kind):
    purifier = build_purifier(dtype=torch.float16, fast=fast, flow=shift_flow)
    video = clips(3, 4, 16, 16)
    video = video if kind == "float" else (video * 255).byte()
    purifier(video)
    overflow(STAGES[stage](purifier))
    with pytest.raises(FloatingPointError, match=f"'{stage}' made values that are not finite in float16: .*bfloat16"):
        purifier(video)


def test_infinite_pictures_are_not_black_and_white():
    """The last convolution overflows to infinities of either sign, which are not NaN and would be clamped."""
    purifier = build_purifier(dtype=torch.float16)
    with torch.no_grad():
        purifier.vae.decoder.conv_out.weight.zero_()
        purifier.vae.decoder.conv_out.bias.copy_(torch.tensor([float("inf"), float("-inf"), 0.0]))
    with pytest.raises(FloatingPointError, match="'decode'"):
        purifier(clips(3, 4, 16, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    purifier = build_purifier()
    with torch.no_grad():
        purifier.unet.conv_out.bias[0] = value
    with pytest.raises(FloatingPointError, match="'denoise' made values that are not finite in float32: the models' w"):
        purifier(clips(3, 4, 16, 16))
    with pytest.raises(FloatingPointError, match="'denoise'"):
        purifier.denoise(purifier.encode(clips(1, 3, 4, 16, 16)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_flow_that_is_not_finite(value):
    def flow(prev, next):
        found = shift_flow(prev, next).clone()
        found[0, 0, 0, 0] = value
        return found

    purifier = build_purifier(flow=flow)
    for call in (purifier, lambda video: purifier.latent_flow(video[None])):
        with pytest.raises(FloatingPointError, match="the stage 'flow' made values that are not finite in float32"):
            call(clips(3, 4, 16, 16))


def test_public_stages_refuse_what_is_not_finite_within_them():
    purifier, video = build_purifier(), clips(1, 3, 4, 16, 16)
    target = purifier.encode(video)
    states, noise_preds = purifier.denoise(target)
    flow = purifier.latent_flow(video)
    with pytest.raises(FloatingPointError, match="'vote'"):
        purifier.vote(states * float("nan"), noise_preds, target, flow)
    with pytest.raises(FloatingPointError, match="'decode'"):
        purifier.decode(target * float("inf"))
    with pytest.raises(FloatingPointError, match="'denoise'"):
        purifier.denoise(target * float("nan"))


@pytest.mark.parametrize(
    "config", [{"method": name} for name in ("ddim", "ddpm", "ddim_inversion")] + [{"feedback": True}]
)
def test_every_method_is_checked(config):
    purifier = build_purifier(**config)
    overflow(purifier.unet.half().conv_in)
    purifier.vae.half()
    purifier.to(torch.float16)
    with pytest.raises(FloatingPointError, match="'denoise'"):
        purifier(clips(3, 4, 16, 16))


def test_flags_are_read_once_when_the_results_are_there(monkeypatch):
    purifier, video, read = build_purifier(), clips(3, 4, 16, 16), []
    purifier(video)
    own = readback.Readback.read
    monkeypatch.setattr(readback.Readback, "read", lambda self: read.append(len(self._flags)) or own(self))
    purifier(video)
    assert read == [6]  # encode, two of denoise, flow, vote, decode


def test_gradients_meet_the_same_check():
    purifier = build_purifier()
    with torch.no_grad():
        purifier.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="'decode'"):
        purifier(clips(3, 4, 16, 16).requires_grad_())


def test_the_packaged_prior_in_half_precision():
    purifier = Purifier.from_pretrained("tiny", device="cpu", inversion_steps=0, flow="none", dtype=torch.float16)
    with torch.no_grad():
        purifier.vae.decoder.conv_in.weight.mul_(3e4)
    video = clips(3, 4, 32, 32)
    for each in (video, (video * 255).byte()):
        with pytest.raises(FloatingPointError, match="'decode' made values that are not finite in float16"):
            purifier(each)
