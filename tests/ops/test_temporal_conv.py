"""The temporal convolution against its reference and torch's modules: odd sizes, any layout, both ends of a clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, TOLERANCE, check, dtypes, every_backend, laid_out, normal
from torch import Tensor, nn

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend

# Frames, height and width.
SIZES = [(1, 1, 1), (1, 5, 9), (2, 5, 9), (7, 1, 1), (7, 5, 9), (16, 1, 1), (16, 2, 3)]
# Channels, groups and outputs.
CHANNELS = [(24, 3, 24), (40, 8, 40), (30, 5, 70), (48, 1, 20), (24, 24, 16)]


def inputs(*shape: int, outputs: int, residual: bool, mean: float = 0.0, seed: int = 0) -> list[Tensor | None]:
    channels = shape[-1]
    return [
        normal(*shape, seed=seed, mean=mean),
        normal(channels, seed=seed + 1, mean=1.0, scale=0.3),
        normal(channels, seed=seed + 2, scale=0.3),
        normal(3, outputs, channels, seed=seed + 3, scale=(3 * channels) ** -0.5),
        normal(outputs, seed=seed + 4),
        normal(*shape[:-1], outputs, seed=seed + 5) if residual else None,
    ]


@contextmanager
def on_load(backend: str, wanted: bool) -> Iterator[None]:
    """Both Triton forms: activations computed as the product loads x, and written to memory first."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            patch.setattr("videopure_fast.kernels.temporal_conv.normalizes_on_load", lambda *_: wanted)
        yield


def forms(backend: str) -> tuple[bool, ...]:
    return (False, True) if backend == "triton" else (False,)


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    clips=st.sampled_from([1, 2]),
    size=st.sampled_from(SIZES),
    channels=st.sampled_from(CHANNELS),
    residual=st.booleans(),
    mean=st.sampled_from([0.0, 100.0]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_temporal_conv(backend, device, clips, size, channels, residual, mean, layout, seed):
    channels, groups, outputs = channels
    tensors = inputs(clips, *size, channels, outputs=outputs, residual=residual, mean=mean, seed=seed)
    for dtype in dtypes(backend, device):
        moved = [None if t is None else laid_out(t.to(dtype), layout) for t in tensors]
        for form in forms(backend):
            with on_load(backend, form):
                check(backend, device, "temporal_conv", *moved, groups=groups, eps=1e-5)


@every_backend("triton")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, device, layout):
    for dtype in dtypes(backend, device):
        tensors = [laid_out(t.to(dtype), layout) for t in inputs(2, 4, 5, 9, 24, outputs=40, residual=True, seed=9)]
        for form in forms(backend):
            with on_load(backend, form):
                check(backend, device, "temporal_conv", *tensors, groups=3, eps=1e-5)


@every_backend("triton")
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_equals_the_modules_of_torch(backend, device, frames):
    """torch's GroupNorm, SiLU and Conv3d in float64, whose weight is passed as a view."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        modules = nn.Sequential(nn.GroupNorm(3, 24), nn.SiLU(), nn.Conv3d(24, 40, (3, 1, 1), padding=(1, 0, 0)))
        nn.init.normal_(modules[0].weight)
        nn.init.normal_(modules[0].bias)
    x, residual = normal(2, frames, 5, 3, 24, seed=1), normal(2, frames, 5, 3, 40, seed=2)
    with torch.no_grad():
        expected = residual.double() + modules.double()(x.double().movedim(-1, 1)).movedim(1, -1)
    norm, _, conv = modules.float().to(device)
    taps = conv.weight[..., 0, 0].permute(2, 0, 1)
    tensors = x.to(device), norm.weight, norm.bias, taps, conv.bias, residual.to(device)
    for form in forms(backend):
        with on_load(backend, form), use_backend(backend), torch.no_grad():
            actual = ops.temporal_conv(*tensors, groups=3, eps=norm.eps)
        torch.testing.assert_close(actual.cpu().double(), expected, **TOLERANCE[torch.float32])


@every_backend("triton")
@pytest.mark.parametrize("tap", [0, 2])
def test_frames_outside_a_clip_are_zero(backend, device, tap):
    """The frames before and after a clip are zeros after the activation, not frames of the neighboring clip."""
    x, norm_weight, norm_bias, weight, bias, _ = inputs(2, 3, 4, 5, 24, outputs=24, residual=False)
    weight[[i for i in range(3) if i != tap]] = 0.0
    tensors = [t.to(device) for t in (x, norm_weight, norm_bias + 3.0, weight, bias)]
    outside, inside = (0, slice(1, None)) if tap == 0 else (-1, slice(None, -1))
    for form in forms(backend):
        with on_load(backend, form), use_backend(backend):
            y = ops.temporal_conv(*tensors, groups=3).cpu()
        assert torch.equal(y[:, outside], bias.expand(2, 4, 5, 24))
        assert ((y[:, inside] - bias).abs() > 1e-3).float().mean() > 0.9


@every_backend("triton")
@pytest.mark.parametrize("frames", [1, 7])
def test_few_outputs_are_normalized_on_load(backend, device, frames):
    """The tiny UNet takes one form, the real one the other. A mean of 100 costs neither of them precision."""
    if backend == "triton":
        from videopure_fast.kernels.temporal_conv import TILES, normalizes_on_load

        for block_n in {tile[1] for tiles in TILES.values() for tile in tiles}:
            assert all(normalizes_on_load(outputs, block_n) for outputs in (32, 64))
            assert not any(normalizes_on_load(outputs, block_n) for outputs in (320, 640, 1280))
    for dtype in dtypes(backend, device):
        tensors = inputs(2, frames, 3, 5, 33, outputs=21, residual=True, mean=100.0, seed=21)
        tensors = [t.to(dtype) for t in tensors]
        for form in forms(backend):
            with on_load(backend, form):
                check(backend, device, "temporal_conv", *tensors, groups=11, eps=1e-5)
