"""A feed-forward block with its norm and residual: every form against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, check, dtypes, every_backend, laid_out, normal
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend


def inputs(*shape: int, hidden: int, seed: int = 0, mean: float = 0.0) -> tuple[Tensor, ...]:
    """x of a shape, and weights for which every sum is of order one."""
    channels = shape[-1]
    return (
        normal(*shape, seed=seed, mean=mean),
        normal(channels, seed=seed + 1),
        normal(channels, seed=seed + 2),
        normal(2 * hidden, channels, seed=seed + 3, scale=channels**-0.5),
        normal(2 * hidden, seed=seed + 4),
        normal(channels, hidden, seed=seed + 5, scale=hidden**-0.5),
        normal(channels, seed=seed + 6),
    )


@every_backend("triton")
@pytest.mark.parametrize(
    ("shape", "hidden"),
    # Partial last tiles and vectors of each kind, and more rows than a block.
    [((8,), 32), ((1, 7, 5, 9, 20), 80), ((151, 33), 31), ((3, 50, 64), 256), ((2, 1), 1)],
)
def test_equals_the_reference(backend, device, shape, hidden):
    for dtype in dtypes(backend, device):
        tensors = (tensor.to(dtype) for tensor in inputs(*shape, hidden=hidden))
        check(backend, device, "feed_forward", *tensors, scale=4, eps=1e-5)


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_layout(backend, device, data):
    leading = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4)))
    # A single channel is skipped: it equals its own mean, and only rounding would be left.
    channels, hidden = data.draw(st.integers(2, 70)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(7)]
    tensors = inputs(*leading, channels, hidden=hidden)
    laid = (laid_out(tensor.to(dtype), layout) for tensor, layout in zip(tensors, layouts, strict=True))
    check(backend, device, "feed_forward", *laid, scale=8, eps=1e-5)


@every_backend("triton")
def test_offsets_beyond_32_bits(backend, device):
    """Three rows 2^30 values apart. Untouched pages take no memory on a CPU."""
    dtype = dtypes(backend, device)[-1]
    stride = 2**30 if dtype.itemsize == 2 else 2**29
    x, *weights = (tensor.to(device, dtype) for tensor in inputs(3, 32, hidden=48))
    far = torch.empty(2 * stride + 32, dtype=dtype, device=device).as_strided((3, 32), (stride, 1)).copy_(x)
    with use_backend(backend):
        torch.testing.assert_close(ops.feed_forward(far, *weights), ops.feed_forward(x, *weights), rtol=0, atol=0)
