"""Every backend of every op against the reference: odd sizes, any strides, any finite flow, poisoned outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videopure_fast import ops, reference
from videopure_fast.config import PurifyConfig
from videopure_fast.schedule import Schedule, VoteCoefficients

# Against the float32 reference, whatever the noise's dtype: it is cast to float32 before any arithmetic.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
# The temporal pull jumps where the warp residual changes sign; values this close to the jump may fall on either side.
SIGN_MARGIN = 2e-5

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter takes milliseconds a program.
EXAMPLES = 10 if INTERPRETED else 60

CASES = [
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu, id="triton-gpu"),
]
if INTERPRETED:
    CASES.append(pytest.param("triton", "cpu", id="triton-interpreted"))
else:
    CASES.append(pytest.param("cpu", "cpu", id="cpu"))
every_backend = pytest.mark.parametrize(("backend", "device"), CASES)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh memory is NaN, so that a value no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def coefficients(votes: int) -> list[VoteCoefficients]:
    """Alternating x0 votes and latents, at the paper's levels."""
    steps = Schedule(PurifyConfig()).votes()
    return [steps[v % len(steps)]._replace(predicts_x0=v % 2 == 0) for v in range(votes)]


def make_inputs(
    shape: tuple[int, ...], *, noise_dtype: torch.dtype = torch.float32, flow_scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random latents, noise, target and flow for latents of (V, B, C, F, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    _, clips, _, frames, height, width = shape
    latents = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator).to(noise_dtype)
    target = torch.randn(shape[1:], generator=generator)
    flow = flow_scale * torch.randn(clips, frames - 1, 2, height, width, generator=generator)
    return latents, noise, target, flow


def weights(shape: tuple[int, ...]) -> dict[str, float]:
    config = PurifyConfig().rescaled(*shape[-3:])
    return {"spatial_weight": config.spatial_weight, "temporal_weight": config.temporal_weight}


def near_sign_jump(
    latents: Tensor, noise: Tensor, target: Tensor, flow: Tensor, steps: list[VoteCoefficients]
) -> Tensor:
    """Where the reference's warp residual lies within SIGN_MARGIN of zero, as a mask of the latents' shape."""
    masks = []
    for z, e, step in zip(latents, noise.float(), steps, strict=True):
        p = (z - step.sqrt_beta * e) / step.sqrt_alpha
        following = p[:, :, 1:].transpose(1, 2).flatten(0, 1)
        warped = reference.warp(following, flow.flatten(0, 1)).unflatten(0, flow.shape[:2]).transpose(1, 2)
        near = (warped - p[:, :, :-1]).abs() <= SIGN_MARGIN
        masks.append(torch.cat([near, torch.zeros_like(p[:, :, :1], dtype=torch.bool)], 2))
    return torch.stack(masks)


def run(backend: str, device: str, inputs: tuple[Tensor, ...]) -> Tensor:
    moved = [tensor.to(device) for tensor in inputs]
    shape = tuple(inputs[0].shape)
    with ops.use_backend(backend):
        return ops.guided_update(*moved, coefficients(shape[0]), **weights(shape)).cpu()


def check(backend: str, device: str, inputs: tuple[Tensor, ...]) -> None:
    shape = tuple(inputs[0].shape)
    steps = coefficients(shape[0])
    expected = reference.guided_update(*inputs, steps, **weights(shape))
    masked = near_sign_jump(*inputs, steps)
    assert masked.float().mean() < 0.2, "too few values are left to compare"
    actual = run(backend, device, inputs)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual[~masked], expected[~masked], **TOLERANCE)
    assert actual.isfinite().all()


shapes = st.tuples(
    st.integers(1, 3),  # votes
    st.integers(1, 3),  # clips
    st.integers(1, 5),  # channels
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([2, 5, 8]),
    st.sampled_from([2, 3, 9]),
)


@every_backend
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    shape=shapes,
    noise_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    flow_scale=st.sampled_from([0.0, 0.3, 2.0, 50.0, 1e10, 1e30]),
    seed=st.integers(0, 2**20),
)
def test_guided_update(backend, device, shape, noise_dtype, flow_scale, seed):
    check(backend, device, make_inputs(shape, noise_dtype=noise_dtype, flow_scale=flow_scale, seed=seed))


@every_backend
def test_whole_pixel_flow_reaches_every_border(backend, device):
    latents, noise, target, flow = make_inputs((2, 1, 2, 9, 5, 4))
    for frame, (x, y) in enumerate([(1, 0), (-1, 0), (0, 1), (0, -1), (3, 4), (-3, -4), (4, 0), (0, 5)]):
        flow[:, frame, 0], flow[:, frame, 1] = float(x), float(y)
    check(backend, device, (latents, noise, target, flow))


@every_backend
@pytest.mark.parametrize("layout", ["channels last", "every second", "expanded", "transposed frames", "offset"])
def test_any_strides(backend, device, layout):
    shape = (2, 2, 4, 3, 5, 9)
    inputs = list(make_inputs(shape, seed=3))
    for i, tensor in enumerate(inputs):
        if layout == "channels last":
            tensor = tensor.movedim(-3 if i == 3 else -4, -1).contiguous().movedim(-1, -3 if i == 3 else -4)
        elif layout == "every second":
            wide = torch.full([2 * n for n in tensor.shape], torch.nan)
            wide[tuple(slice(None, None, 2) for _ in tensor.shape)] = tensor
            tensor = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        elif layout == "expanded":
            tensor = tensor[:1].expand(tensor.shape)
        elif layout == "transposed frames":
            tensor = tensor.mT.contiguous().mT
        elif layout == "offset":
            tensor = torch.cat([torch.full_like(tensor, torch.nan), tensor], -3)[..., -tensor.shape[-3] :, :, :]
        inputs[i] = tensor
    check(backend, device, tuple(inputs))


@every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_flow_that_points_nowhere_samples_zeros(backend, device, value):
    latents, noise, target, flow = make_inputs((2, 2, 3, 3, 5, 9))
    broken = torch.rand(flow.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    nowhere = torch.where(broken.any(2, keepdim=True), 1e6, flow)
    flow = flow.masked_fill(broken, value)
    actual = run(backend, device, (latents, noise, target, flow))
    assert torch.equal(actual, run(backend, device, (latents, noise, target, nowhere)))
    check(backend, device, (latents, noise, target, nowhere))


@every_backend
def test_zero_residual_has_no_pull(backend, device):
    latents, noise, target, flow = make_inputs((2, 1, 2, 2, 4, 4), flow_scale=0.0)
    latents, noise = latents[:, :, :, :1].expand(latents.shape), noise[:, :, :, :1].expand(noise.shape)
    shape = tuple(latents.shape)
    expected = reference.guided_update(latents, noise, target, flow, coefficients(2), **weights(shape))
    torch.testing.assert_close(run(backend, device, (latents, noise, target, flow)), expected, **TOLERANCE)


@every_backend
def test_more_votes_than_one_launch_takes(backend, device):
    check(backend, device, make_inputs((131, 1, 1, 2, 2, 3)))


@pytest.mark.skipif(INTERPRETED, reason="checks the cpu backend")
def test_threads_do_not_change_a_bit():
    inputs = make_inputs((2, 2, 4, 7, 13, 9), flow_scale=2.0)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", "cpu", inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreted run of this file")
def test_triton_in_the_interpreter():
    """The same cases in a process of their own: triton reads TRITON_INTERPRET once, when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton-interpreted", str(Path(__file__).resolve())]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.fixture
def reference_calls(monkeypatch):
    """The dtypes of the latents that reach the reference."""
    calls = []
    true_reference = reference.guided_update

    def record(latents, *args, **kwargs):
        calls.append(latents.dtype)
        return true_reference(latents, *args, **kwargs)

    monkeypatch.setattr(reference, "guided_update", record)
    return calls


SHAPE = (2, 1, 3, 2, 4, 5)


def call(*inputs: Tensor) -> Tensor:
    return ops.guided_update(*(inputs or make_inputs(SHAPE)), coefficients(2), **weights(SHAPE))


@pytest.mark.skipif(INTERPRETED, reason="checks the choice of backend")
class TestChoice:
    def test_auto_takes_the_extension(self, reference_calls):
        call()
        assert reference_calls == []

    def test_environment_forces(self, monkeypatch, reference_calls):
        monkeypatch.setenv(ops.BACKEND_VARIABLE, "reference")
        call()
        assert len(reference_calls) == 1
        with ops.use_backend("cpu"):
            call()
        assert len(reference_calls) == 1, "use_backend wins over the environment"

    def test_empty_environment_is_auto(self, monkeypatch, reference_calls):
        monkeypatch.setenv(ops.BACKEND_VARIABLE, "")
        call()
        assert reference_calls == []

    def test_unknown_names(self, monkeypatch):
        with pytest.raises(ValueError, match="unknown backend 'cudnn'; accepted: auto, cuda"):
            ops.use_backend("cudnn").__enter__()
        monkeypatch.setenv(ops.BACKEND_VARIABLE, "cudnn")
        with pytest.raises(ValueError, match="unknown VIDEOPURE_FAST_BACKEND 'cudnn'"):
            call()

    def test_use_backend_ends_with_its_block(self, reference_calls):
        with pytest.raises(KeyError), ops.use_backend("reference"):
            raise KeyError
        call()
        assert reference_calls == []

    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    def test_gpu_backend_refuses_cpu_tensors(self, backend):
        sentence = rf"backend '{backend}' cannot serve this call: .*(GPU|CUDA|install|cuda)"
        with ops.use_backend(backend), pytest.raises(RuntimeError, match=sentence):
            call()

    def test_unbuilt_extension(self, monkeypatch, reference_calls):
        monkeypatch.setattr(ops, "_load", lambda: (None, "No module named 'videopure_fast._C'"))
        call()
        assert len(reference_calls) == 1
        with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=r"No module.*install videopure-fast again"):
            call()
        assert "C++ compiler" in ops.backends()["cpu"]

    def test_double_goes_to_the_reference(self, reference_calls):
        result = call(*(tensor.double() for tensor in make_inputs(SHAPE)))
        assert result.dtype == torch.float64
        assert reference_calls == [torch.float64]
        with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=r"float32, the latents are torch\.float64"):
            call(*(tensor.double() for tensor in make_inputs(SHAPE)))

    @pytest.mark.parametrize("backend", ["auto", "cpu"])
    def test_gradients_flow_through_the_reference(self, backend, reference_calls):
        latents, noise, target, flow = make_inputs(SHAPE)
        with ops.use_backend(backend):
            call(latents.requires_grad_(), noise, target.requires_grad_(), flow).sum().backward()
            assert latents.grad is not None
            assert target.grad is not None
            assert len(reference_calls) == 1
            with torch.no_grad():
                assert not call(latents, noise, target, flow).requires_grad
        assert len(reference_calls) == 1

    def test_backends_says_what_is_missing(self):
        report = ops.backends()
        assert tuple(report) == ops.BACKENDS
        assert report["reference"] == "available"
        assert report["cpu"] == "available"
        if not torch.cuda.is_available():
            assert "CUDA" in report["cuda"]
            assert "GPU" in report["triton"]


@pytest.mark.skipif(INTERPRETED, reason="checks the door, not a backend")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"latents": torch.zeros(1, 3, 2, 4, 5)}, r"latents must be \(V, B, C, F, h, w\).*got \(1, 3, 2, 4, 5\)"),
        ({"latents": torch.zeros(2, 0, 3, 2, 4, 5)}, "not empty"),
        ({"latents": torch.zeros(2, 1, 3, 2, 1, 5)}, "2x2 pixels or larger"),
        ({"noise": torch.zeros(2, 1, 3, 1, 4, 5)}, r"noise must be \(2, 1, 3, 2, 4, 5\)"),
        ({"target": torch.zeros(SHAPE)}, r"target must be \(1, 3, 2, 4, 5\)"),
        ({"flow": torch.zeros(1, 2, 2, 4, 5)}, r"flow must be \(1, 1, 2, 4, 5\).*got \(1, 2, 2, 4, 5\)"),
        ({"target": torch.zeros(SHAPE[1:]).double()}, r"target must be of the latents' dtype, torch\.float32"),
        ({"noise": torch.zeros(SHAPE).int()}, r"noise must be of a floating-point dtype, got torch\.int32"),
        ({"flow": torch.zeros(1, 1, 2, 4, 5, device="meta")}, "flow must be on the latents' device, cpu, got meta"),
        ({"coefficients": coefficients(3)}, "coefficients must be 2, one for each vote, got 3"),
    ],
)
def test_misfits_are_refused(broken, message):
    inputs = dict(zip(("latents", "noise", "target", "flow"), make_inputs(SHAPE), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.guided_update(**{**inputs, "coefficients": coefficients(2), **broken}, **weights(SHAPE))
