"""A linear layer with its residual: every form against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, INTERPRETED, LAYOUTS, check, dtypes, every_backend, laid_out, normal
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend


def inputs(shape: tuple[int, ...], k: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and residual for x of (*shape, k), all sums of order one."""
    return (
        normal(*shape, k, seed=seed),
        normal(n, k, seed=seed + 1, scale=k**-0.5),
        normal(n, seed=seed + 2),
        normal(*shape, n, seed=seed + 3),
    )


@every_backend("triton")
@pytest.mark.parametrize(
    ("shape", "k", "n"),
    [
        ((), 8, 8),
        ((7,), 64, 48),
        ((2, 7, 5, 9), 48, 96),
        ((2, 3, 5, 9), 40, 100),
        ((3, 30), 160, 128),
        ((1, 1), 1, 1),
        ((650,), 16, 100),
        ((65,), 1200, 24),
        # As many of the largest tiles as keep a whole GPU busy.
        pytest.param((1600,), 64, 1280, marks=pytest.mark.skipif(INTERPRETED, reason="too many programs")),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_reference(backend, device, shape, k, n, with_bias):
    x, weight, bias, residual = inputs(shape, k, n)
    for dtype in dtypes(backend, device):
        tensors = (x.to(dtype), weight.to(dtype), bias.to(dtype) if with_bias else None, residual.to(dtype))
        check(backend, device, "linear_residual", *tensors)


@every_backend("triton")
def test_tiles_of_large_grids(backend, device, monkeypatch):
    """Triton's kernel has wider tiles where there are enough of them."""
    if backend != "triton":
        pytest.skip("the other forms have no tiles")
    from videopure_fast.kernels import launch

    monkeypatch.setattr(launch, "TILES_TO_FILL_GPU", 0)
    for dtype in dtypes(backend, device):
        for n in (64, 128):
            check(backend, device, "linear_residual", *(tensor.to(dtype) for tensor in inputs((5, 50), 80, n)))


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_layout(backend, device, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    k, n = (data.draw(st.integers(1, 100)) for _ in range(2))
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(4)]
    tensors = (laid_out(tensor.to(dtype), layout) for tensor, layout in zip(inputs(shape, k, n), layouts, strict=True))
    check(backend, device, "linear_residual", *tensors)


@every_backend("triton")
def test_offsets_beyond_32_bits(backend, device):
    """Three rows of x and residual 2^30 values apart. Untouched pages take no memory on a CPU."""
    dtype = dtypes(backend, device)[-1]
    stride = 2**30 if dtype.itemsize == 2 else 2**29
    tensors = [tensor.to(device, dtype) for tensor in inputs((3,), 32, 48)]
    far = [torch.empty(2 * stride + 48, dtype=dtype, device=device) for _ in range(2)]
    x = far[0].as_strided((3, 32), (stride, 1)).copy_(tensors[0])
    residual = far[1].as_strided((3, 48), (stride, 1)).copy_(tensors[3])
    with use_backend(backend):
        actual = ops.linear_residual(x, *tensors[1:3], residual)
        expected = ops.linear_residual(*tensors)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
