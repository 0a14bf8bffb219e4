"""The temporal convolution against its reference and torch's Conv3d: odd sizes, any layout, both ends of a clip."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, TOLERANCE, check, dtypes, every_backend, laid_out, normal
from product_cases import loading, loads
from torch import Tensor, nn

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend

# Frames, height and width: with fewer rows in a clip than a tile has, and more; frames of one row and of many.
SIZES = [(1, 1, 1), (1, 5, 9), (2, 5, 9), (7, 1, 1), (7, 5, 9), (16, 1, 1), (16, 2, 3), (3, 7, 13)]
# Channels and outputs, of which the first have tensor descriptors in half precision.
CHANNELS = [(24, 24), (40, 160), (72, 136), (30, 70), (48, 20), (1, 1)]


def inputs(*shape: int, outputs: int, residual: bool, seed: int = 0) -> list[Tensor | None]:
    channels = shape[-1]
    return [
        normal(*shape, seed=seed),
        normal(3, outputs, channels, seed=seed + 1, scale=(3 * channels) ** -0.5),
        normal(outputs, seed=seed + 2),
        normal(*shape[:-1], outputs, seed=seed + 3) if residual else None,
    ]


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    clips=st.sampled_from([1, 2]),
    size=st.sampled_from(SIZES),
    channels=st.sampled_from(CHANNELS),
    residual=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_temporal_conv(backend, device, clips, size, channels, residual, layout, seed):
    channels, outputs = channels
    tensors = inputs(clips, *size, channels, outputs=outputs, residual=residual, seed=seed)
    for dtype in dtypes(backend, device):
        moved = [None if t is None else laid_out(t.to(dtype), layout) for t in tensors]
        for way in loads(backend, device):
            with loading(way):
                check(backend, device, "temporal_conv", *moved)


@every_backend("triton")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, device, layout):
    for dtype in dtypes(backend, device):
        tensors = [laid_out(t.to(dtype), layout) for t in inputs(2, 4, 5, 9, 24, outputs=40, residual=True, seed=9)]
        for way in loads(backend, device):
            with loading(way):
                check(backend, device, "temporal_conv", *tensors)


@every_backend("triton")
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_equals_the_module_of_torch(backend, device, frames):
    """torch's Conv3d in float64, whose weight is passed as a view."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        conv = nn.Conv3d(24, 40, (3, 1, 1), padding=(1, 0, 0))
    x, residual = normal(2, frames, 5, 3, 24, seed=1), normal(2, frames, 5, 3, 40, seed=2)
    with torch.no_grad():
        expected = residual.double() + conv.double()(x.double().movedim(-1, 1)).movedim(1, -1)
    conv = conv.float().to(device)
    taps = conv.weight[..., 0, 0].permute(2, 0, 1)
    with use_backend(backend), torch.no_grad():
        actual = ops.temporal_conv(x.to(device), taps, conv.bias, residual.to(device))
    torch.testing.assert_close(actual.cpu().double(), expected, **TOLERANCE[torch.float32])


@every_backend("triton")
@pytest.mark.parametrize("tap", [0, 2])
@pytest.mark.parametrize("size", [(4, 5), (8, 16)])
def test_frames_outside_a_clip_are_zero(backend, device, tap, size):
    """The frames before and after a clip are zeros, not frames of the neighboring clip."""
    dtype = dtypes(backend, device)[-1]
    x, weight, bias, _ = inputs(2, 3, *size, 24, outputs=24, residual=False)
    weight[[i for i in range(3) if i != tap]] = 0.0
    x, weight, bias = ((t + shift).to(dtype) for t, shift in ((x, 3.0), (weight, 0.0), (bias, 0.0)))
    outside, inside = (0, slice(1, None)) if tap == 0 else (-1, slice(None, -1))
    for way in loads(backend, device):
        with loading(way), use_backend(backend):
            y = ops.temporal_conv(x.to(device), weight.to(device), bias.to(device)).cpu()
        assert torch.equal(y[:, outside], bias.expand(2, *size, 24))
        assert ((y[:, inside] - bias).abs() > 1e-3).float().mean() > 0.9


@every_backend("triton")
def test_offsets_beyond_32_bits(backend, device):
    """Two clips 2^31 values apart. Untouched pages take no memory on a CPU."""
    dtype = dtypes(backend, device)[-1]
    stride = 2**31 if dtype.itemsize == 2 else 2**30
    x, weight, bias, residual = (t.to(device, dtype) for t in inputs(2, 3, 2, 5, 16, outputs=16, residual=True))
    far = []
    for tensor in (x, residual):
        memory = torch.empty(stride + tensor[0].numel(), dtype=dtype, device=device)
        far.append(memory.as_strided(tensor.shape, (stride, *tensor.stride()[1:])).copy_(tensor))
    for way in loads(backend, device):
        with loading(way), use_backend(backend):
            actual = ops.temporal_conv(far[0], weight, bias, far[1])
            expected = ops.temporal_conv(x, weight, bias, residual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
