"""Linear layers with the LayerNorm before them folded in: against the reference, and against the layers unfolded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, LAYOUTS, TOLERANCE, check, dtypes, laid_out, normal, run, triton_alone
from product_cases import far_rows, loading, loads
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import use_backend
from videopure_fast.ops.folded_linear import fold_norm
from videopure_fast.ops.geglu import geglu_reference
from videopure_fast.ops.linear_moments import row_moments

OPS = ("folded_linear", "folded_linear_geglu")
EPS = 1e-5
# How much larger the error may be in half precision than that of the layers one after another.
MAX_ERROR_RATIO = 1.25


def layers(k: int, n: int, seed: int = 0, mean: float = 0.0) -> list[Tensor]:
    """A norm's weight and bias, and a layer's, whose weights have a mean in units of their deviation."""
    return [
        normal(k, seed=seed, mean=1.0, scale=0.3),
        normal(k, seed=seed + 1, scale=0.3),
        normal(n, k, seed=seed + 2, mean=mean * k**-0.5, scale=k**-0.5),
        normal(n, seed=seed + 3),
    ]


def inputs(x: Tensor, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """The op's tensors, for x of rows."""
    x = x.to(dtype)
    return x, row_moments(x), *fold_norm(*(tensor.to(dtype) for tensor in layers(x.shape[-1], n, seed)))


@triton_alone
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "n"),
    # Rows of one part and of several, of 160 and of 128 columns; one row, and more than a tile has.
    [((8,), 8), ((130, 48), 320), ((2, 7, 5, 160), 96), ((3, 30, 320), 36), ((5, 296), 130), ((2, 480), 48)],
)
def test_equals_the_reference(backend, device, op, shape, n):
    for dtype in dtypes(backend, device):
        for way in loads(backend, device):
            with loading(way):
                check(backend, device, op, *inputs(normal(*shape, seed=9), n, dtype), eps=EPS, scale=4)


@triton_alone
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_layout(backend, device, op, data):
    leading = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4)))
    # A single channel is skipped: it equals its own mean, and only rounding would be left.
    k, n = data.draw(st.integers(2, 340)), 2 * data.draw(st.integers(1, 60))
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    x = laid_out(normal(*leading, k, seed=9).to(dtype), data.draw(st.sampled_from(LAYOUTS)))
    _, moments, *layer = inputs(x, n, dtype)
    laid = (laid_out(tensor, data.draw(st.sampled_from(("contiguous", "every second", "offset")))) for tensor in layer)
    with loading(data.draw(st.sampled_from(loads(backend, device)))):
        check(backend, device, op, x, laid_out(moments, "every second"), *laid, eps=EPS, scale=8)


@triton_alone
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("weight_mean", [0.0, 0.3])
def test_is_as_accurate_as_the_layers_one_after_another(backend, device, op, mean, weight_mean):
    for dtype in dtypes(backend, device):
        x = normal(64, 320, seed=9, mean=mean).to(dtype)
        norm_weight, norm_bias, weight, bias = (t.to(dtype) for t in layers(320, 320, mean=weight_mean))
        folded = fold_norm(norm_weight, norm_bias, weight, bias)

        def chain(*tensors: Tensor, op: str = op) -> Tensor:
            x, norm_weight, norm_bias, weight, bias = tensors
            y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), weight, bias)
            return y if op == "folded_linear" else geglu_reference(y)

        tensors = x, norm_weight, norm_bias, weight, bias
        truth = chain(*(tensor.double() for tensor in tensors))
        usual = (chain(*tensors).double() - truth).square().mean().sqrt()
        actual = run(backend, device, op, x, row_moments(x), *folded, eps=EPS).cpu().double()
        # In float32 rounding of the product shows, which grows with the mean; in half precision that of the result.
        bound = TOLERANCE[dtype]["atol"] if dtype == torch.float32 else MAX_ERROR_RATIO * usual
        assert (actual - truth).square().mean().sqrt() <= bound


@triton_alone
def test_takes_the_moments_of_a_layer_before(backend, device):
    """A linear layer, a norm and another layer: the first writes the moments that the other reads."""
    for dtype in dtypes(backend, device):
        x, weight, residual = (
            t.to(device, dtype) for t in (normal(70, 48), normal(320, 48, scale=0.2), normal(70, 320))
        )
        norm = [tensor.to(device, dtype) for tensor in layers(320, 96)]
        with use_backend(backend):
            y, moments = ops.linear_moments(x, weight, None, residual)
            actual = ops.folded_linear(y, moments, *fold_norm(*norm), eps=EPS)
        wide = [tensor.double() for tensor in norm]
        expected = F.linear(F.layer_norm(y.double(), (320,), *wide[:2], EPS), *wide[2:])
        assert (actual.double() - expected).square().mean().sqrt() <= TOLERANCE[dtype]["atol"]


@triton_alone
@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_32_bits(backend, device, op):
    """300 rows 2^23 values apart, as near as the kernel takes them as they are. Untouched pages take no memory."""
    dtype = dtypes(backend, device)[-1]
    x, *others = (tensor.to(device) for tensor in inputs(normal(300, 32, seed=9), 48, dtype))
    with use_backend(backend):
        actual, expected = getattr(ops, op)(far_rows(x), *others), getattr(ops, op)(x, *others)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_folding_a_norm():
    """Each row of the folded weight has the mean zero up to rounding, and its sum is that of the rounded values."""
    norm_weight, norm_bias, weight, bias = (tensor.half() for tensor in layers(320, 24, mean=3.0))
    folded = fold_norm(norm_weight, norm_bias, weight, bias)
    assert folded.weight.dtype == folded.bias.dtype == torch.float16
    assert folded.weight_sums.dtype == torch.float32
    assert torch.equal(folded.weight_sums, folded.weight.double().sum(1).float())
    assert folded.weight_sums.abs().max() < 320 * 2**-11 * folded.weight.abs().max()
    without = fold_norm(norm_weight, norm_bias, weight)
    torch.testing.assert_close((folded.bias - without.bias), bias, rtol=1e-2, atol=1e-2)
