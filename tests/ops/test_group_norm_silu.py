"""GroupNorm with SiLU against its reference: odd sizes, any layout, samples small and large, values far from zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, check, dtypes, every_backend, laid_out, normal
from torch import Tensor

# Channels and groups: groups of 8, 5 and 6 channels, one group, groups of one channel, a group wider than a tile.
CHANNELS = [(24, 3), (40, 8), (30, 5), (24, 1), (24, 24), (1, 1), (200, 1)]
# Frames of 80 channels that the Triton form normalizes in one kernel, and in two.
ONE_PASS = (1, 2, 5, 9)
TWO_PASS = (2, 2, 19, 28)


def inputs(*shape: int, embedding: bool, mean: float = 0.0, seed: int = 0) -> list[Tensor | None]:
    clips, channels = shape[0], shape[-1]
    return [
        normal(*shape, seed=seed, mean=mean),
        normal(channels, seed=seed + 1, mean=1.0),
        normal(channels, seed=seed + 2),
        normal(clips, channels, seed=seed + 3) if embedding else None,
    ]


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    clips=st.sampled_from([1, 2, 3]),
    frames=st.sampled_from([1, 2, 7, 16]),
    size=st.sampled_from([(1, 1), (5, 9)]),
    channels=st.sampled_from(CHANNELS),
    embedding=st.booleans(),
    over_frames=st.booleans(),
    silu=st.booleans(),
    mean=st.sampled_from([0.0, 100.0]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_group_norm_silu(
    backend, device, clips, frames, size, channels, embedding, over_frames, silu, mean, layout, seed
):
    channels, groups = channels
    tensors = inputs(clips, frames, *size, channels, embedding=embedding, mean=mean, seed=seed)
    for dtype in dtypes(backend, device):
        moved = [None if t is None else laid_out(t.to(dtype), layout) for t in tensors]
        check(backend, device, "group_norm_silu", *moved, groups=groups, eps=1e-5, over_frames=over_frames, silu=silu)


@every_backend("triton")
@pytest.mark.parametrize(("channels", "groups"), [(80, 8), (70, 2)])
@pytest.mark.parametrize(("shape", "over_frames"), [(ONE_PASS, False), (TWO_PASS, False), ((2, 7, 5, 9), True)])
def test_small_and_large_samples(backend, device, channels, groups, shape, over_frames):
    for dtype in dtypes(backend, device):
        tensors = [t.to(dtype) for t in inputs(*shape, channels, embedding=True, mean=100.0, seed=7)]
        check(backend, device, "group_norm_silu", *tensors, groups=groups, eps=1e-5, over_frames=over_frames, silu=True)


@every_backend("triton")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("over_frames", [False, True])
def test_any_layout(backend, device, layout, over_frames):
    options = {"groups": 8, "eps": 1e-5, "over_frames": over_frames, "silu": True}
    for dtype in dtypes(backend, device):
        tensors = [laid_out(t.to(dtype), layout) for t in inputs(2, 3, 5, 9, 40, embedding=True, seed=9)]
        check(backend, device, "group_norm_silu", *tensors, **options)


@every_backend("triton")
@pytest.mark.parametrize("programs", [1, 12])
def test_chunks_of_several_tiles(backend, device, programs, monkeypatch):
    """Few programs are asked for, so that each gets many chunks, as with many thousands of pixels."""
    if backend == "triton":
        monkeypatch.setattr("videopure_fast.kernels.group_norm_silu.PROGRAMS", programs)
    options = {"groups": 8, "eps": 1e-5, "over_frames": False, "silu": True}
    for dtype in dtypes(backend, device):
        tensors = [t.to(dtype) for t in inputs(*TWO_PASS, 80, embedding=True, mean=100.0, seed=13)]
        check(backend, device, "group_norm_silu", *tensors, **options)


@every_backend("triton")
@pytest.mark.parametrize("shape", [ONE_PASS, TWO_PASS], ids=str)
@pytest.mark.parametrize("kind", ["constant", "far first value", "groups far apart", "tiny"])
def test_hard_values(backend, device, shape, kind):
    """Variance 0; an outlier in the first pixel; means that differ between channels; an eps that dominates."""
    for dtype in dtypes(backend, device):
        x, weight, bias, _ = inputs(*shape, 80, embedding=False, seed=11)
        if kind == "constant":
            x = torch.full_like(x, 3.0)
        elif kind == "far first value":
            x[:, :, 0, 0] += 1000.0
        elif kind == "groups far apart":
            x += 100.0 * torch.arange(8).repeat_interleave(10)
        else:
            x *= 1e-3
        tensors = [t.to(dtype) for t in (x, weight, bias)]
        check(backend, device, "group_norm_silu", *tensors, None, groups=8, eps=1e-6, over_frames=False, silu=False)


@every_backend("triton")
@pytest.mark.parametrize("size", [(2, 3), (30, 41)], ids=str)
def test_offsets_beyond_32_bits(backend, device, size, tmp_path):
    """The third clip begins 2^31 values after the first, in a sparse file."""
    dtype = dtypes(backend, device)[-1] if backend == "triton" else torch.float32
    small, weight, bias, embedding = (t.to(dtype) for t in inputs(3, 1, *size, 24, embedding=True))
    apart = 2**30
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2 * apart + small[0].numel(), dtype=dtype)
    x = memory.as_strided(small.shape, (apart, *small.stride()[1:]))
    x.copy_(small)
    check(
        backend,
        device,
        "group_norm_silu",
        *(x, weight, bias, embedding),
        groups=3,
        eps=1e-5,
        over_frames=True,
        silu=True,
    )
