"""ddim_step and ddim_step_: any shape, strides and noise; each clip at its own step."""

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
    assert_same_bits,
    check,
    every_backend,
    hard,
    laid_out,
    normal,
    run,
)
from torch import Tensor

from videopure_fast.ops.ddim_step import ddim_step_reference

NOISE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def make_inputs(
    *shape: int, noise_dtype: torch.dtype = torch.float32, seed: int = 0, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents, noise and coefficients for latents of (B, C, F, h, w)."""
    latents, noise, coefficients = normal(*shape, seed=seed), normal(*shape, seed=seed + 1), normal(shape[0], 2)
    return laid_out(latents, layout), laid_out(noise.to(noise_dtype), layout), laid_out(coefficients, layout)


@every_backend("cuda", "triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 2, 7, 16]), st.integers(1, 9), st.integers(1, 9)
    ),
    noise_dtype=st.sampled_from(NOISE_DTYPES),
    first_frame_noise=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_equals_the_reference(backend, device, shape, noise_dtype, first_frame_noise, seed):
    inputs = make_inputs(*shape, noise_dtype=noise_dtype, seed=seed)
    check(backend, device, "ddim_step", *inputs, first_frame_noise=first_frame_noise)


@every_backend("cuda", "triton")
@pytest.mark.parametrize("op", ["ddim_step", "ddim_step_"])
@pytest.mark.parametrize("first_frame_noise", [False, True])
@pytest.mark.parametrize("noise_dtype", EXACT_NOISE_DTYPES)
@pytest.mark.parametrize("make", [normal, hard])
def test_rounds_each_operation_as_the_reference_does(backend, device, op, first_frame_noise, noise_dtype, make):
    """On the CPU the reference's operations are calls of their own, none of which is contracted with another."""
    shape = (2, 3, 5, 7, 9)
    latents, noise, coefficients = make(*shape, seed=4), make(*shape, seed=6).to(noise_dtype), normal(2, 2)
    expected = ddim_step_reference(latents, noise, coefficients, first_frame_noise)
    result = run(backend, device, op, latents.clone(), noise, coefficients, first_frame_noise=first_frame_noise)
    assert_same_bits(result, expected)


@every_backend("cuda", "triton")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first_frame_noise", [False, True])
def test_any_strides(backend, device, layout, first_frame_noise):
    inputs = make_inputs(3, 4, 5, 7, 9, noise_dtype=torch.float16, layout=layout)
    check(backend, device, "ddim_step", *inputs, first_frame_noise=first_frame_noise)


@every_backend("cuda", "triton")
@pytest.mark.parametrize("first_frame_noise", [False, True])
def test_channels_last_noise_and_one_step_for_all_clips(backend, device, first_frame_noise):
    latents, noise, coefficients = make_inputs(2, 4, 3, 5, 9)
    noise = noise.movedim(1, -1).contiguous().movedim(-1, 1)
    coefficients = coefficients[:1].expand(2, 2)
    check(backend, device, "ddim_step", latents, noise, coefficients, first_frame_noise=first_frame_noise)


@every_backend("cuda", "triton")
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@pytest.mark.parametrize("first_frame_noise", [False, True])
def test_in_place(backend, device, layout, first_frame_noise):
    latents, noise, coefficients = make_inputs(3, 4, 5, 7, 9, layout=layout)
    expected = ddim_step_reference(*(t.double() for t in (latents, noise, coefficients)), first_frame_noise)
    latents = laid_out(latents.to(device), layout)
    memory = torch.empty(0, device=device).set_(latents.untyped_storage())
    unused = memory.isnan().sum()
    strides = latents.stride()
    result = run(backend, device, "ddim_step_", latents, noise, coefficients, first_frame_noise=first_frame_noise)
    assert result.data_ptr() == latents.data_ptr() and latents.stride() == strides
    torch.testing.assert_close(latents.cpu().double(), expected, rtol=1e-5, atol=2e-5)
    assert memory.isnan().sum() == unused, "written outside the latents"


@every_backend("cuda", "triton")
@pytest.mark.parametrize("first_frame_noise", [False, True])
@pytest.mark.parametrize("frames_behind", [0, 1])
def test_in_place_with_noise_in_the_same_memory(backend, device, first_frame_noise, frames_behind):
    clip, _, coefficients = (tensor.to(device) for tensor in make_inputs(1, 1, 7, 5, 6))
    latents, noise = clip[:, :, 1:], clip[:, :, 1 - frames_behind : 7 - frames_behind]
    expected = ddim_step_reference(latents, noise, coefficients, first_frame_noise)
    run(backend, device, "ddim_step_", latents, noise, coefficients, first_frame_noise=first_frame_noise)
    torch.testing.assert_close(latents, expected)


@every_backend("cuda", "triton")
def test_strides_beyond_32_bits(backend, device, tmp_path):
    latents, noise, coefficients = make_inputs(2, 2, 3, 4, 5)
    dtype = torch.float32 if backend == "cpu" else torch.float16
    # A sparse file: the pages between the clips take no memory.
    far = torch.from_file(str(tmp_path / "noise"), shared=True, size=2**31 + noise[0].numel(), dtype=dtype)
    far = far.as_strided(noise.shape, (2**31, *noise.stride()[1:])).copy_(noise)
    check(backend, device, "ddim_step", latents, far, coefficients)


@pytest.mark.skipif(INTERPRETED, reason="checks the cpu backend")
@pytest.mark.parametrize("op", ["ddim_step", "ddim_step_"])
def test_threads_do_not_change_a_bit(op):
    latents, noise, coefficients = make_inputs(2, 4, 7, 13, 9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", "cpu", op, latents.clone(), noise, coefficients))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
