"""Shared by the tests of all ops: backends and devices, tolerances, memory layouts, comparison with the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from videopure_fast import ops
from videopure_fast.ops.backend import OPS, use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Examples per property test: the interpreter takes milliseconds for each program of a kernel.
EXAMPLES = 4 if INTERPRETED else 40

# Against the reference in float64 on the same inputs, for values of order one. A half-precision op rounds where the
# chain of torch calls that it replaces does: intermediate activations, and the result.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 2e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 3.2e-2},
}
# The noise of comparisons to the last bit: the interpreter converts subnormal numbers of bfloat16 wrongly.
EXACT_NOISE_DTYPES = (torch.float32, torch.float16, torch.float64, *(() if INTERPRETED else (torch.bfloat16,)))
LAYOUTS = ("contiguous", "every second", "offset", "transposed", "expanded")


def every_backend(*gpu_forms: str) -> pytest.MarkDecorator:
    """Parametrize over (backend, device): cpu, or triton under the interpreter; `gpu_forms` are marked gpu."""
    cases = [pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-gpu") for name in gpu_forms]
    if INTERPRETED:
        cases.append(pytest.param("triton", "cpu", id="triton-interpreted"))
    else:
        cases.append(pytest.param("cpu", "cpu", id="cpu"))
    return pytest.mark.parametrize(("backend", "device"), cases)


# For an op, or a rule, that is Triton's alone: in the interpreter, or on a GPU.
triton_alone = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("triton", "cuda", marks=pytest.mark.gpu, id="triton-gpu"),
        *([pytest.param("triton", "cpu", id="triton-interpreted")] if INTERPRETED else ()),
    ],
)


def dtypes(backend: str, device: str) -> tuple[torch.dtype, ...]:
    """The dtypes to check a backend with. bfloat16 is left out in the interpreter, which computes it wrongly."""
    if backend == "cpu":
        return (torch.float32,)
    return (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16)


def normal(*shape: int, seed: int = 0, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return mean + scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hard(*shape: int, seed: int = 0) -> Tensor:
    """Values of order one among zeros of both signs, subnormal and huge numbers, infinities and NaN."""
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e38, -1e38, torch.inf, -torch.inf, torch.nan])
    chosen = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(normal(*shape, seed=seed) > 0.5, values[chosen], normal(*shape, seed=seed + 1))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values in another memory layout, unused memory NaN. "expanded" repeats those of the first entry."""
    if layout == "every second":
        wide = tensor.new_full([2 * n for n in tensor.shape], torch.nan)
        every_second = tuple(slice(None, None, 2) for _ in tensor.shape)
        wide[every_second] = tensor
        return wide[every_second]
    if layout == "offset":
        return torch.cat([torch.full_like(tensor, torch.nan), tensor], -1)[..., tensor.shape[-1] :]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills new memory with NaN, so that a value which no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(backend: str, device: str, op: str, *tensors: Tensor | None, **settings: Any) -> Tensor:
    """The op's result by a backend, for the tensors moved to a device."""
    moved = [None if t is None else _to(t, device) for t in tensors]
    with torch.no_grad(), use_backend(backend), poisoned_memory():
        return getattr(ops, op)(*moved, **settings)


def check(backend: str, device: str, op: str, *tensors: Tensor | None, scale: float = 1.0, **settings: Any) -> None:
    """The op equals its reference in float64 on the same values. `scale` is the size of the result's values."""
    with torch.no_grad():
        expected = OPS[op].reference(*(None if t is None else t.double() for t in tensors), **settings)
    assert_equal(run(backend, device, op, *tensors, **settings), expected, tensors[0].dtype, scale)


def assert_equal(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0, where: Tensor | None = None
) -> None:
    """A result of `run` equals the expected float64 values, everywhere or where the mask `where` is true."""
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert actual.isfinite().all()
    actual = actual.cpu().double()
    if where is not None:
        actual, expected = actual[where], expected[where]
    tolerance = {**TOLERANCE[dtype], "atol": scale * TOLERANCE[dtype]["atol"]}
    torch.testing.assert_close(actual, expected, **tolerance)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Two float32 tensors, on any devices, have the same bits, signs of zeros among them; a NaN equals any other."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual.isnan(), expected.isnan())
    bits, expected_bits = (t.masked_fill(t.isnan(), 0).contiguous().view(torch.int32) for t in (actual, expected))
    assert torch.equal(bits, expected_bits)


def _to(tensor: Tensor, device: str) -> Tensor:
    """Move a tensor with its whole storage, so that strides and unused memory stay; as it is if it is there already."""
    if tensor.device.type == device:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
