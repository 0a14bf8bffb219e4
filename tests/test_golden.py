"""The recordings of the authors' own code (tests/golden/README.md) are reproduced.

Not compared, being bookkeeping of the recorder: decode_calls, unet_calls, min_margin, cfg_vs_text, uncond_vs_text,
cfg_vs_single_pass_laststep, and inv_log_variance of whole runs (the method never uses it; its table is compared).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import walk
from diffusers import AutoencoderKL, UNet3DConditionModel
from op_cases import INTERPRETED
from safetensors.torch import load_file

from videopure_fast import reference
from videopure_fast.config import PurifyConfig
from videopure_fast.models.flow import resize_flow
from videopure_fast.ops.backend import SUPPORTED_DTYPES, use_backend
from videopure_fast.ops.ddim_step import ddim_step_reference
from videopure_fast.ops.guided_update import guided_update_reference, warp
from videopure_fast.purifier import Purifier
from videopure_fast.schedule import Schedule, VoteCoefficients, read_scheduler

GOLDEN = Path(__file__).parent / "golden"
RECORD = json.loads((GOLDEN / "config.json").read_text())
CASES = {case["name"]: case for case in RECORD["cases"]}
FORMULA, UNET = 1e-5, 2e-4  # relative to 1 + |reference|
AMBIGUOUS = 2e-5  # |warp residual| below which float32 cannot tell its sign

# The backends of a whole run. Where the extension has no form for a GPU, Triton's stands in. The interpreter would take
# many minutes for a UNet: it runs the ops on latents alone, of the smaller case.
BACKENDS = [
    pytest.param("cuda,triton", "cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu, id="triton-gpu"),
    pytest.param("reference", "cuda", marks=pytest.mark.gpu, id="reference-gpu"),
]
if INTERPRETED:
    BACKENDS.append(pytest.param("triton,reference", "cpu", id="triton-interpreted"))
else:
    BACKENDS += [pytest.param(name, "cpu", id=name) for name in ("cpu", "reference")]
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
LATENT_OPS = ("guided_update", "ddim_step", "ddim_step_")


def load(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def assert_close(actual, expected, tolerance, mask=None):
    assert actual.shape == expected.shape
    actual = actual.cpu()
    error = (actual.double() - expected.double()).abs() / (1 + expected.double().abs())
    if mask is not None:
        error = error[mask.expand_as(error)]
    assert error.max() <= tolerance, f"error {error.max():.2e} exceeds {tolerance:.0e}"


def frame_major(latents):
    """(1, C, F, h, w) -> (F, C, h, w), the recordings' layout."""
    return latents[0].transpose(0, 1)


def clip_major(frames):
    """(F, C, h, w) -> (1, C, F, h, w)."""
    return frames.transpose(0, 1)[None]


def residual(z, e, coefficients, flow):
    """warp(p[j+1]) - p[j] of frame-major latents, zero-free at the last frame, which has none."""
    p = (z - coefficients.sqrt_beta * e) / coefficients.sqrt_alpha
    m = warp(p[1:], flow) - p[:-1]
    return torch.cat([m, torch.ones_like(m[:1])])


@pytest.fixture(scope="module")
def modules():
    unet, vae = UNet3DConditionModel(**RECORD["unet_config"]), AutoencoderKL(**RECORD["vae_config"])
    for name, module in (("unet", unet), ("vae", vae)):
        module.load_state_dict({key: value.float() for key, value in load(f"weights_{name}_0").items()})
    return unet, vae


def build(modules, case, device, dtype=torch.float32, method="videopure"):
    inputs = load(f"{case}_inputs")
    if "flow_full_f16" in inputs:
        full = inputs["flow_full_f16"].float()
    else:
        full = 8 * inputs["flow_latent"][0].repeat_interleave(8, -1).repeat_interleave(8, -2)
    purifier = Purifier(
        *modules,
        load("embeds")["empty_prompt_embeds"],
        flow=lambda prev, next: full,
        config=PurifyConfig(method=method, inversion_steps=CASES[case]["T"]),
        scheduler_config=RECORD["scheduler_config"],
    ).to(device, dtype)
    return purifier, inputs["video_u8"].to(device) / 255, inputs


@pytest.fixture(autouse=True)
def restored(modules):
    yield
    for module in modules:
        module.float().cpu()


@pytest.fixture(autouse=True)
def _interpreted_latents(monkeypatch):
    """In the interpreter the ops on latents alone, unless all are asked for: those of the models take minutes."""
    if INTERPRETED and os.environ.get("INTERPRET_ALL_OPS") != "1":
        for op in SUPPORTED_DTYPES:
            if op not in LATENT_OPS:
                monkeypatch.setitem(SUPPORTED_DTYPES, op, {})


# Formulas


def test_schedule_tables():
    unit = load("unit")
    schedule = Schedule(read_scheduler(PurifyConfig(inversion_steps=49), RECORD["scheduler_config"]))
    assert_close(torch.tensor(schedule.alphas_cumprod), unit["schedule/alphas_cumprod"], FORMULA)
    assert schedule.alpha(-19) == pytest.approx(unit["schedule/final_alpha_cumprod"].item(), rel=1e-6)
    assert list(reversed(schedule.timesteps)) == unit["schedule/timesteps50"].tolist()
    timesteps = unit["schedule/log_variance_timesteps"].tolist()
    variances = torch.tensor([schedule.log_variance(t) for t in timesteps])
    assert_close(variances, unit["schedule/log_variance_step50"], FORMULA)
    assert_close(variances, unit["schedule/log_variance_inv50"], FORMULA)
    # The recorded walk runs 1000, 999, ..., 1; ours is its lower part.
    tail = unit["schedule/ddpm_timesteps_head_tail"].tolist()[-3:]
    assert [step.timestep for step in schedule.ancestral()][-3:] == tail


@pytest.mark.parametrize("case", RECORD["unit_cases"], ids=lambda case: f"u{case['k']}")
def test_unit_formulas(case):
    prefix = f"u{case['k']}/"
    unit = {key.removeprefix(prefix): value for key, value in load("unit").items() if key.startswith(prefix)}
    t = unit["timestep"].item()
    schedule = Schedule(read_scheduler(PurifyConfig(inversion_steps=(t - 1) // 20), RECORD["scheduler_config"]))
    z, e, flow = unit["latents"], unit["noise"], unit["flow"][0]
    assert schedule.alpha(t) == pytest.approx(unit["alpha_prod_t"].item(), rel=1e-5)

    assert_close(warp(z[1:], flow), unit["warp"], FORMULA)
    for step, expected in (
        (schedule.denoising()[0], "step_prev_sample"),
        (schedule.inversion()[-1], "inversion_prev_sample"),
    ):
        coefficients = torch.tensor([[step.scale, step.noise_scale]])
        z_next = ddim_step_reference(clip_major(z), clip_major(e), coefficients)
        assert_close(frame_major(z_next), unit[expected], FORMULA)
    for name in ("step_log_variance", "inversion_log_variance"):
        assert_close(torch.tensor(schedule.log_variance(t)), unit[name], FORMULA)

    def guided(noise, coefficients, **weights):
        latents, noise = clip_major(z)[None], clip_major(noise)[None]
        steps = torch.tensor([[coefficients]])
        votes = guided_update_reference(latents, noise, clip_major(unit["ori"]), flow[None], steps, **weights)
        return frame_major(votes[0])

    weights = {"spatial_weight": 800.0, "temporal_weight": 5.0}
    coefficients = schedule.vote_coefficients()[0]._replace(predicts_x0=False)
    clear = residual(z, e, coefficients, flow).abs() > AMBIGUOUS
    assert clear.float().mean() > 0.99
    assert_close(guided(e, coefficients, **weights), unit["guided_update"], FORMULA, clear)
    # Called without noise the authors' update takes p = z, but scales as before.
    plain = VoteCoefficients(1.0, 0.0, coefficients.update * coefficients.sqrt_alpha, False)
    clear = residual(z, e, plain, flow).abs() > AMBIGUOUS
    assert_close(guided(e, plain, **weights), unit["guided_update_no_noise_pred"], FORMULA, clear)

    # The temporal term alone is the recorded autograd gradient, negated: the log variance brings the other sign.
    only_temporal = VoteCoefficients(1.0, 0.0, 1.0, False)
    gradient = guided(e, only_temporal, spatial_weight=0.0, temporal_weight=1.0) - z
    assert_close(-gradient, unit["temporal_grad"], FORMULA, clear)
    loss = (warp(z[1:], flow) - z[:-1]).abs().mean((1, 2, 3)).sum()
    assert_close(loss, unit["temporal_loss"], FORMULA)


@pytest.mark.parametrize("name", ["zero", "int", "half", "oob", "edge"])
def test_warp_cases(name):
    unit = load("unit")
    flow = unit[f"warp_{name}/flow"].permute(0, 3, 1, 2)
    assert_close(warp(unit[f"warp_{name}/x"], flow), unit[f"warp_{name}/out"], FORMULA)


@pytest.mark.parametrize("k", range(4))
def test_flow_resize(k):
    unit = load("unit")
    expected = unit[f"resize{k}/out"]
    assert_close(resize_flow(unit[f"resize{k}/in"], *expected.shape[-2:]), expected, FORMULA)


# Whole runs


@every_backend
@pytest.mark.parametrize("case", ["p1"] if INTERPRETED else ["p0", "p1"])
def test_videopure_run(modules, case, backend, device):
    purifier, video, inputs = build(modules, case, device)
    record = load(f"{case}_videopure")
    with torch.no_grad(), use_backend(backend):
        flow = purifier.latent_flow(video)
        assert_close(flow, inputs["flow_latent"], FORMULA)
        target = purifier.encode(video)
        inversion, denoising = purifier._schedule.steps
        assert [step.timestep for step in inversion] == record["inv_timesteps"].tolist()
        assert [step.timestep for step in denoising] == record["timesteps"].tolist()
        inverted, inversion_noises = walk(purifier, target, inversion, 7.5, first_frame_noise=True)
        _, all_frames_noise = walk(purifier, inverted[-2], inversion[-1:], 7.5)
        states, noises = walk(purifier, inverted[-1], denoising, 9.0)
        votes = purifier.vote(torch.stack(states), torch.stack(noises), target, flow)

    assert_close(torch.cat(inverted), record["inverted_latents"], UNET)
    assert_close(torch.cat([e[:, :, :1] for e in inversion_noises]), record["inv_noise_pred_frame0"], UNET)
    assert_close(all_frames_noise[0][0], record["inv_noise_pred_full_last_step"], UNET)
    assert_close(torch.stack([frame_major(z) for z in states]), record["latents_in"], UNET)
    assert_close(torch.stack([frame_major(e) for e in noises]), record["noise_pred"], UNET)
    schedule = purifier._schedule
    alphas = torch.tensor([schedule.alpha(step.timestep) for step in denoising])
    variances = torch.tensor([schedule.log_variance(step.timestep) for step in denoising])
    assert_close(alphas, record["alpha_prod_t"], FORMULA)
    assert_close(variances, record["log_variance"], FORMULA)
    assert_close(torch.tensor(schedule.alphas_cumprod), record["alphas_cumprod"], FORMULA)

    # A flipped sign moves a vote by a fixed step: leave out what rounding of the UNet can flip.
    coefficients = schedule.vote_coefficients()
    expected_votes = record["vae_decode_inputs"] * 0.18215
    recorded_noise = [*record["noise_pred"], record["noise_pred"][-1]]
    clear = torch.stack(
        [
            residual(z, e, c, inputs["flow_latent"][0]).abs() > 5 * AMBIGUOUS
            for z, e, c in zip(record["latents_in"], recorded_noise, coefficients, strict=True)
        ]
    )
    assert clear.float().mean() > 0.99
    ours = torch.stack([frame_major(vote) for vote in votes]).cpu()
    assert_close(ours, expected_votes, UNET, clear)
    for i, (e, c) in enumerate(zip(recorded_noise, coefficients, strict=True)):
        optimized = ours[i] * c.sqrt_alpha + c.sqrt_beta * e if c.predicts_x0 else ours[i]
        assert_close(optimized, record["optimised_latents"][i], UNET, clear[i])

    # Decoded from the recorded votes, free of flips; and the whole call, in which each flip reaches some pixels.
    with torch.no_grad(), use_backend(backend):
        recorded = clip_major_votes(expected_votes).to(device)
        decoded = purifier.decode(recorded)[:, 0]
        whole = purifier(video, return_votes=True)[0].cpu()
    frames = CASES[case]["decoded_frames"]
    assert_close(decoded[:, :, frames], record["decoded_subset"], UNET)
    assert_close(decoded.mean((1, 2, 3, 4)), record["decoded_full_mean"], UNET)
    assert_close(decoded.std((1, 2, 3, 4)), record["decoded_full_std"], UNET)
    untouched = (whole[:, :, frames] - record["decoded_subset"]).abs() <= UNET
    assert untouched.float().mean() > 0.98
    assert_close(whole.mean((1, 2, 3, 4)), record["decoded_full_mean"], 1e-3)


def clip_major_votes(votes):
    """(V, F, C, h, w) -> (V, 1, C, F, h, w)."""
    return votes.transpose(1, 2)[:, None]


@every_backend
def test_ddim_inversion_run(modules, backend, device):
    purifier, video, _ = build(modules, "p1", device, method="ddim_inversion")
    record = load("p1_ddim_inversion")
    with torch.no_grad(), use_backend(backend):
        inversion, denoising = purifier._schedule.steps
        inverted, inversion_noises = walk(purifier, purifier.encode(video), inversion, 7.5)
        states, noises = walk(purifier, inverted[-1], denoising, 9.0)
        whole = purifier(video, return_votes=True)[0]
    assert [step.timestep for step in inversion] == record["inv_timesteps"].tolist()
    assert_close(torch.cat(inversion_noises), record["inv_noise_pred"], UNET)
    assert_close(torch.cat(inverted), record["inverted_latents"], UNET)
    assert_baseline(record, denoising, states, noises, whole)


def test_ddim_run(modules, device):
    purifier, video, _ = build(modules, "p1", device, method="ddim")
    record = load("p1_ddim")
    with torch.no_grad():
        target = purifier.encode(video)
        assert_close(frame_major(target), record["init_latents"], UNET)
        signal, deviation = purifier._schedule.diffusion()
        _, denoising = purifier._schedule.steps
        states, noises = walk(purifier, signal * target + deviation * record["init_noise"].to(device), denoising, 9.0)
        whole = purifier.decode(states[-1])
    assert_baseline(record, denoising, states, noises, whole)


def test_ddpm_run(modules, device):
    purifier, video, _ = build(modules, "p1", device, method="ddpm")
    purifier.config = PurifyConfig(method="ddpm", inversion_steps=CASES["p1"]["ddpm_t"])
    record = load("p1_ddpm")
    with torch.no_grad():
        target = purifier.encode(video)
        assert_close(frame_major(target), record["init_latents"], UNET)
        signal, deviation = purifier._schedule.diffusion()
        _, denoising = purifier._schedule.steps
        fresh = map(clip_major, record["step_noise"].to(device))
        assert all(step.sigma > 0 for step in denoising)
        start = signal * target + deviation * record["init_noise"].to(device)
        states, noises = walk(purifier, start, denoising, 9.0, noise_sampler=lambda: next(fresh))
        whole = purifier.decode(states[-1])
    noises = [noises[i] for i in record["noise_pred_step_index"].tolist()]
    assert_baseline(record, denoising, states, noises, whole)


def assert_baseline(record, denoising, states, noises, whole):
    assert [step.timestep for step in denoising] == record["timesteps"].tolist()
    assert_close(torch.stack([frame_major(z) for z in states]), record["latents_in"], UNET)
    assert_close(torch.stack([frame_major(e) for e in noises]), record["noise_pred"], UNET)
    assert_close(frame_major(states[-1])[None], record["vae_decode_inputs"] * 0.18215, UNET)
    assert_close(whole[:, :, CASES["p1"]["decoded_frames"]], record["decoded_subset"], UNET)
    assert_close(whole.mean((1, 2, 3, 4)), record["decoded_full_mean"], UNET)
    assert_close(whole.std((1, 2, 3, 4)), record["decoded_full_std"], UNET)


# Half precision: mean error and flips against float32, next to the authors' own half-precision run.


def test_the_reference_in_half_precision(modules):
    """`reference.videopure` rounds where the authors' code does: benchmarks hold others against its error."""
    purifier, video, _ = build(modules, "p0", "cpu", dtype=torch.float16)
    record, half = load("p0_videopure")["decoded_subset"], load("p0_videopure_halfprec")["fp16/decoded_subset"]
    theirs = RECORD["half_precision_reference_error"]["fp16_noCFG"]["decoded"]
    flow = purifier.latent_flow(video)[0]
    votes = reference.videopure(purifier.unet, purifier.vae, purifier.prompt_embeds, video[0], flow, purifier.config)
    assert votes.dtype == torch.float16
    votes = votes[:, :, CASES["p0"]["decoded_frames"]].float()
    error = (votes - record).abs()
    assert error.mean() <= 1.5 * theirs["mean"]
    assert (error > 0.05).float().mean() <= 1.5 * theirs["frac_gt_0p05"]
    assert (votes - half.float()).abs().mean() <= 2.25 * theirs["mean"]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision(modules, name, device):
    purifier, video, _ = build(modules, "p0", device, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[name])
    record, half = load("p0_videopure"), load("p0_videopure_halfprec")
    theirs = RECORD["half_precision_reference_error"][f"{name}_noCFG"]
    with torch.no_grad():
        flow, target = purifier.latent_flow(video), purifier.encode(video)
        inversion, denoising = purifier._schedule.steps
        inverted, _ = walk(purifier, target, inversion, 7.5, first_frame_noise=True)
        states, noises = walk(purifier, inverted[-1], denoising, 9.0)
        votes = purifier.vote(torch.stack(states), torch.stack(noises), target, flow)
        decoded = purifier.decode(votes)[:, 0]
    frames = CASES["p0"]["decoded_frames"]
    latents = torch.stack([frame_major(vote) for vote in votes]).cpu()
    inverted, decoded = torch.cat(inverted).cpu(), decoded.cpu()
    recorded = record["vae_decode_inputs"] * 0.18215
    for key, ours, exact in (
        ("inverted_latents", inverted, record["inverted_latents"]),
        ("list_latents", latents, recorded),
        ("decoded", decoded[:, :, frames], record["decoded_subset"]),
    ):
        error = (ours.float() - exact).abs()
        assert error.mean() <= 1.25 * theirs[key]["mean"], key
        assert (error > 0.05).float().mean() <= 1.25 * theirs[key]["frac_gt_0p05"] + 1e-6, key

    # And the recorded half-precision tensors themselves: no further from ours than both are from float32.
    theirs_latents = half[f"{name}/vae_decode_inputs"].float() * 0.18215
    assert (latents - theirs_latents).abs().mean() <= 2.25 * theirs["list_latents"]["mean"]
    theirs_inverted = half[f"{name}/inverted_latents"].float()
    ours_inverted = inverted[-len(theirs_inverted) :]
    assert (ours_inverted - theirs_inverted).abs().mean() <= 2.25 * theirs["inverted_latents"]["mean"]
    if f"{name}/decoded_subset" in half:
        theirs_decoded = half[f"{name}/decoded_subset"].float()
        assert (decoded[:, :, frames] - theirs_decoded).abs().mean() <= 2.25 * theirs["decoded"]["mean"]
