"""A linear layer with the moments of its rows: against the reference, and against the rows as they are stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, assert_equal, dtypes, laid_out, normal, run, triton_alone
from product_cases import loading, loads
from torch import Tensor

from videopure_fast.ops.backend import OPS
from videopure_fast.ops.linear_moments import part_columns, row_moments


def inputs(
    shape: tuple[int, ...], k: int, n: int, *, residual: bool, seed: int = 0, mean: float = 0.0
) -> list[Tensor | None]:
    """x, weight, bias of a mean, and residual for x of (*shape, k); all sums of order one, but for the mean."""
    return [
        normal(*shape, k, seed=seed),
        normal(n, k, seed=seed + 1, scale=k**-0.5),
        normal(n, seed=seed + 2, mean=mean),
        normal(*shape, n, seed=seed + 3) if residual else None,
    ]


def check_moments(backend: str, device: str, tensors: list[Tensor | None], dtype: torch.dtype) -> None:
    """The layer equals its reference, and the moments are those of its values as they are stored."""
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    with torch.no_grad():
        expected, _ = OPS["linear_moments"].reference(*(t if t is None else t.double() for t in tensors))
    actual, moments = run(backend, device, "linear_moments", *tensors)
    assert_equal(actual, expected, dtype, scale=1 + expected.abs().max().item() / 8)
    parts = actual.cpu().double().split(part_columns(actual.shape[-1]), -1)
    means = torch.stack([part.mean(-1) for part in parts], -1)
    deviations = torch.stack([part.var(-1, correction=0) * part.shape[-1] for part in parts], -1)
    assert moments.shape == (*means.shape, 2)
    assert moments.dtype == torch.float32
    assert moments.is_contiguous()
    torch.testing.assert_close(moments[..., 0].cpu().double(), means, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[..., 1].cpu().double(), deviations, rtol=1e-4, atol=1e-5)


@triton_alone
@pytest.mark.parametrize(
    ("shape", "k", "n"),
    # One part and several, of 160 and of 128 columns, whole and not; one row, and more than a tile has.
    [((1,), 8, 8), ((), 24, 160), ((130,), 40, 320), ((2, 7, 5), 72, 128), ((3, 30), 64, 296), ((65,), 37, 101)],
)
@pytest.mark.parametrize("residual", [False, True])
def test_equals_the_reference(backend, device, shape, k, n, residual):
    for dtype in dtypes(backend, device):
        for way in loads(backend, device):
            with loading(way):
                check_moments(backend, device, inputs(shape, k, n, residual=residual), dtype)


@triton_alone
@pytest.mark.parametrize("mean", [100.0, -1000.0])
@pytest.mark.parametrize("n", [160, 200])
def test_moments_survive_a_large_mean(backend, device, mean, n):
    for dtype in dtypes(backend, device):
        check_moments(backend, device, inputs((9,), 48, n, residual=True, mean=mean), dtype)


@triton_alone
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_layout(backend, device, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    k, n = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 330))
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    tensors = [
        tensor if tensor is None else laid_out(tensor.to(dtype), data.draw(st.sampled_from(LAYOUTS)))
        for tensor in inputs(shape, k, n, residual=data.draw(st.booleans()))
    ]
    with loading(data.draw(st.sampled_from(loads(backend, device)))):
        check_moments(backend, device, tensors, dtype)


@triton_alone
def test_without_a_bias(backend, device):
    x, weight, _, residual = inputs((17,), 40, 320, residual=True)
    for dtype in dtypes(backend, device):
        check_moments(backend, device, [x, weight, None, residual], dtype)


def test_moments_of_rows():
    """Of 300 values there are parts of 128, 128 and 44; of 320, two of 160. No gradient flows through them."""
    assert row_moments(normal(2, 3, 300, mean=3.0)).shape == (2, 3, 3, 2)
    x = normal(4, 320, mean=3.0).requires_grad_()
    moments = row_moments(x)
    assert not moments.requires_grad
    first = x[:, :160].detach().double()
    torch.testing.assert_close(moments[:, 0, 0].double(), first.mean(-1), rtol=1e-6, atol=1e-6)
    deviations = (first - first.mean(-1, keepdim=True)).square().sum(-1)
    torch.testing.assert_close(moments[:, 0, 1].double(), deviations, rtol=1e-5, atol=1e-5)
