"""GEGLU alone and after its linear layer: odd widths, any strides, one row, gates in both tails, large values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EXAMPLES, INTERPRETED, LAYOUTS, TOLERANCE, check, dtypes, every_backend, laid_out, normal
from product_cases import loading, loads

from videopure_fast.ops import geglu, linear_geglu
from videopure_fast.ops.backend import use_backend
from videopure_fast.ops.geglu import geglu_reference
from videopure_fast.ops.linear_geglu import linear_geglu_reference

# Shapes with one and more axes; D is one, a power of two, or neither.
LEADING = [(1,), (7,), (1, 5), (2, 3, 1, 4, 2)]


def gated(*leading: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """(..., 2D) of values of size `scale`, beside gates from -12 to 12."""
    values = normal(*leading, columns, seed=seed, scale=scale)
    gate = 24 * torch.rand(values.shape, generator=torch.Generator().manual_seed(seed + 1)) - 12
    return torch.cat([values, gate], -1)


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    leading=st.sampled_from(LEADING),
    columns=st.sampled_from([1, 5, 64, 333]),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([1.0, 1e3]),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_geglu(backend, device, leading, columns, layout, scale, seed, data):
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    x = laid_out(gated(*leading, columns=columns, seed=seed, scale=scale).to(dtype), layout)
    check(backend, device, "geglu", x, scale=12 * scale)


@every_backend("triton")
def test_geglu_equals_torch_at_every_gate(backend, device):
    """Accurate to float32's last digits where 1 + erf cancels, as torch's own GELU is."""
    gate = torch.linspace(-12, 12, 4001)
    x = torch.stack([torch.ones_like(gate), gate], -1).to(device)
    with use_backend(backend):
        actual = geglu(x)
    torch.testing.assert_close(actual.cpu(), geglu_reference(x.cpu()), rtol=1e-6, atol=2e-6)


@every_backend("triton")
def test_geglu_is_right_to_its_last_digit_in_half_precision(backend, device):
    """By a polynomial for erf, which is within 6e-7: also in the tail."""
    for dtype in set(dtypes(backend, device)) - {torch.float32}:
        gate = torch.linspace(-12, 12, 4001).to(dtype)
        x = torch.stack([torch.ones_like(gate), gate], -1)
        with use_backend(backend):
            actual = geglu(x.to(device)).cpu().double()
        torch.testing.assert_close(actual, geglu_reference(x.double()), rtol=torch.finfo(dtype).eps, atol=1e-6)


@every_backend("triton")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    leading=st.sampled_from(LEADING),
    # K below and above the widest input that Triton fuses, and no multiple of its step along K.
    inputs=st.sampled_from([1, 32, 37, 72, 640, 650]),
    columns=st.sampled_from([1, 5, 64, 77]),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 1e2]),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_linear_geglu(backend, device, leading, inputs, columns, layout, bias, scale, seed, data):
    dtype = data.draw(st.sampled_from(dtypes(backend, device)))
    x = normal(*leading, inputs, seed=seed)
    # Outputs: values of size `scale`, and gates from -12 to 12.
    weight = normal(2 * columns, inputs, seed=seed + 1, scale=inputs**-0.5)
    weight[:columns] *= scale
    weight[columns:] *= 4
    biases = normal(2 * columns, seed=seed + 2) if bias else None
    x, weight, biases = (t if t is None else laid_out(t.to(dtype), layout) for t in (x, weight, biases))
    for way in loads(backend, device):
        with loading(way):
            check(backend, device, "linear_geglu", x, weight, biases, scale=12 * scale)


@every_backend("triton")
def test_offsets_beyond_int32(backend, device):
    """The last row begins 2^31 values after the first; the pages between them are untouched."""
    dtype = torch.float32 if backend == "cpu" else torch.float16
    rows, columns, apart = 5, 8, 2**29
    x = gated(rows, columns=columns, seed=3).to(dtype)
    far = torch.empty((rows - 1) * apart + 2 * columns, dtype=dtype, device=device).as_strided(x.shape, (apart, 1))
    far.copy_(x)
    weight = normal(6, 2 * columns, seed=4).to(dtype)
    with use_backend(backend):
        alone, after = geglu(far), linear_geglu(far, weight.to(device), None)
    tolerance = {**TOLERANCE[dtype], "atol": 12 * TOLERANCE[dtype]["atol"]}
    torch.testing.assert_close(alone.cpu().double(), geglu_reference(x.double()), **tolerance)
    expected = linear_geglu_reference(x.double(), weight.double(), None)
    torch.testing.assert_close(after.cpu().double(), expected, **tolerance)


@pytest.mark.skipif(not INTERPRETED, reason="the two forms of the Triton code")
def test_fused_form_equals_the_chain(monkeypatch):
    from videopure_fast.kernels import linear_geglu as kernels

    x, weight, bias = normal(70, 96), normal(2 * 40, 96, seed=1, scale=0.1), normal(2 * 40, seed=2)
    fused = kernels.linear_geglu(x, weight, bias)
    monkeypatch.setattr(kernels, "MAX_FUSED_INPUTS", {"half": 0, "float32": 0})
    torch.testing.assert_close(kernels.linear_geglu(x, weight, bias), fused, rtol=1e-5, atol=1e-5)
