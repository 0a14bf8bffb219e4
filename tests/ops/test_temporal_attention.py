"""Attention over frames, bare or after norm and projection: every form against the reference, and every pixel alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, check, dtypes, every_backend, laid_out, normal
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend
from videopure_fast.ops.temporal_attention import temporal_attention_reference

# Clips, frames, height, width, heads and head size: short and long clips, tiles with a rest, heads wider than a block.
SIZES = [
    (1, 7, 5, 9, 1, 8),
    (2, 3, 5, 9, 2, 5),
    (1, 2, 5, 9, 3, 1),
    (2, 16, 3, 5, 2, 8),
    (1, 24, 3, 3, 1, 40),
    (1, 32, 2, 3, 2, 64),
    (1, 33, 1, 3, 2, 16),
    (2, 64, 1, 2, 1, 64),
    (3, 1, 2, 2, 2, 4),
    (1, 7, 4, 2, 2, 80),
]
# The same sizes and the channels of x, which may differ from heads times head size.
NORM_SIZES = [
    (1, 7, 5, 9, 48, 3, 16),
    (2, 3, 5, 9, 80, 2, 5),
    (1, 2, 5, 9, 16, 3, 1),
    (2, 16, 3, 3, 32, 4, 8),
    (1, 24, 3, 3, 48, 1, 40),
    (1, 32, 2, 3, 128, 2, 64),
    (1, 33, 1, 3, 32, 2, 16),
    (2, 64, 1, 2, 64, 1, 64),
    (3, 1, 2, 2, 16, 2, 4),
    (1, 5, 2, 3, 50, 3, 7),
    (1, 7, 1, 2, 32, 2, 80),
]


def norm_inputs(
    clips: int, frames: int, height: int, width: int, channels: int, inner: int, *, mean: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, the norm's weight and bias, the projection and the position: queries, keys, values are of order one."""
    return (
        normal(clips, frames, height, width, channels, seed=seed, mean=mean),
        normal(channels, seed=seed + 1, mean=1.0, scale=0.3),
        normal(channels, seed=seed + 2, scale=0.3),
        normal(3 * inner, channels, seed=seed + 3, scale=channels**-0.5),
        normal(frames, channels, seed=seed + 4, scale=0.5),
    )


@every_backend("triton")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_equals_the_reference(backend, device, size):
    *shape, heads, head = size
    for dtype in dtypes(backend, device):
        check(backend, device, "temporal_attention", normal(*shape, 3 * heads * head).to(dtype), heads=heads)


@every_backend("triton")
@pytest.mark.parametrize("size", NORM_SIZES, ids=str)
@pytest.mark.parametrize("with_position", [False, True])
def test_norm_attention_equals_the_reference(backend, device, size, with_position):
    *shape, channels, heads, head = size
    inputs = norm_inputs(*shape, channels, heads * head)
    if not with_position:
        inputs = (*inputs[:-1], None)
    for dtype in dtypes(backend, device):
        moved = (None if tensor is None else tensor.to(dtype) for tensor in inputs)
        check(backend, device, "norm_temporal_attention", *moved, heads=heads, eps=1e-5)


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_attention_of_any_size(backend, device, data):
    clips, height, width, heads = (data.draw(st.integers(1, most)) for most in (3, 2, 3, 2))
    frames, head = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 64))
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    layout = data.draw(st.sampled_from(LAYOUTS))
    qkv = laid_out(normal(clips, frames, height, width, 3 * heads * head).to(dtype), layout)
    check(backend, device, "temporal_attention", qkv, heads=heads)


@every_backend("triton")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, device, layout):
    inputs = norm_inputs(2, 7, 3, 5, 48, 32)
    for dtype in dtypes(backend, device):
        qkv = laid_out(normal(2, 7, 3, 5, 48).to(dtype), layout)
        check(backend, device, "temporal_attention", qkv, heads=2)
        # Expanded vectors repeat their first value, expanded matrices their first row.
        moved = (laid_out(tensor.to(dtype), layout) for tensor in inputs)
        check(backend, device, "norm_temporal_attention", *moved, heads=2, eps=1e-5)


@every_backend("triton")
@pytest.mark.parametrize("mean", [100.0, -1000.0])
def test_statistics_survive_a_large_mean(backend, device, mean):
    inputs = norm_inputs(1, 7, 2, 5, 80, 32, mean=mean)
    for dtype in dtypes(backend, device):
        if dtype == torch.bfloat16:
            continue  # its neighbors at 100 are 0.5 apart: the spread is gone before the op begins
        moved = (tensor.to(dtype) for tensor in inputs)
        # float32 rounds a mean of 1000 by 3e-5; torch's layer norm on a CPU, by which Triton's float32 form goes when
        # interpreted, folds it into an offset and loses 2e-4. A variance without a shift would be off by 6e-2.
        scale = abs(mean) / 50 if dtype == torch.float32 else 1.0
        check(backend, device, "norm_temporal_attention", *moved, heads=2, eps=1e-5, scale=scale)


@every_backend("triton")
def test_tokens_without_spread_become_the_bias(backend, device):
    """A variance of zero divides by the root of eps alone."""
    inputs = norm_inputs(1, 3, 2, 2, 32, 16)
    for dtype in dtypes(backend, device):
        x, *others = (tensor.to(dtype) for tensor in inputs)
        check(backend, device, "norm_temporal_attention", torch.full_like(x, 3.0), *others, heads=2, eps=1e-3)


@every_backend("triton")
def test_large_scores_do_not_overflow(backend, device):
    """Scores around 280 have no exponential in float32."""
    for dtype in dtypes(backend, device):
        qkv = normal(1, 7, 3, 3, 24, mean=10.0).to(dtype)
        check(backend, device, "temporal_attention", qkv, heads=1, scale=10.0)


@every_backend("triton")
@pytest.mark.parametrize("op", ["temporal_attention", "norm_temporal_attention"])
def test_pixels_do_not_see_each_other(backend, device, op):
    """Changing one pixel changes no bit of the others, which share its tile of scores."""
    for dtype in dtypes(backend, device):
        if op == "temporal_attention":
            x, *others = [normal(2, 7, 3, 5, 48)]
        else:
            x, *others = norm_inputs(2, 7, 3, 5, 48, 16)
        x, *others = (tensor.to(device, dtype) for tensor in (x, *others))
        changed = x.clone()
        changed[1, :, 1, 2] = -5 * x[1, :, 1, 2] + 3
        with use_backend(backend):
            before, after = (getattr(ops, op)(tensor, *others, heads=2) for tensor in (x, changed))
        different = (before != after).any(-1).any(1)
        assert different[1, 1, 2]
        different[1, 1, 2] = False
        assert not different.any()


@every_backend("triton")
@pytest.mark.parametrize("op", ["temporal_attention", "norm_temporal_attention"])
@pytest.mark.parametrize("axis", [1, 3])
def test_offsets_beyond_32_bits(backend, device, op, axis):
    """Three frames or three pixels 2^30 values apart. Untouched pages take no memory on a CPU."""
    dtype = dtypes(backend, device)[-1]
    if backend == "cpu":
        axis_stride = 2**29  # half as far for 4-byte values, so that both take the same address space
    else:
        axis_stride = 2**30
    shape = [1, 2, 1, 2, 48]
    shape[axis] = 3
    strides = [96, 96, 48, 48, 1]
    strides[axis] = axis_stride
    storage = torch.empty(2 * axis_stride + 200, dtype=dtype, device=device)
    x = storage.as_strided(shape, strides)
    x.copy_(normal(*shape).to(dtype))
    others = [] if op == "temporal_attention" else [t.to(device, dtype) for t in norm_inputs(*shape, 32)[1:]]
    with use_backend(backend):
        far, near = (getattr(ops, op)(tensor, *others, heads=2) for tensor in (x, x.contiguous()))
    torch.testing.assert_close(far, near, rtol=0, atol=0)


@every_backend("triton")
def test_more_pixels_than_a_grid_has_rows(backend, device):
    """CUDA's grids end at 65,535 in y and z."""
    if device != "cuda":
        pytest.skip("a CPU has no grid, and the interpreter no time")
    for dtype in dtypes(backend, device):
        qkv = normal(1, 64, 260, 260, 3).to(dtype)
        with use_backend(backend):
            output = ops.temporal_attention(qkv.to(device), heads=1)
        for crop in ((slice(None), slice(None), slice(2)), (slice(None), slice(None), slice(-2, None))):
            expected = temporal_attention_reference(qkv[crop].double(), 1)
            torch.testing.assert_close(output[crop].cpu().double(), expected, rtol=1.6e-2, atol=3.2e-2)
