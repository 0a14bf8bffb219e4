"""Attention over frames after a folded norm: every form against the reference, fused and not, and every pixel alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, INTERPRETED, LAYOUTS, check, laid_out, normal, run, triton_alone
from op_cases import dtypes as all_dtypes
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend
from videopure_fast.ops.folded_linear import fold_norm
from videopure_fast.ops.linear_moments import row_moments
from videopure_fast.ops.norm_temporal_attention import norm_temporal_attention_reference

# In the interpreter, the kernel as it is for either: with pointers, or with tensor descriptors.
ARCHITECTURES = (80, 90) if INTERPRETED else (None,)
# Clips, frames, height, width, channels, heads and head size: short and long clips, tiles with a rest, moments of one
# part and of several, the last one shorter, and heads too large for one kernel.
SIZES = [
    (1, 1, 1, 3, 32, 2, 4),
    (3, 2, 5, 7, 96, 2, 16),
    (1, 7, 5, 7, 48, 3, 5),
    (2, 16, 3, 3, 32, 4, 8),
    (1, 16, 7, 7, 64, 1, 8),
    (1, 24, 3, 3, 320, 1, 40),
    (1, 32, 1, 1, 128, 1, 64),
    (2, 32, 1, 3, 304, 1, 64),
    (1, 33, 1, 3, 32, 2, 16),
    (2, 64, 1, 2, 160, 1, 64),
    (1, 7, 1, 2, 32, 2, 80),
    (1, 5, 2, 3, 50, 3, 7),
]


@pytest.fixture(params=ARCHITECTURES, autouse=True, scope="module")
def architecture(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param is not None:
            pytest.importorskip("triton")
            patch.setattr("videopure_fast.kernels.launch.architecture", lambda: request.param)
        yield request.param


def dtypes(backend: str, device: str, architecture: int | None) -> list[torch.dtype]:
    """Those to check with: float32 has no descriptors."""
    return [dtype for dtype in all_dtypes(backend, device) if architecture != 90 or dtype != torch.float32]


def norm_inputs(
    *shape: int, inner: int, dtype: torch.dtype, mean: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, the norm's weight and bias, and the projection: queries, keys and values are of order one."""
    channels = shape[-1]
    signs = normal(*shape[:-1], 1, seed=seed + 4).sign()
    return (
        (normal(*shape, seed=seed) + mean * signs).to(dtype),
        normal(channels, seed=seed + 1, mean=1.0, scale=0.3).to(dtype),
        normal(channels, seed=seed + 2, scale=0.3).to(dtype),
        normal(3 * inner, channels, seed=seed + 3, scale=channels**-0.5).to(dtype),
    )


def folded_inputs(*shape: int, inner: int, dtype: torch.dtype, **others: float) -> tuple[Tensor, ...]:
    x, norm_weight, norm_bias, weight = norm_inputs(*shape, inner=inner, dtype=dtype, **others)
    return x, row_moments(x), *fold_norm(norm_weight, norm_bias, weight)


@triton_alone
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_equals_the_reference(backend, device, architecture, size, mean):
    *shape, heads, head = size
    for dtype in dtypes(backend, device, architecture):
        if mean and dtype == torch.bfloat16:
            continue  # its neighbors at 100 are 0.5 apart: the spread is gone before the op begins
        inputs = folded_inputs(*shape, inner=heads * head, dtype=dtype, mean=mean)
        # float32 rounds the products of a mean of 100 by 1e-5.
        scale = 10.0 if mean and dtype == torch.float32 else 1.0
        check(backend, device, "folded_temporal_attention", *inputs, heads=heads, eps=1e-5, scale=scale)


@triton_alone
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size(backend, device, architecture, data):
    clips, height, width, heads = (data.draw(st.integers(1, most)) for most in (3, 2, 3, 2))
    frames, head, blocks = (data.draw(st.integers(1, most)) for most in (64, 64, 6))
    dtype = data.draw(st.sampled_from(dtypes(backend, device, architecture)))
    inputs = folded_inputs(clips, frames, height, width, 16 * blocks, inner=heads * head, dtype=dtype)
    check(backend, device, "folded_temporal_attention", *inputs, heads=heads, eps=1e-5)


@triton_alone
@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 100.0])
def test_large_means_cost_no_accuracy(backend, device, mean):
    """Rows whose mean is up to 100 times their spread: the error is at most 1.25 times the unfolded chain's."""
    x, *norm = norm_inputs(1, 32, 3, 5, 320, inner=128, dtype=torch.float16, mean=mean)
    expected = norm_temporal_attention_reference(*(t.double() for t in (x, *norm)), None, 2, 1e-5)
    chain = run(backend, device, "norm_temporal_attention", x, *norm, None, heads=2)
    folded = run(backend, device, "folded_temporal_attention", x, row_moments(x), *fold_norm(*norm), heads=2)
    errors = [(result.cpu().double() - expected).square().mean().sqrt() for result in (folded, chain)]
    assert errors[0] <= 1.25 * errors[1]


@triton_alone
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, device, architecture, layout):
    for dtype in dtypes(backend, device, architecture):
        x, _, weight, _, bias = folded_inputs(2, 7, 3, 5, 48, inner=32, dtype=dtype)
        x, weight, bias = (laid_out(tensor, layout) for tensor in (x, weight, bias))
        # Expanded tensors repeat their first clip or row, and their moments and sums do.
        moments, sums = (laid_out(tensor, layout) for tensor in (row_moments(x), weight.double().sum(1).float()))
        inputs = x, moments, weight, sums, bias
        check(backend, device, "folded_temporal_attention", *inputs, heads=2, eps=1e-5)


@triton_alone
def test_tokens_without_spread_become_the_bias(backend, device, architecture):
    """A variance of zero divides by the root of eps alone."""
    for dtype in dtypes(backend, device, architecture):
        x, _, *folded = folded_inputs(1, 3, 2, 2, 32, inner=16, dtype=dtype)
        x = torch.full_like(x, 3.0)
        check(backend, device, "folded_temporal_attention", x, row_moments(x), *folded, heads=2, eps=1e-3)


@triton_alone
@pytest.mark.parametrize("frames", [7, 16])
def test_pixels_do_not_see_each_other(backend, device, architecture, frames):
    """Changing one pixel changes no bit of the others, which share its tile of scores."""
    for dtype in dtypes(backend, device, architecture):
        x, _, *folded = folded_inputs(2, frames, 3, 5, 48, inner=32, dtype=dtype)
        changed = x.clone()
        changed[1, :, 1, 2] = -5 * x[1, :, 1, 2] + 3
        before, after = (
            run(backend, device, "folded_temporal_attention", tensor, row_moments(tensor), *folded, heads=2)
            for tensor in (x, changed)
        )
        different = (before != after).any(-1).any(1)
        assert different[1, 1, 2]
        different[1, 1, 2] = False
        assert not different.any()


@triton_alone
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_offsets_beyond_32_bits(backend, device, axis):
    """Three clips, frames or pixels 2^30 values apart. Untouched pages take no memory on a CPU."""
    shape, strides = [1, 2, 1, 2, 48], [96, 96, 48, 48, 1]
    shape[axis], strides[axis] = 3, 2**30
    storage = torch.empty(2 * 2**30 + 200, dtype=torch.float16, device=device)
    far = storage.as_strided(shape, strides)
    x, *others = (t.to(device) for t in folded_inputs(*shape, inner=32, dtype=torch.float16))
    far.copy_(x)
    with use_backend(backend):
        results = [ops.folded_temporal_attention(tensor, *others, heads=2) for tensor in (far, x)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@triton_alone
def test_every_candidate_equals_the_reference(backend, device, architecture):
    """One kernel with any of its tiles, or two."""
    from videopure_fast.kernels.folded_temporal_attention import UNFUSED
    from videopure_fast.kernels.tuned import forced, recorded

    for dtype in set(dtypes(backend, device, architecture)) - {torch.float32}:
        inputs = folded_inputs(1, 24, 1, 5, 160, inner=32, dtype=dtype)
        with recorded() as choices:
            run(backend, device, "folded_temporal_attention", *inputs, heads=2)
        ((op, key, candidates, reasoned),) = choices
        assert reasoned != UNFUSED and candidates[-1] == UNFUSED
        for candidate in candidates:
            with forced(op, key, candidate):
                check(backend, device, op, *inputs, heads=2, eps=1e-5)


@triton_alone
def test_wide_tokens_take_two_kernels(backend, device, architecture):
    """Where nothing was measured."""
    from videopure_fast.kernels.folded_temporal_attention import UNFUSED
    from videopure_fast.kernels.tuned import recorded

    inputs = folded_inputs(1, 1, 1, 1, 512, inner=64, dtype=torch.float16)
    with recorded() as choices:
        run(backend, device, "folded_temporal_attention", *inputs, heads=1)
    assert choices[0].reasoned == UNFUSED


@pytest.mark.parametrize(
    ("channels", "head", "dtype", "expected"),
    [
        (320, 64, torch.float16, True),
        (320, 64, torch.bfloat16, True),
        (32, 4, torch.float16, True),
        (1280, 64, torch.float16, True),
        (320, 64, torch.float32, False),
        (320, 80, torch.float16, False),
        (312, 8, torch.float16, False),
    ],
)
def test_what_can_be_fused(channels, head, dtype, expected):
    pytest.importorskip("triton")
    from videopure_fast.kernels.folded_temporal_attention import fusable

    x, weight = torch.empty(1, 4, 9, channels, dtype=dtype), torch.empty(6 * head, channels, dtype=dtype)
    assert fusable(x, weight, 2) == expected
    # What no descriptor describes: rows that overlap, and addresses that are no multiples of 16 bytes.
    assert not fusable(x[:, :, :1].expand(x.shape), weight, 2)
    moved = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape)
    assert not fusable(moved, weight, 2)
    assert not fusable(x, weight.T.contiguous().T, 2)
