"""guided_update: any shape, strides, noise and flow; each clip at its own step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    EXACT_NOISE_DTYPES,
    EXAMPLES,
    INTERPRETED,
    LAYOUTS,
    assert_equal,
    assert_same_bits,
    every_backend,
    hard,
    laid_out,
    normal,
    run,
)
from torch import Tensor

from videopure_fast.config import PurifyConfig
from videopure_fast.ops.guided_update import guided_update_reference, warp
from videopure_fast.schedule import Schedule

# The temporal term jumps where the warp residual changes sign: residuals this close to zero are not compared.
SIGN_MARGIN = 2e-5
NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def coefficients(votes: int, clips: int) -> Tensor:
    """(V, B, 4): the paper's noise levels, different for each vote and clip; half of the votes predict x0."""
    steps = Schedule(PurifyConfig()).vote_coefficients()
    return torch.tensor(
        [
            [steps[(v + 3 * b) % len(steps)]._replace(predicts_x0=(v + b) % 2 == 0) for b in range(clips)]
            for v in range(votes)
        ]
    )


def make_inputs(
    *shape: int, noise_dtype: torch.dtype = torch.float32, flow_scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random latents, noise, target and flow for latents of (V, B, C, F, h, w), and their coefficients."""
    votes, clips, _, frames, height, width = shape
    return (
        normal(*shape, seed=seed),
        normal(*shape, seed=seed + 1).to(noise_dtype),
        normal(*shape[1:], seed=seed + 2),
        normal(clips, frames - 1, 2, height, width, seed=seed + 3, scale=flow_scale),
        coefficients(votes, clips),
    )


def weights(latents: Tensor) -> dict[str, float]:
    config = PurifyConfig().rescaled(*latents.shape[-3:])
    return {"spatial_weight": config.spatial_weight, "temporal_weight": config.temporal_weight}


def clear_of_sign_jump(latents: Tensor, noise: Tensor, target: Tensor, flow: Tensor, steps: Tensor) -> Tensor:
    """Where the warp residual is further than SIGN_MARGIN from zero, as a mask of the latents' shape."""
    sqrt_alpha, sqrt_beta = steps[..., None, None, None, None, :2].unbind(-1)
    p = (latents - sqrt_beta * noise) / sqrt_alpha
    clear = torch.ones(p.shape, dtype=torch.bool)
    for x0, mask in zip(p, clear, strict=True):
        following = x0[:, :, 1:].transpose(1, 2).flatten(0, 1)
        warped = warp(following, flow.flatten(0, 1)).unflatten(0, flow.shape[:2]).transpose(1, 2)
        mask[:, :, :-1] = (warped - x0[:, :, :-1]).abs() > SIGN_MARGIN
    return clear


def check(backend: str, device: str, *tensors: Tensor) -> None:
    exact = [tensor.double() for tensor in tensors]
    expected = guided_update_reference(*exact, **weights(tensors[0]))
    clear = clear_of_sign_jump(*exact)
    assert clear.float().mean() > 0.8, "too few values are left to compare"
    actual = run(backend, device, "guided_update", *tensors, **weights(tensors[0]))
    assert_equal(actual, expected, torch.float32, where=clear)


def step_by_step(
    latents: Tensor,
    noise: Tensor,
    target: Tensor,
    flow: Tensor,
    steps: Tensor,
    *,
    spatial_weight: float,
    temporal_weight: float,
) -> Tensor:
    """The arithmetic of every form but the reference, in float32 on the CPU, each operation a call that rounds."""
    sqrt_alpha, sqrt_beta, update, predicts_x0 = steps[..., None, None, None, None].unbind(2)
    noise, inverse_sqrt_alpha = noise.float(), 1 / sqrt_alpha
    x0 = (latents - sqrt_beta * noise) * inverse_sqrt_alpha
    gradient = 2 * spatial_weight / target[0].numel() * (x0 - target)
    residual = warp_step_by_step(x0[:, :, :, 1:], flow) - x0[:, :, :, :-1]
    sign = (residual > 0).float() - (residual < 0).float()
    gradient[:, :, :, :-1] += temporal_weight / target[0, :, 0].numel() * sign
    optimized = latents + update * gradient
    return torch.where(predicts_x0 != 0, (optimized - sqrt_beta * noise) * inverse_sqrt_alpha, optimized)


def warp_step_by_step(frames: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of frames (V, B, C, F-1, h, w) at x + flow_x, y + flow_y: a sum over the four pixels around."""
    votes, _, channels, _, height, width = frames.shape
    sample_x = torch.arange(width) + flow[:, :, 0]
    sample_y = torch.arange(height)[:, None] + flow[:, :, 1]
    reached = (sample_x > -1) & (sample_x < width) & (sample_y > -1) & (sample_y < height)
    left, top = sample_x.floor(), sample_y.floor()
    right_weight, bottom_weight = sample_x - left, sample_y - top
    warped = torch.zeros_like(frames)
    for i in range(4):
        tap_x, tap_y = left + i % 2, top + i // 2
        weight_x = right_weight if i % 2 else 1 - right_weight
        weight_y = bottom_weight if i // 2 else 1 - bottom_weight
        inside = reached & (tap_x >= 0) & (tap_x < width) & (tap_y >= 0) & (tap_y < height)
        pixel = torch.where(inside, tap_y * width + tap_x, 0).long().flatten(-2)[None, :, None]
        sample = frames.flatten(-2).gather(-1, pixel.expand(votes, -1, channels, -1, -1)).view_as(frames)
        warped += torch.where(inside[:, None], (weight_x * weight_y)[:, None] * sample, 0.0)
    return warped


@every_backend("cuda", "triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        st.integers(1, 3),  # votes
        st.integers(1, 3),  # clips
        st.integers(1, 5),  # channels
        st.sampled_from([1, 2, 3, 7]),
        st.sampled_from([2, 5, 8]),
        st.sampled_from([2, 3, 9]),
    ),
    noise_dtype=st.sampled_from(NOISE_DTYPES),
    flow_scale=st.sampled_from([0.0, 0.3, 2.0, 50.0, 1e10, 1e30]),
    seed=st.integers(0, 2**20),
)
def test_equals_the_reference(backend, device, shape, noise_dtype, flow_scale, seed):
    check(backend, device, *make_inputs(*shape, noise_dtype=noise_dtype, flow_scale=flow_scale, seed=seed))


@every_backend("cuda", "triton")
@pytest.mark.parametrize("shape", [(2, 3, 3, 4, 7, 9), (1, 1, 4, 2, 2, 3), (3, 2, 1, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("noise_dtype", EXACT_NOISE_DTYPES, ids=str)
@pytest.mark.parametrize("make", [normal, hard])
@pytest.mark.parametrize("motion", ["none", "of one color", "fast"])
def test_rounds_each_operation(backend, device, shape, noise_dtype, make, motion):
    _, _, target, flow, steps = make_inputs(*shape, flow_scale={"none": 0.0, "of one color": 0.3, "fast": 5.0}[motion])
    latents, noise = make(*shape, seed=5), make(*shape, seed=7).to(noise_dtype)
    target[:, :1], noise[:, :, :1] = 0, 0  # the gradient of a latent that is zero has the sign of this zero
    if motion == "none":  # every residual is zero
        latents, noise = (tensor[:, :, :, :1].expand(shape) for tensor in (latents, noise))
    elif motion == "of one color":  # the sign of a residual is that of rounding errors
        latents, noise = (tensor[..., :1, :1, :1].expand(shape) for tensor in (latents, noise))
    else:
        flow = torch.where(normal(*flow.shape, seed=9) > 1, hard(*flow.shape, seed=10), flow)
    steps[..., :3] *= 1 + normal(*steps[..., :3].shape) / 8
    result = run(backend, device, "guided_update", latents, noise, target, flow, steps, **weights(latents))
    assert_same_bits(result, step_by_step(latents, noise, target, flow, steps, **weights(latents)))


@every_backend("cuda", "triton")
def test_whole_pixel_flow_reaches_every_border(backend, device):
    latents, noise, target, flow, steps = make_inputs(2, 1, 2, 9, 5, 4)
    for frame, (x, y) in enumerate([(1, 0), (-1, 0), (0, 1), (0, -1), (3, 4), (-3, -4), (4, 0), (0, 5)]):
        flow[:, frame, 0], flow[:, frame, 1] = float(x), float(y)
    check(backend, device, latents, noise, target, flow, steps)


@every_backend("cuda", "triton")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.float16])
def test_any_strides(backend, device, layout, noise_dtype):
    inputs = make_inputs(2, 2, 4, 3, 5, 9, noise_dtype=noise_dtype)
    check(backend, device, *(laid_out(tensor, layout) for tensor in inputs))


@every_backend("cuda", "triton")
def test_channels_last_noise_and_one_step_for_all_clips(backend, device):
    latents, noise, target, flow, steps = make_inputs(3, 2, 4, 3, 5, 9, noise_dtype=torch.float16)
    noise = noise.movedim(2, -1).contiguous().movedim(-1, 2)
    check(backend, device, latents, noise, target, flow, steps[:, :1].expand(-1, 2, -1))


@every_backend("cuda", "triton")
def test_each_clip_is_as_if_alone(backend, device):
    *inputs, steps = make_inputs(2, 3, 2, 3, 5, 4)
    assert len(steps[0].unique(dim=0)) == 3
    together = run(backend, device, "guided_update", *inputs, steps, **weights(inputs[0]))
    for b in range(3):
        latents, noise, target, flow = inputs
        alone = (latents[:, b : b + 1], noise[:, b : b + 1], target[b : b + 1], flow[b : b + 1], steps[:, b : b + 1])
        assert torch.equal(run(backend, device, "guided_update", *alone, **weights(latents))[:, 0], together[:, b])


@every_backend("cuda", "triton")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_flow_that_points_nowhere_samples_zeros(backend, device, value):
    latents, noise, target, flow, steps = make_inputs(2, 2, 3, 3, 5, 9)
    broken = normal(*flow.shape, seed=9) > 0.5
    nowhere = torch.where(broken.any(2, keepdim=True), 1e6, flow)
    flow = flow.masked_fill(broken, value)
    results = [
        run(backend, device, "guided_update", latents, noise, target, where, steps, **weights(latents))
        for where in (flow, nowhere)
    ]
    assert torch.equal(*results)
    check(backend, device, latents, noise, target, nowhere, steps)


@every_backend("cuda", "triton")
def test_zero_residual_has_no_pull(backend, device):
    latents, noise, target, flow, steps = make_inputs(2, 1, 2, 2, 4, 4, flow_scale=0.0)
    still = [latents[:, :, :, :1].expand(latents.shape), noise[:, :, :, :1].expand(noise.shape), target, flow, steps]
    expected = guided_update_reference(*(tensor.double() for tensor in still), **weights(latents))
    assert_equal(run(backend, device, "guided_update", *still, **weights(latents)), expected, torch.float32)


@every_backend("cuda", "triton")
def test_many_votes(backend, device):
    check(backend, device, *make_inputs(131, 1, 1, 2, 2, 3))


@every_backend("cuda", "triton")
def test_strides_beyond_32_bits(backend, device, tmp_path):
    latents, noise, target, flow, steps = make_inputs(1, 2, 2, 2, 3, 4)
    dtype = torch.float32 if backend == "cpu" else torch.float16
    # A sparse file: the pages between the clips take no memory.
    far = torch.from_file(str(tmp_path / "noise"), shared=True, size=2**31 + noise[0, 0].numel(), dtype=dtype)
    far = far.as_strided(noise.shape, (0, 2**31, *noise.stride()[2:])).copy_(noise)
    check(backend, device, latents, far, target, flow, steps)


@pytest.mark.skipif(INTERPRETED, reason="checks the cpu backend")
def test_threads_do_not_change_a_bit():
    inputs = make_inputs(2, 2, 4, 7, 13, 9, flow_scale=2.0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", "cpu", "guided_update", *inputs, **weights(inputs[0])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
