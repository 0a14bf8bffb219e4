"""A linear layer with its residual: every form against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, INTERPRETED, LAYOUTS, check, dtypes, every_backend, laid_out, normal, triton_alone
from product_cases import far_rows, loading, loads
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend


def inputs(shape: tuple[int, ...], k: int, n: int, skip: int = 0, seed: int = 0) -> list[Tensor | None]:
    """x, weight, bias, residual and a skip connection of `skip` channels, for x of (*shape, k); sums of order one."""
    return [
        normal(*shape, k, seed=seed),
        normal(n, k + skip, seed=seed + 1, scale=(k + skip) ** -0.5),
        normal(n, seed=seed + 2),
        normal(*shape, n, seed=seed + 3),
        normal(*shape, skip, seed=seed + 4) if skip else None,
    ]


def cast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


@every_backend("triton")
@pytest.mark.parametrize(
    ("shape", "k", "n"),
    [
        ((), 8, 8),
        ((7,), 64, 48),
        ((2, 3, 5, 9), 48, 96),
        ((2, 3, 3, 9), 40, 100),
        ((3, 30), 160, 128),
        ((1, 1), 1, 1),
        ((290,), 16, 100),
        ((65,), 1200, 24),
        # As many of the largest tiles as keep a whole GPU busy.
        pytest.param((1600,), 64, 1280, marks=pytest.mark.skipif(INTERPRETED, reason="too many programs")),
    ],
)
@pytest.mark.parametrize("skip", [0, 56])
def test_equals_the_reference(backend, device, shape, k, n, skip):
    x, weight, bias, residual, further = inputs(shape, k, n, skip)
    for dtype in dtypes(backend, device):
        tensors = cast([x, weight, bias, residual, further], dtype)
        for way in loads(backend, device):
            with loading(way):
                check(backend, device, "linear_residual", *tensors)


@every_backend("triton")
def test_without_a_bias(backend, device):
    x, weight, _, residual, _ = inputs((70,), 48, 96)
    for dtype in dtypes(backend, device):
        for way in loads(backend, device):
            with loading(way):
                check(backend, device, "linear_residual", *cast([x, weight, None, residual, None], dtype))


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_layout(backend, device, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    k, n, skip = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100)), data.draw(st.integers(0, 70))
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    tensors = [
        tensor if tensor is None else laid_out(tensor.to(dtype), data.draw(st.sampled_from(LAYOUTS)))
        for tensor in inputs(shape, k, n, skip)
    ]
    check(backend, device, "linear_residual", *tensors)


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_aligned_size(backend, device, data):
    """Sizes that have tensor descriptors in half precision, fewer and more than a tile has."""
    shape = (data.draw(st.integers(1, 150)),)
    k, n, skip = (8 * data.draw(st.integers(least, 22)) for least in (1, 1, 0))
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    with loading(loads(backend, device)[-1]):
        check(backend, device, "linear_residual", *cast(inputs(shape, k, n, skip), dtype))


@triton_alone
def test_the_library_multiplies_many_inputs(backend, device, monkeypatch):
    """In half precision, by the rule of Triton's form; in float32 they are summed as ever."""
    monkeypatch.setattr("videopure_fast.kernels.linear_residual.MIN_LIBRARY_INPUTS", 40)
    for dtype in dtypes(backend, device):
        for k in (32, 40):
            check(backend, device, "linear_residual", *cast(inputs((7,), k, 24), dtype))


@every_backend("triton")
def test_offsets_beyond_32_bits(backend, device):
    """300 rows of x, skip and residual 2^23 values apart, as near as kernels take them as they are.

    Untouched pages take no memory on a CPU.
    """
    dtype = dtypes(backend, device)[-1]
    x, weight, bias, residual, skip = (tensor.to(device, dtype) for tensor in inputs((300,), 32, 48, 16))
    far = [far_rows(tensor) for tensor in (x, residual, skip)]
    with use_backend(backend):
        actual = ops.linear_residual(far[0], weight, bias, *far[1:])
        expected = ops.linear_residual(x, weight, bias, residual, skip)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
