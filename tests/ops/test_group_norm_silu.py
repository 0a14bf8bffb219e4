"""GroupNorm with SiLU against its reference: odd sizes, any layout, two sources, small and large samples and means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, check, dtypes, every_backend, laid_out, normal
from torch import Tensor

# Channels and groups: groups of 8, 5 and 6 channels, one group, groups of one channel, a group wider than a tile.
CHANNELS = [(24, 3), (40, 8), (30, 5), (24, 1), (24, 24), (1, 1), (200, 1)]
# Frames that the Triton form normalizes in one kernel, and in two.
SMALL = (1, 2, 5, 9)
LARGE = (1, 1, 19, 28)
SETTINGS = {"groups": 8, "eps": 1e-5, "over_frames": False, "silu": True}


def inputs(*shape: int, embedding: bool, skip: int = 0, mean: float = 0.0, seed: int = 0) -> list[Tensor | None]:
    """x of a shape, weight, bias, embedding, and a skip of so many of the shape's channels."""
    *leading, channels = shape
    x = normal(*shape, seed=seed, mean=mean)
    return [
        x[..., : channels - skip].contiguous(),
        normal(channels, seed=seed + 1, mean=1.0),
        normal(channels, seed=seed + 2),
        normal(leading[0], channels, seed=seed + 3) if embedding else None,
        x[..., channels - skip :].contiguous() if skip else None,
    ]


def cast(tensors: list[Tensor | None], dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor | None]:
    return [None if t is None else laid_out(t.to(dtype), layout) for t in tensors]


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    clips=st.sampled_from([1, 2, 3]),
    frames=st.sampled_from([1, 2, 7, 16]),
    size=st.sampled_from([(1, 1), (5, 9)]),
    channels=st.sampled_from(CHANNELS),
    embedding=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 0.5]),
    over_frames=st.booleans(),
    silu=st.booleans(),
    mean=st.sampled_from([0.0, 100.0]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_group_norm_silu(
    backend, device, clips, frames, size, channels, embedding, share, over_frames, silu, mean, layout, seed
):
    """share: that of the channels which come from the skip; 0.3 splits a group."""
    channels, groups = channels
    skip = int(share * channels)
    tensors = inputs(clips, frames, *size, channels, embedding=embedding, skip=skip, mean=mean, seed=seed)
    for dtype in dtypes(backend, device):
        moved = cast(tensors, dtype, layout)
        check(backend, device, "group_norm_silu", *moved, groups=groups, eps=1e-5, over_frames=over_frames, silu=silu)


@every_backend("triton")
@pytest.mark.parametrize(("channels", "groups"), [(80, 8), (70, 2), (150, 5)])
@pytest.mark.parametrize("skip", [0, 30])
@pytest.mark.parametrize(("shape", "over_frames"), [(SMALL, False), (LARGE, False), ((2, 7, 5, 9), True)], ids=str)
def test_small_and_large_samples(backend, device, channels, groups, skip, shape, over_frames):
    """Groups that reach over blocks of channels, and over both sources."""
    tensors = inputs(*shape, channels, embedding=True, skip=skip, mean=100.0, seed=7)
    settings = {**SETTINGS, "groups": groups, "over_frames": over_frames}
    for dtype in dtypes(backend, device):
        check(backend, device, "group_norm_silu", *cast(tensors, dtype), **settings)


@every_backend("triton")
@pytest.mark.parametrize(("shape", "unused"), [(SMALL, "_statistics_kernel"), (LARGE, "_whole_sample_kernel")], ids=str)
def test_which_kernels_a_sample_takes(backend, device, shape, unused, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr(f"videopure_fast.kernels.group_norm_silu.{unused}", None)
    check(backend, device, "group_norm_silu", *inputs(*shape, 80, embedding=True), **SETTINGS)


@every_backend("triton")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("over_frames", [False, True])
@pytest.mark.parametrize("skip", [0, 15])
def test_any_layout(backend, device, layout, over_frames, skip):
    tensors = inputs(2, 3, 5, 9, 40, embedding=True, skip=skip, seed=9)
    for dtype in dtypes(backend, device):
        moved = cast(tensors, dtype, layout)
        check(backend, device, "group_norm_silu", *moved, **{**SETTINGS, "over_frames": over_frames})


@every_backend("triton")
@pytest.mark.parametrize("skip", [0, 16])
@pytest.mark.parametrize("most", [2, 64])
def test_chunks_of_several_tiles(backend, device, skip, most, monkeypatch):
    """Small tiles and few chunks, so that each has several tiles, as with many thousands of pixels; and many chunks."""
    if backend == "triton":
        for name, value in (("WARP_BYTES", 64), ("FEWEST_PROGRAMS", 10**6), ("MAX_CHUNKS", most), ("SUMS_TILE", 128)):
            monkeypatch.setattr(f"videopure_fast.kernels.group_norm_silu.{name}", value)
    tensors = inputs(1, 1, 17, 16, 80, embedding=True, skip=skip, mean=100.0, seed=13)
    for dtype in dtypes(backend, device):
        check(backend, device, "group_norm_silu", *cast(tensors, dtype), **SETTINGS)


@every_backend("triton")
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("kind", ["constant", "far first value", "groups far apart", "far from zero", "tiny"])
def test_hard_values(backend, device, shape, kind):
    """Variance 0; an outlier in the first pixel; means that differ between channels; a mean of 1000 standard
    deviations; an eps that dominates."""
    x, weight, bias, _, _ = inputs(*shape, 80, embedding=False, seed=11)
    if kind == "constant":
        x = torch.full_like(x, 3.0)
    elif kind == "far first value":
        x[:, :, 0, 0] += 1000.0
    elif kind == "groups far apart":
        x += 100.0 * torch.arange(8).repeat_interleave(10)
    elif kind == "far from zero":
        x += 1000.0
    else:
        x *= 1e-3
    for dtype in dtypes(backend, device):
        tensors = cast([x, weight, bias, None, None], dtype)
        check(backend, device, "group_norm_silu", *tensors, **{**SETTINGS, "eps": 1e-6, "silu": False})


@every_backend("triton")
def test_silu_of_any_size(backend, device):
    """With zero weight the op is SiLU of the bias, one channel a value: no NaN where exp overflows."""
    for dtype in dtypes(backend, device):
        largest = min(torch.finfo(dtype).max, 1e30)
        values = torch.cat([torch.linspace(-1e4, 1e4, 1001), torch.linspace(-120, 120, 1001)])
        values = torch.cat([values, torch.tensor([-largest, largest, 0.0])]).to(dtype)
        zeros = torch.zeros_like(values)
        tensors = zeros.view(1, 1, 1, 1, -1), zeros, values, None, None
        check(backend, device, "group_norm_silu", *tensors, **{**SETTINGS, "groups": 1})


@every_backend("triton")
@pytest.mark.parametrize(("rows", "far"), [(300, 4), (600, 0)], ids=["skip in one kernel", "x in two"])
def test_rows_beyond_32_bits(backend, device, rows, far, tmp_path, monkeypatch):
    """Rows 2^23 values apart, in a sparse file."""
    if backend == "triton":
        monkeypatch.setattr("videopure_fast.kernels.group_norm_silu.FEW_ROWS", 300)
    dtype = dtypes(backend, device)[-1] if backend == "triton" else torch.float32
    tensors = cast(inputs(1, 1, rows, 1, 24, embedding=False, skip=8), dtype)
    small, apart = tensors[far], 2**23
    size = (rows - 1) * apart + small.shape[-1]
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=size, dtype=dtype)
    tensors[far] = memory.as_strided(small.shape, (0, 0, apart, 0, 1))
    tensors[far].copy_(small)
    check(backend, device, "group_norm_silu", *tensors, **{**SETTINGS, "groups": 3, "over_frames": True})


@every_backend("triton")
@pytest.mark.parametrize("size", [(2, 3), (30, 41)], ids=str)
@pytest.mark.parametrize("far", [0, 4], ids=["x", "skip"])
def test_offsets_beyond_32_bits(backend, device, size, far, tmp_path):
    """The third clip begins 2^31 values after the first, in a sparse file."""
    dtype = dtypes(backend, device)[-1] if backend == "triton" else torch.float32
    tensors = cast(inputs(3, 1, *size, 24, embedding=True, skip=8), dtype)
    small, apart = tensors[far], 2**30
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2 * apart + small[0].numel(), dtype=dtype)
    tensors[far] = memory.as_strided(small.shape, (apart, *small.stride()[1:]))
    tensors[far].copy_(small)
    check(backend, device, "group_norm_silu", *tensors, **{**SETTINGS, "groups": 3, "over_frames": True})
