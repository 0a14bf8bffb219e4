import fnmatch
import os
import shutil
import threading
import time
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import build_purifier, clips, shift_flow, walk
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from videopure_fast import Purifier, PurifyConfig, reference
from videopure_fast.ops.guided_update import guided_update_reference
from videopure_fast.schedule import SamplerStep, Schedule
from videopure_fast.windows import cross_fade, window_starts, window_weights

METHODS = ("videopure", "ddim_inversion", "ddim", "ddpm")


def generator(seed):
    return torch.Generator().manual_seed(seed)


# Configuration


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"method": "magic"}, ValueError),
        ({"inversion_steps": -1}, ValueError),
        ({"inversion_steps": 50}, ValueError),
        ({"inversion_steps": 2.0}, TypeError),
        ({"inversion_steps": True}, TypeError),
        ({"num_inference_steps": 0}, ValueError),
        ({"num_inference_steps": 2000}, ValueError),
        ({"spatial_weight": float("nan")}, ValueError),
        ({"temporal_weight": float("inf")}, ValueError),
        ({"update_scale": "4"}, TypeError),
        ({"beta_start": 0.0}, ValueError),
        ({"beta_end": 1.0}, ValueError),
        ({"window_overlap": -1}, ValueError),
        ({"decode_chunk": -1}, ValueError),
        ({"steps_offset": 20, "inversion_steps": 49}, ValueError),
        ({"steps_offset": 0}, ValueError),
        ({"num_train_timesteps": 10**9}, ValueError),
        ({"spatial_weight": 1e300}, ValueError),
        ({"temporal_weight": 10**400}, ValueError),
        ({"update_scale": -1e39}, ValueError),
        ({"cfg_denoise": 10**5000}, ValueError),
        ({"sign_temperature": 1e-320}, ValueError),
        ({"decode_chunk": 10**400}, ValueError),
        ({"inversion_steps": 10**5000}, ValueError),
        ({"steps_offset": 10**5000}, ValueError),
        ({"num_inference_steps": -(10**5000)}, ValueError),
    ],
)
def test_config_refuses(setting, error):
    with pytest.raises(error) as caught:
        PurifyConfig(**setting)
    assert next(iter(setting)) in str(caught.value) and len(str(caught.value)) < 400


def test_config_is_frozen_and_rescales_the_weights():
    config = PurifyConfig()
    with pytest.raises(FrozenInstanceError):
        config.method = "ddim"
    assert config.rescaled(32, 28, 28) == config
    small = config.rescaled(16, 14, 14)
    assert (small.spatial_weight, small.temporal_weight) == (100.0, 1.25)


def test_scheduler_configuration_is_read_or_refused(purifier):
    parts = purifier.unet, purifier.vae, purifier.prompt_embeds
    given = {"beta_start": 1e-4, "beta_end": 2e-2, "clip_sample": False, "_class_name": "DDIMScheduler"}
    config = Purifier(*parts, scheduler_config=given).config
    assert (config.beta_start, config.beta_end, config.steps_offset) == (1e-4, 2e-2, 1)
    assert Schedule(config).alphas_cumprod[0] == pytest.approx(1 - 1e-4)
    for schedule in ("linear", "scaled_linear"):
        theirs = DDIMScheduler(
            beta_start=1e-3, beta_end=0.02, beta_schedule=schedule, clip_sample=False, steps_offset=1
        )
        config = Purifier(*parts, scheduler_config=theirs.config).config
        assert (config.beta_schedule, config.beta_end) == (schedule, 0.02)
        assert Schedule(config).alphas_cumprod == pytest.approx(theirs.alphas_cumprod.tolist(), rel=1e-6)
    for wrong in (
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": ["linear"]},
        {"prediction_type": "v_prediction"},
        {"trained_betas": [0.1]},
        {"rescale_betas_zero_snr": True},
        {"clip_sample": True},
        {"thresholding": True},
        {"use_flow_sigmas": True},
        {"snr_shift_scale": 3.0},
        {"timestep_type": "continuous"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        {"beta_start": 1e300},
        {"beta_end": 10**400},
        {"num_train_timesteps": 10**400},
    ):
        with pytest.raises(ValueError, match="has no betas" if "shift" in wrong else next(iter(wrong))):
            Purifier(*parts, scheduler_config=wrong)
    with pytest.raises(TypeError, match="mapping"):
        Purifier(*parts, scheduler_config=[1])


@pytest.mark.parametrize("betas", [{"beta_start": 1e-10}, {"beta_start": 0.9, "beta_end": 0.9}])
def test_a_schedule_without_noise_or_signal_is_refused(betas):
    with pytest.raises(ValueError, match="betas from"):
        Schedule(PurifyConfig(inversion_steps=40, **betas))


def test_default_dtype_changes_nothing():
    purifier, video = build_purifier(method="ddim"), clips(1, 3, 3, 16, 16)
    expected = purifier(video, generator=generator(1))
    torch.set_default_dtype(torch.float64)
    try:
        purifier.config = replace(purifier.config)
        assert torch.equal(purifier(video, generator=generator(1)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# The method


def test_closed_form_equals_autograd_in_float64():
    g = generator(0)
    z, e = (torch.randn(2, 3, 4, 5, 6, 7, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.randn(3, 4, 5, 6, 7, generator=g, dtype=torch.float64)
    flow = 3 * torch.randn(3, 4, 2, 6, 7, generator=g, dtype=torch.float64)
    config = PurifyConfig()
    steps = Schedule(config).vote_coefficients()[-2:]
    coefficients = z.new_tensor(steps)[:, None].expand(2, 3, 4)
    closed = guided_update_reference(z, e, target, flow, coefficients, spatial_weight=800.0, temporal_weight=5.0)
    for vote, state, noise, step in zip(closed, z, e, steps, strict=True):
        slow = reference.guidance_by_autograd(state, noise, target, flow, step, config)
        slow = (slow - step.sqrt_beta * noise) / step.sqrt_alpha if step.predicts_x0 else slow
        torch.testing.assert_close(vote, slow, rtol=0, atol=1e-12)


def test_purifier_equals_the_slow_reference():
    purifier = build_purifier(dtype=torch.float64, inversion_steps=2)
    clip = clips(3, 5, 16, 18, dtype=torch.float64)
    flow = purifier.latent_flow(clip[None])[0]
    slow = reference.videopure(purifier.unet, purifier.vae, purifier.prompt_embeds, clip, flow, purifier.config)
    torch.testing.assert_close(purifier(clip, return_votes=True), slow, rtol=0, atol=1e-9)


def test_feedback_lets_the_optimised_latents_go_on():
    purifier = build_purifier(dtype=torch.float64, inversion_steps=2, feedback=True)
    clip = clips(1, 3, 5, 16, 18, dtype=torch.float64)
    config, schedule, (inversion, denoising) = purifier.config, purifier._schedule, purifier._schedule.steps
    with torch.no_grad():
        flow, target = purifier.latent_flow(clip), purifier.encode(clip)
        latents = walk(purifier, target, inversion, 1.0, first_frame_noise=True)[0][-1]
        votes = []
        for i, vote in enumerate(schedule.vote_coefficients()):
            if i < len(denoising):
                _, (noise,) = walk(purifier, latents, denoising[i : i + 1], 1.0)
            latents = reference.guidance_by_autograd(latents, noise, target, flow, vote, config)
            clean = (latents - vote.sqrt_beta * noise) / vote.sqrt_alpha
            votes.append(purifier.decode(clean if vote.predicts_x0 else latents))
            if i < len(denoising):
                latents = denoising[i].scale * latents + denoising[i].noise_scale * noise
    expected = torch.stack(votes, 1)
    torch.testing.assert_close(purifier(clip, return_votes=True), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(purifier(clip), expected[:, -1], rtol=0, atol=1e-9)
    plain = purifier.with_config(feedback=False)(clip, return_votes=True)
    assert torch.allclose(plain[:, 0], expected[:, 0]) and not torch.allclose(plain[:, 1], expected[:, 1], atol=1e-6)


def test_equal_prompts_run_no_second_half(purifier):
    same = Purifier(
        purifier.unet,
        purifier.vae,
        purifier.prompt_embeds,
        negative_prompt_embeds=purifier.prompt_embeds.clone(),
        flow=purifier.flow,
        config=purifier.config,
        max_frames=purifier.max_frames,
    )
    batches = []
    hook = same.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    assert torch.equal(same(clips(3, 5, 16, 18)), purifier(clips(3, 5, 16, 18)))
    hook.remove()
    assert batches == [1] * 8


def test_different_prompts_are_guided():
    purifier = build_purifier(dtype=torch.float64, prompts=2)
    z = clips(2, 4, 3, 8, 8, dtype=torch.float64)
    t = 21
    negative = purifier.unet(z, t, purifier.negative_prompt_embeds.expand(2, -1, -1)).sample
    positive = purifier.unet(z, t, purifier.prompt_embeds.expand(2, -1, -1)).sample
    expected = negative + 7.5 * (positive - negative)
    _, (noise,) = walk(purifier, z, [SamplerStep(t, 1.0, 0.0)], 7.5)
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(negative, positive)


@pytest.mark.parametrize("method", METHODS)
def test_votes_shapes_and_ranges(method):
    purifier = build_purifier(method=method)
    video = clips(2, 3, 4, 16, 20)
    votes = purifier(video, return_votes=True, generator=generator(1))
    assert votes.shape == (2, 3 if method == "videopure" else 1, 3, 4, 16, 20)
    assert votes.dtype == torch.float32 and votes.min() >= 0 and votes.max() <= 1
    last = purifier(video, generator=generator(1))
    torch.testing.assert_close(last, votes[:, -1], rtol=0, atol=1e-5)
    assert purifier(video[0], generator=generator(1), return_votes=True).shape == votes.shape[1:]


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_singles(method):
    # float64, or rounding would flip signs; tests/test_tiny.py has the float32 figure on the packaged prior.
    purifier = build_purifier(method=method, dtype=torch.float64)
    video = clips(2, 3, 11, 16, 18, dtype=torch.float64)  # two windows
    batch = purifier(video, return_votes=True, generator=generator(7))
    one_generator = generator(7)
    singles = [purifier(clip, return_votes=True, generator=one_generator) for clip in video]
    torch.testing.assert_close(batch, torch.stack(singles), rtol=0, atol=1e-9)
    listed = purifier(video, return_votes=True, generator=[generator(i) for i in range(2)])
    alone = purifier(video[1], return_votes=True, generator=generator(1))
    torch.testing.assert_close(listed[1], alone, rtol=0, atol=1e-9)
    if method in ("ddim", "ddpm"):
        assert not torch.allclose(listed[1], batch[1], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic(method):
    purifier, video = build_purifier(method=method), clips(1, 3, 3, 16, 16)
    torch.manual_seed(3)
    first = purifier(video)
    torch.manual_seed(3)
    assert torch.equal(purifier(video), first)
    if method in ("videopure", "ddim_inversion"):
        state = torch.get_rng_state()
        purifier(video)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_gpu_equals_cpu(method):
    def flow(prev, next):  # in float32, whose sums differ between devices
        return shift_flow(prev.cpu(), next.cpu()).to(prev.device)

    video = clips(2, 3, 11, 16, 18, dtype=torch.float64)
    on_cpu, on_gpu = (build_purifier(method=method, dtype=torch.float64, flow=flow).to(d) for d in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu.encode(video[:, :, :8]).cpu(), on_cpu.encode(video[:, :, :8]), rtol=0, atol=1e-11)
    expected, actual = (purifier(video, generator=generator(3)) for purifier in (on_cpu, on_gpu))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


def test_train_never_wakes_dropout(purifier):
    video = clips(1, 3, 3, 16, 16)
    expected = purifier(video)
    for wake in (purifier.train, torch.nn.Sequential(purifier).train):
        wake()
        assert not any(module.training for module in purifier.modules())
        assert torch.equal(purifier(video), expected)
    assert not any(parameter.requires_grad for parameter in purifier.parameters())


def test_modules_stay_untouched(purifier):
    before = {key: value.clone() for key, value in purifier.state_dict().items()}
    unet, vae = purifier.unet, purifier.vae
    purifier(clips(1, 3, 3, 16, 16))
    assert purifier.unet is unet and purifier.vae is vae
    after = purifier.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


# Windows and padding


@given(st.integers(2, 200), st.integers(2, 33), st.data())
def test_windows_cover_every_frame(frames, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    starts = window_starts(frames, length, overlap)
    covered = torch.zeros(frames)
    for start in starts:
        covered[start : start + length] += window_weights(length, overlap)[: frames - start]
    assert (covered > 0).all()
    assert starts[0] == 0 and starts == sorted(set(starts))
    if frames > length:
        assert starts[-1] == frames - length
        assert all(b - a <= length - overlap for a, b in zip(starts, starts[1:], strict=False))


@given(st.integers(2, 60), st.integers(2, 12), st.data())
def test_cross_fading_equal_windows_gives_the_clip(frames, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    clip = torch.rand(2, frames, 1, 1, dtype=torch.float64)
    starts = window_starts(frames, length, overlap)
    pieces = list(cross_fade((clip[:, start : start + length] for start in starts), starts, overlap))
    assert len(pieces) == len(starts)
    torch.testing.assert_close(torch.cat(pieces, -3), clip, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_each_window_draws_noise_of_its_own(method):
    purifier = build_purifier(method=method, max_frames=4, window_overlap=0)
    votes = purifier.latent_votes(torch.full((3, 12, 16, 16), 0.5))
    a, b, c = (latents for _, latents in votes.windows)
    assert not torch.equal(a, b) and not torch.equal(b, c) and not torch.equal(a, c)


def test_long_clip_blends_its_windows(purifier):
    video = clips(1, 3, 13, 16, 16)
    votes = purifier(video, return_votes=True)
    windows = {s: purifier(video[:, :, s : s + 8], return_votes=True) for s in (0, 5)}
    torch.testing.assert_close(votes[:, :, :, :5], windows[0][:, :, :, :5], rtol=0, atol=1e-6)
    torch.testing.assert_close(votes[:, :, :, 8:], windows[5][:, :, :, 3:], rtol=0, atol=1e-6)
    weights = window_weights(8, 2)
    for frame in (5, 6, 7):
        a, b = weights[frame], weights[frame - 5]
        mixed = (a * windows[0][:, :, :, frame] + b * windows[5][:, :, :, frame - 5]) / (a + b)
        torch.testing.assert_close(votes[:, :, :, frame], mixed, rtol=0, atol=1e-6)


def test_flow_is_called_once_a_window_with_all_pairs():
    calls = []

    def flow(prev, next):
        calls.append((prev, next))
        return shift_flow(prev, next)

    purifier = build_purifier(flow=flow)
    video = clips(2, 3, 13, 16, 17, dtype=torch.float64)
    purifier(video)
    assert len(calls) == 4  # two clips, two windows
    for prev, next in calls:
        assert prev.shape == next.shape == (7, 3, 16, 18)  # padded
        assert prev.dtype == torch.float32
        assert torch.equal(prev[1:], next[:-1])
    torch.testing.assert_close(calls[0][0][:, :, :, :17], video[0, :, :7].transpose(0, 1).float())


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 9), st.integers(16, 21), st.integers(16, 21))
def test_any_size_keeps_its_shape(frames, height, width):
    purifier = build_purifier(inversion_steps=0)
    assert purifier(clips(3, frames, height, width)).shape == (3, frames, height, width)


def test_padding_replicates_and_crops(purifier):
    video = clips(1, 3, 4, 17, 19)
    padded = torch.nn.functional.pad(video[0], (0, 1, 0, 1), mode="replicate")[None]
    torch.testing.assert_close(purifier(video), purifier(padded)[..., :17, :19], rtol=0, atol=1e-6)


# Types at the door


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_video(purifier, dtype):
    video = (clips(1, 3, 3, 16, 16) * 255).round() / 255
    result = purifier(video.to(dtype))
    assert result.dtype == dtype
    assert (result.float() - purifier(video)).abs().mean() < 0.01


def test_uint8_rounds_to_nearest(purifier):
    video = (clips(1, 3, 3, 16, 16) * 255).to(torch.uint8)
    result = purifier(video)
    assert result.dtype == torch.uint8
    exact = purifier(video.float() / 255) * 255
    assert torch.equal(result, exact.round().to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs(dtype):
    video = clips(1, 3, 3, 16, 16)
    result = build_purifier(dtype=dtype, temporal_weight=0.0)(video)
    assert result.dtype == torch.float32
    assert (result - build_purifier(temporal_weight=0.0)(video)).abs().mean() < 0.1


def test_input_is_not_modified_nor_shared(purifier):
    video = clips(1, 3, 9, 16, 16)
    before = video.clone()
    result = purifier(video.transpose(-1, -2))  # not contiguous
    result.zero_()
    assert torch.equal(video, before)


def test_float32_means_float32_and_settings_come_back(purifier):
    backends = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    seen = []
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        purifier(
            clips(1, 3, 3, 16, 16), callback=lambda *_: seen.append([switch.fp32_precision for switch in switches])
        )
        assert seen and all(precisions == ["ieee"] * 4 for precisions in seen)
        with pytest.raises(RuntimeError, match="stop"):
            purifier(clips(1, 3, 3, 16, 16), callback=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        assert [switch.fp32_precision for switch in switches] == ["tf32"] * 4
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


PRODUCTS = {"convolution", "addmm", "mm", "bmm"}
SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)


class Products(TorchDispatchMode):
    """Watches convolutions, matrix products and our ops: the float32 switches, and whether autocast is on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "videopure_fast" or func._opname in PRODUCTS:
            self.seen.append(([switch.fp32_precision for switch in SWITCHES], torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["encode", "denoise", "latent_flow", "vote", "decode", "call"])
def test_each_product_of_a_stage_called_alone_keeps_float32(stage):
    purifier = build_purifier(flow=lambda prev, next: F.conv2d(next - prev, torch.full((2, 3, 3, 3), 0.5), padding=1))
    video, before = clips(2, 3, 4, 16, 16), [switch.fp32_precision for switch in SWITCHES]
    target, flow = purifier.encode(video), purifier.latent_flow(video)
    states, noise_preds = purifier.denoise(target)
    calls = {
        "encode": lambda: purifier.encode(video),
        "denoise": lambda: purifier.denoise(target),
        "latent_flow": lambda: purifier.latent_flow(video),
        "vote": lambda: purifier.vote(states, noise_preds, target, flow),
        "decode": lambda: purifier.decode(states),
        "call": lambda: purifier(video),
    }
    expected = calls[stage]()
    try:
        for switch in SWITCHES:
            switch.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16), Products() as products:
            actual = calls[stage]()
        assert products.seen and all(seen == (["ieee"] * 3, False) for seen in products.seen)
        assert [switch.fp32_precision for switch in SWITCHES] == ["tf32"] * 3
    finally:
        for switch, precision in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = precision
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_stages_called_alone_are_the_call(purifier):
    video = clips(2, 3, 4, 16, 16)
    target, flow = purifier.encode(video), purifier.latent_flow(video)
    votes = purifier.vote(*purifier.denoise(target), target, flow)
    assert torch.equal(purifier.decode(votes).transpose(0, 1), purifier(video, return_votes=True))
    last = purifier.vote(*purifier.denoise(target), target, flow, num_votes=1)
    assert torch.equal(purifier.decode(last)[0], purifier(video))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, z, f: p.encode(clips(3, 4, 16, 16)), ValueError, r"clips have shape \(3, 4, 16, 16\)"),
        (lambda p, z, f: p.encode(255 * clips(1, 3, 4, 16, 16)), ValueError, "values from"),
        (lambda p, z, f: p.encode(clips(1, 3, 4, 17, 16)), ValueError, "sides of multiples of 2"),
        (lambda p, z, f: p.encode([1]), TypeError, "got list"),
        (lambda p, z, f: p.encode(clips(1, 3, 4, 16, 16).byte()), TypeError, "uint8"),
        (lambda p, z, f: p.denoise(z[0, 0]), ValueError, r"latents has shape \(4, 4, 8, 8\); accepted: floats"),
        (lambda p, z, f: p.denoise(z[0].int()), TypeError, "latents must be floats, got torch.int32"),
        (lambda p, z, f: p.denoise(z[0], callback=3), TypeError, "callback must be callable"),
        (lambda p, z, f: p.decode(z[:, :, :3]), ValueError, r"latents has shape \(3, 1, 3, 4, 8, 8\)"),
        (lambda p, z, f: p.decode(None), TypeError, "got NoneType"),
        (lambda p, z, f: p.vote(z[0], z[:2], z[0], f), ValueError, "states has shape"),
        (lambda p, z, f: p.vote(z[:2], z[:1], z[0], f), ValueError, "states has 2 of 3 states"),
        (lambda p, z, f: p.vote(z, z, z[0], f), ValueError, "noise_preds has 3"),
        (lambda p, z, f: p.vote(z, z[:2], z[0], f[:, :1]), ValueError, "flow must be"),
        (lambda p, z, f: p.vote(z, z[:2], z[0], f, num_votes=0), ValueError, "num_votes must be 1 to 3, got 0"),
        (lambda p, z, f: p.vote(z, z[:2], z[0], f, num_votes=4), ValueError, "num_votes must be 1 to 3, got 4"),
        (lambda p, z, f: p.latent_flow(clips(3, 4, 16, 16)), ValueError, "clips have shape"),
        (lambda p, z, f: setattr(p, "max_frames", 2), ValueError, "window_overlap 2 must be less than max_frames 2"),
        (lambda p, z, f: setattr(p, "max_frames", 8.0), TypeError, "max_frames must be an int"),
    ],
)
def test_bad_input_of_a_stage_called_alone(purifier, call, error, message):
    states, flow = clips(3, 1, 4, 4, 8, 8), torch.zeros(1, 3, 2, 8, 8)
    with pytest.raises(error, match=message):
        call(purifier, states, flow)


def test_votes_to_decode_are_a_slice(purifier):
    votes = purifier.latent_votes(clips(3, 4, 16, 16))
    for wrong in (0, slice(3, None), slice(0, 0), None):
        with pytest.raises(ValueError, match="votes must be a slice of one or more of 3 votes"):
            purifier.decode_votes(votes, wrong)


def test_stages_called_alone_see_changed_weights_and_prompts():
    purifier, video = build_purifier(prompts=2, cfg_denoise=2.0), clips(1, 3, 4, 16, 16)
    target = purifier.encode(video)
    states, _ = purifier.denoise(target)
    decoded = purifier.decode(target)
    with torch.no_grad():
        for module in (purifier.vae.encoder, purifier.vae.decoder):
            module.conv_out.weight.mul_(0.5)
    assert not torch.equal(purifier.encode(video), target) and not torch.equal(purifier.decode(target), decoded)
    purifier.negative_prompt_embeds.copy_(purifier.prompt_embeds)  # guidance is then the identity
    assert not torch.equal(purifier.denoise(target)[0], states)
    assert len(purifier._prompts) == 1


def test_half_precision_latents_are_sampled_in_float32(purifier):
    assert purifier.denoise(clips(1, 4, 4, 8, 8).half())[0].dtype == torch.float32


def test_gradients_of_a_vote_reach_its_target(purifier):
    states, target = clips(3, 1, 4, 4, 8, 8), clips(1, 4, 4, 8, 8).requires_grad_()
    purifier.vote(states, states[:2], target, torch.zeros(1, 3, 2, 8, 8)).sum().backward()
    assert target.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_random_methods_denoise_alone_as_in_a_call(method):
    purifier, video = build_purifier(method=method), clips(2, 3, 4, 16, 16)
    states, noise_preds = purifier.denoise(purifier.encode(video), generator=generator(3))
    assert states.shape == noise_preds.shape == (1, 2, 4, 4, 8, 8)
    assert torch.equal(purifier.decode(states)[0], purifier(video, generator=generator(3)))


def test_autocast_is_off_while_a_purifier_runs(purifier):
    video = clips(1, 3, 3, 16, 16)
    expected = purifier(video)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(purifier(video), expected)


def test_two_threads_leave_the_settings_as_they_were(purifier):
    conv = torch.backends.cudnn.conv
    before, barrier = conv.fp32_precision, threading.Barrier(2, timeout=30)
    seen = []

    def run(first):
        def callback(stage, step, *_):
            if (stage, step) == ("inversion", 0):
                barrier.wait()  # both are within
            if not first and stage == "denoising":
                seen.append(conv.fp32_precision)  # perhaps after the first has ended

        purifier(clips(1, 3, 3, 16, 16), callback=callback)

    threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["ieee", "ieee"] and conv.fp32_precision == before


def test_callback_sees_every_evaluation(purifier, capfd):
    seen = []
    purifier(clips(2, 3, 3, 16, 16), callback=lambda *step: seen.append(step), progress=True)
    assert [step[:3] for step in seen] == [
        ("inversion", 0, 1),
        ("inversion", 1, 21),
        ("denoising", 0, 21),
        ("denoising", 1, 1),
    ]
    assert all(step[3].shape == (2, 4, 3, 8, 8) for step in seen)
    assert "videopure" in capfd.readouterr().err


# Gradients


def test_gradients_only_where_asked(purifier):
    video = clips(1, 3, 3, 16, 16)
    assert purifier(video).grad_fn is None
    wanted = video.clone().requires_grad_()
    with torch.no_grad():
        assert purifier(wanted).grad_fn is None
    assert purifier(wanted).grad_fn is not None
    with torch.inference_mode():
        result = purifier(video)
    assert not result.is_inference()
    scale = torch.ones((), requires_grad=True)
    (result * scale).sum().backward()
    assert scale.grad.isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_matches_finite_differences(method):
    purifier = build_purifier(dtype=torch.float64, method=method, inversion_steps=1 if method != "ddpm" else 0)
    video = 0.2 + 0.6 * clips(1, 3, 3, 16, 16, dtype=torch.float64)
    weight = torch.randn(video.shape, generator=generator(2), dtype=torch.float64)
    direction = torch.randn(video.shape, generator=generator(3), dtype=torch.float64)

    def loss(x):
        return (purifier(x, generator=generator(4)) * weight).sum()

    wanted = video.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(wanted), wanted)
    h = 1e-7
    with torch.no_grad():
        numeric = (loss(video + h * direction) - loss(video - h * direction)) / (2 * h)
    analytic = (gradient * direction).sum()
    assert analytic.abs() > 1e-6
    torch.testing.assert_close(analytic, numeric, rtol=1e-4, atol=1e-6)


# Bad input

GOOD = clips(1, 3, 4, 16, 16)
BAD_VIDEOS = {
    "not a tensor": (GOOD.numpy(), TypeError, "ndarray"),
    "a list": ([GOOD], TypeError, "list"),
    "rank 3": (GOOD[0, 0], ValueError, r"\(4, 16, 16\)"),
    "rank 6": (GOOD[None], ValueError, "shape"),
    "channels": (clips(1, 4, 4, 16, 16), ValueError, r"\(1, 4, 4, 16, 16\)"),
    "frames first": (clips(1, 8, 3, 16, 16), ValueError, r"\(B, 3, F, H, W\)"),
    "empty batch": (clips(0, 3, 4, 16, 16), ValueError, "empty"),
    "bool": (GOOD > 0.5, TypeError, "bool"),
    "int8": (GOOD.to(torch.int8), TypeError, "int8"),
    "int64": (GOOD.long(), TypeError, "int64"),
    "complex": (GOOD.to(torch.complex64), TypeError, "complex"),
    "float8": (GOOD.to(torch.float8_e4m3fn), TypeError, "float8"),
    "nan": (GOOD * float("nan"), ValueError, "NaN"),
    "inf": (GOOD / 0, ValueError, "infinite"),
    "sparse": (GOOD.to_sparse(), TypeError, "sparse"),
    "meta": (GOOD.to("meta"), TypeError, "meta"),
    "above": (GOOD * 255, ValueError, r"\[0, 1\]"),
    "below": (GOOD * 2 - 1, ValueError, r"\[0, 1\]"),
    "one frame": (clips(1, 3, 1, 16, 16), ValueError, "frames"),
    "no frames": (clips(1, 3, 0, 16, 16), ValueError, "frames"),
    "low": (clips(1, 3, 4, 15, 16), ValueError, "16 pixels"),
    "narrow": (clips(1, 3, 4, 16, 8), ValueError, "16 pixels"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_video(purifier, name):
    video, error, words = BAD_VIDEOS[name]
    start = time.perf_counter()
    with pytest.raises(error, match=words) as caught:
        purifier(video)
    assert "accepted" in str(caught.value)
    assert time.perf_counter() - start < 2


def test_bad_generators():
    purifier = build_purifier(method="ddim")
    with pytest.raises(ValueError, match="2 generators for 1 clips"):
        purifier(GOOD, generator=[generator(0), generator(1)])
    for wrong in (7, [7], [None]):
        with pytest.raises(TypeError, match="int|NoneType"):
            purifier(GOOD, generator=wrong)
    with pytest.raises(TypeError, match="callable"):
        purifier(GOOD, callback=5)


def test_bad_construction(purifier):
    parts = purifier.unet, purifier.vae
    for models in ((purifier.vae, purifier.unet), (purifier.unet, None), (torch.nn.Linear(1, 1), purifier.vae)):
        with pytest.raises(TypeError, match="must be a diffusers module"):
            Purifier(*models, purifier.prompt_embeds)
    for embeds in (torch.zeros(1, 3, 8).long(), torch.full((1, 3, 8), float("nan"))):
        with pytest.raises(ValueError, match="finite floats"):
            Purifier(*parts, embeds)
    for embeds in (torch.zeros(2, 3, 8), torch.zeros(1, 3, 9), torch.zeros(3, 8), torch.zeros(1, 0, 8)):
        with pytest.raises(ValueError, match=r"accepted: \(1, tokens, 8\)"):
            Purifier(*parts, embeds)
    with pytest.raises(TypeError, match="prompt_embeds"):
        Purifier(*parts, "a dog")
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        Purifier(*parts, purifier.prompt_embeds, negative_prompt_embeds=torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="max_frames"):
        Purifier(*parts, purifier.prompt_embeds, max_frames=1)
    with pytest.raises(ValueError, match="window_overlap"):
        Purifier(*parts, purifier.prompt_embeds, max_frames=4)
    with pytest.raises(ValueError, match="unknown flow"):
        Purifier(*parts, purifier.prompt_embeds, flow="magic")
    with pytest.raises(TypeError, match="PurifyConfig"):
        Purifier(*parts, purifier.prompt_embeds, config={})


def test_bad_flow_is_named():
    purifier = build_purifier(flow=lambda prev, next: prev)
    with pytest.raises(ValueError, match=r"\(3, 2, 16, 16\), got \(3, 3, 16, 16\)"):
        purifier(GOOD)


# Folders


def test_folder_round_trip_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    purifier = build_purifier(flow="dis", prompts=2, max_frames=6)
    purifier.save_pretrained(tmp_path / "prior")
    again = Purifier.from_pretrained(tmp_path / "prior", device="cpu")
    assert again.config == purifier.config and again.max_frames == 6 and again.flow is purifier.flow
    video = clips(1, 3, 4, 16, 16)
    assert torch.equal(again(video), purifier(video))
    changed = Purifier.from_pretrained(tmp_path / "prior", device="cpu", dtype=torch.float16, inversion_steps=0)
    assert changed.config == replace(purifier.config, inversion_steps=0) and changed.unet.dtype == torch.float16
    with pytest.raises(FileExistsError, match="new folder"):
        purifier.save_pretrained(tmp_path / "prior")
    assert os.listdir(tmp_path) == ["prior"]
    again.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "again").rglob("*.json"))


def test_folder_with_a_text_encoder(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    purifier = build_purifier(flow="none")
    folder = tmp_path / "prior"
    purifier.save_pretrained(folder)
    (folder / "prompt_embeds.safetensors").unlink()
    (folder / "purifier.json").unlink()
    with pytest.raises(ValueError, match="text_encoder"):
        Purifier.from_pretrained(folder, flow="none")
    (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=7)
    tokenizer.save_pretrained(folder / "tokenizer")
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=2, max_position_embeddings=7, **settings)).eval()
    encoder.save_pretrained(folder / "text_encoder")
    loaded = Purifier.from_pretrained(folder, device="cpu", flow="none")
    tokens = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(loaded.prompt_embeds, encoder(tokens)[0])
    assert loaded.config == PurifyConfig() and loaded.max_frames == 32
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.02, "steps_offset": 3}')
    loaded = Purifier.from_pretrained(folder, device="cpu", flow="none", steps_offset=2)
    assert (loaded.config.beta_end, loaded.config.steps_offset) == (0.02, 2)  # the caller's word is the last


@pytest.mark.parametrize("safe", [True, False])
def test_hub_repository_is_downloaded_once_over(tmp_path, monkeypatch, safe):
    purifier = build_purifier(flow="none")
    purifier.save_pretrained(tmp_path / "hub")
    if not safe:
        (tmp_path / "hub" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        purifier.unet.save_pretrained(tmp_path / "hub" / "unet", safe_serialization=False)
    for extra in ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin", "README.md"):
        (tmp_path / "hub" / extra).write_text("never downloaded")
    files = [str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*") if path.is_file()]

    def download(name, allow_patterns, **place):
        for file in files:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tmp_path / "hub" / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, **place: listing)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = Purifier.from_pretrained("someone/model", device="cpu")
    video = clips(1, 3, 3, 16, 16)
    assert torch.equal(loaded(video), purifier(video))
    downloaded = {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*.*")}
    assert not downloaded & {"unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"}


def test_a_pickle_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    build_purifier(flow="none").save_pretrained(tmp_path / "prior")
    (tmp_path / "prior" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": Payload()}, tmp_path / "prior" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        Purifier.from_pretrained(tmp_path / "prior")
    assert not (tmp_path / "owned").exists()


def test_missing_and_broken_models_get_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no-such-model", "nobody/no-such-model", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match="accepted: 'tiny'") as caught:
            Purifier.from_pretrained(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no unet/config.json"):
        Purifier.from_pretrained(tmp_path)
    build_purifier(flow="none").save_pretrained(tmp_path / "prior")
    weights = tmp_path / "prior" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        Purifier.from_pretrained(tmp_path / "prior")


def test_missing_weights_are_no_random_ones(tmp_path):
    build_purifier(flow="none").save_pretrained(tmp_path / "prior")
    weights = tmp_path / "prior" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "conv_in" not in key}, weights)
    with pytest.raises(ValueError, match="vae lacks 4 of its weights, the first being .*conv_in"):
        Purifier.from_pretrained(tmp_path / "prior")


HOSTILE = {
    "unknown setting": ("purifier.json", '{"config": {"magic": 1}}', "magic"),
    "config a list": ("purifier.json", '{"config": []}', "config must be an object"),
    "wrong types": ("purifier.json", '{"config": {"inversion_steps": "5"}}', "inversion_steps"),
    "huge number": ("purifier.json", '{"config": {"spatial_weight": 1' + "0" * 400 + "}}", "purifier.json"),
    "deep": ("purifier.json", "[" * 200_000, "not JSON"),
    "not json": ("purifier.json", "\x00", "not JSON"),
    "a list": ("purifier.json", "[]", "JSON object"),
    "large": ("purifier.json", " " * (1 << 21), "bytes"),
    "flow a list": ("purifier.json", '{"flow": ["dis"]}', "unknown flow"),
    "max_frames a string": ("purifier.json", '{"flow": "none", "max_frames": "8"}', "max_frames"),
    "max_frames 1": (
        "purifier.json",
        '{"flow": "none", "max_frames": 1}',
        "purifier.json: max_frames must be 2 to",
    ),
    "max_frames huge": ("purifier.json", '{"flow": "none", "max_frames": 1000000000}', "max_frames"),
    "no embeddings": ("prompt_embeds.safetensors", "", "cannot be read"),
    "broken unet": ("unet/config.json", '{"norm_num_groups": 0}', "unet cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_gets_one_sentence(tmp_path, name):
    file, content, words = HOSTILE[name]
    build_purifier(flow="none").save_pretrained(tmp_path / "prior")
    (tmp_path / "prior" / file).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        Purifier.from_pretrained(tmp_path / "prior", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dtype": "float16"}, ValueError, "torch.float16"),
        ({"dtype": torch.int8}, ValueError, "torch.int8"),
        ({"device": "nowhere"}, ValueError, "nowhere"),
        ({"device": "cuda:77"}, ValueError, "cuda:77"),
        ({"name": 5}, TypeError, "name or a path"),
        ({"name": ""}, FileNotFoundError, "no model ''"),
        ({"name": "x" * 5000}, FileNotFoundError, "no model"),
        ({"config": {}}, TypeError, "PurifyConfig"),
        ({"magic": 1}, TypeError, "unknown settings magic; accepted: method"),
        ({"flow": "magic"}, ValueError, "unknown flow"),
        ({"flow": ["dis"]}, ValueError, "unknown flow"),
        ({"inversion_steps": 99}, ValueError, "inversion_steps"),
    ],
)
def test_bad_arguments_of_from_pretrained(arguments, error, words):
    with pytest.raises(error, match=words):
        Purifier.from_pretrained(**arguments)


def test_both_prompts_may_be_one_tensor(tmp_path, purifier):
    embeds = purifier.prompt_embeds
    same = Purifier(purifier.unet, purifier.vae, embeds, negative_prompt_embeds=embeds, flow="none")
    same.save_pretrained(tmp_path / "prior")
    assert torch.equal(Purifier.from_pretrained(tmp_path / "prior", device="cpu").negative_prompt_embeds, embeds)


def test_custom_flow_is_asked_for_again(tmp_path):
    build_purifier().save_pretrained(tmp_path / "prior")
    with pytest.raises(ValueError, match="pass it again"):
        Purifier.from_pretrained(tmp_path / "prior")
    assert Purifier.from_pretrained(tmp_path / "prior", flow=shift_flow).flow is shift_flow
