"""Sums that end a residual block, alone and with a norm, against their references: sizes, layouts, both results."""

from __future__ import annotations

import pytest
import torch
from op_cases import INTERPRETED, LAYOUTS, TOLERANCE, assert_equal, check, dtypes, every_backend, laid_out, normal, run
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import OPS

# Frames that the Triton form normalizes in one kernel, and in two. Channels and groups: groups over several blocks of
# channels, groups of one channel, a single channel.
SMALL, LARGE = (2, 2, 5, 9), (1, 1, 19, 28)
CHANNELS = [(80, 8), (70, 2), (24, 24), (1, 1)]


def inputs(*shape: int, bias: bool, mean: float = 0.0, seed: int = 0) -> list[Tensor | None]:
    """x, addend and addend_bias."""
    x, addend = normal(*shape, seed=seed, mean=mean), normal(*shape, seed=seed + 1)
    return [x, addend, normal(shape[-1], seed=seed + 2) if bias else None]


def cast(tensors: list[Tensor | None], dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor | None]:
    return [None if t is None else laid_out(t.to(dtype), layout) for t in tensors]


def check_sum(backend: str, device: str, *tensors: Tensor | None) -> None:
    check("reference" if backend == "cpu" else backend, device, "residual_add", *tensors)


def check_norm(backend: str, device: str, *tensors: Tensor | None, groups: int, over_frames: bool = False) -> None:
    """The sum equals its reference's, and the norm is that of the sum as it was rounded."""
    channels = tensors[0].shape[-1]
    affine = [t.to(tensors[0].dtype) for t in (normal(channels, seed=8, mean=1.0), normal(channels, seed=9))]
    settings = {"groups": groups, "eps": 1e-5, "over_frames": over_frames, "silu": True}
    total, normalized = run(backend, device, "add_group_norm_silu", *tensors, *affine, **settings)
    expected = OPS["residual_add"].reference(*(None if t is None else t.double() for t in tensors))
    assert_equal(total, expected, tensors[0].dtype)
    wide = (t.cpu().double() for t in (total, *affine))
    expected = OPS["group_norm_silu"].reference(*wide, None, None, *settings.values())
    assert_equal(normalized, expected, tensors[0].dtype)


@every_backend("triton")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [1, 24, 70, 320])
def test_residual_add(backend, device, channels, bias, layout):
    tensors = inputs(2, 3, 3, 5, channels, bias=bias)
    for dtype in dtypes(backend, device):
        check_sum(backend, device, *cast(tensors, dtype, layout))


@every_backend("triton")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("channels", "groups"), CHANNELS)
@pytest.mark.parametrize(("shape", "over_frames"), [(SMALL, False), (LARGE, False), (SMALL, True)], ids=str)
def test_add_group_norm_silu(backend, device, channels, groups, bias, shape, over_frames):
    tensors = inputs(*shape, channels, bias=bias, mean=100.0)
    for dtype in dtypes(backend, device):
        check_norm(backend, device, *cast(tensors, dtype), groups=groups, over_frames=over_frames)


@every_backend("triton")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_any_layout(backend, device, shape, layout):
    tensors = inputs(*shape, 40, bias=True)
    for dtype in dtypes(backend, device):
        check_norm(backend, device, *cast(tensors, dtype, layout), groups=8)


@every_backend("triton")
@pytest.mark.parametrize(("shape", "unused"), [(SMALL, "_statistics_kernel"), (LARGE, "_whole_sample_kernel")], ids=str)
def test_which_kernels_a_sample_takes(backend, device, shape, unused, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr(f"videopure_fast.kernels.group_norm_silu.{unused}", None)
    check_norm(backend, device, *inputs(*shape, 40, bias=True), groups=8)


@every_backend("triton")
def test_the_norm_is_that_of_the_rounded_sum(backend, device):
    """Values that half precision rounds to a third of their deviation: the exact sum's norm differs visibly."""
    dtype = dtypes(backend, device)[-1]
    tensors = cast(inputs(*LARGE, 40, bias=True, mean=1000.0), dtype)
    check_norm(backend, device, *tensors, groups=8)
    if dtype != torch.float32:
        exact = OPS["residual_add"].reference(*(t.double() for t in tensors))
        assert (exact - exact.to(dtype).double()).abs().max() > 10 * TOLERANCE[dtype]["atol"]


@pytest.mark.skipif(INTERPRETED, reason="checks no kernel")
@pytest.mark.parametrize("wanted", ["sum", "norm", "both"])
def test_gradients_of_both_results(wanted):
    settings = {"groups": 2, "eps": 1e-5, "over_frames": False, "silu": True}
    tensors = [*inputs(2, 2, 2, 3, 8, bias=True), normal(8, seed=8, mean=1.0), normal(8, seed=9)]
    gradients = []
    for function in (ops.add_group_norm_silu, OPS["add_group_norm_silu"].reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        results = dict(zip(("sum", "norm"), function(*leaves, **settings), strict=True))
        chosen = results.values() if wanted == "both" else [results[wanted]]
        sum((r * normal(*r.shape, seed=7)).sum() for r in chosen).backward()
        gradients.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    torch.testing.assert_close(*gradients)
