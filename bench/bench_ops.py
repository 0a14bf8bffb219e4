"""Times of each op's backends, each row after a check that it agrees with the reference: pytest bench/bench_ops.py

On the CPU in float32; on a GPU, with -m gpu, in float16. The shapes are the packaged small prior's and the full-size
model's first level, one clip of 32 frames at 224x224.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from videopure_fast import ops, reference
from videopure_fast.config import PurifyConfig
from videopure_fast.ops.backend import SUPPORTED_DTYPES, implementation, use_backend
from videopure_fast.ops.folded_linear import fold_norm
from videopure_fast.ops.linear_moments import row_moments
from videopure_fast.schedule import Schedule

# (B, C, F, h, w) of latents, and (B, F, H, W, C) with heads and groups of activations.
LATENTS = {"small": (4, 4, 16, 16, 16), "full": (1, 4, 32, 28, 28)}
ACTIVATIONS = {"small": ((1, 16, 16, 16, 32), 4, 8), "full": ((1, 32, 28, 28, 320), 5, 32)}
# The largest error of a timed result, relative to 1 + |reference|, and the share of guided_update's values that may
# exceed it: the sign of a warp residual near zero may flip.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
MAX_SHARE_APART = 1e-4
EPS = 1e-5

Call = tuple[str, tuple[Tensor | None, ...], dict[str, Any]]  # op, tensors, settings


def guided_update(size: str, device: str, dtype: torch.dtype) -> Call:
    shape = LATENTS[size]
    config = PurifyConfig().rescaled(*shape[-3:])
    steps = torch.tensor(Schedule(config).vote_coefficients(), device=device)
    latents = torch.randn(len(steps), *shape, device=device)
    noise = torch.randn(latents.shape, device=device).to(dtype)
    target = torch.randn(shape, device=device)
    flow = torch.randn(shape[0], shape[2] - 1, 2, *shape[-2:], device=device)
    coefficients = steps[:, None].expand(-1, shape[0], -1)
    weights = {"spatial_weight": config.spatial_weight, "temporal_weight": config.temporal_weight}
    return "guided_update", (latents, noise, target, flow, coefficients), weights


def ddim_step(size: str, device: str, dtype: torch.dtype) -> Call:
    latents = torch.randn(LATENTS[size], device=device)
    noise = torch.randn(LATENTS[size], device=device).to(dtype)
    coefficients = torch.tensor([[0.99, 0.1]], device=device).expand(len(latents), -1)
    return "ddim_step", (latents, noise, coefficients), {"first_frame_noise": True}


def temporal_attention(size: str, device: str, dtype: torch.dtype) -> Call:
    (*leading, channels), heads, _ = ACTIVATIONS[size]
    qkv = torch.randn(*leading, 3 * channels, device=device, dtype=dtype)
    return "temporal_attention", (qkv,), {"heads": heads}


def norm_temporal_attention(size: str, device: str, dtype: torch.dtype) -> Call:
    shape, heads, _ = ACTIVATIONS[size]
    x, norm_weight, norm_bias, _, weight = _layer(shape, 3 * shape[-1], device, dtype)
    return "norm_temporal_attention", (x, norm_weight, norm_bias, weight, None), {"heads": heads, "eps": EPS}


def linear_residual(size: str, device: str, dtype: torch.dtype) -> Call:
    shape, _, _ = ACTIVATIONS[size]
    x, _, _, bias, weight = _layer(shape, shape[-1], device, dtype)
    return "linear_residual", (x, weight, bias, torch.randn_like(x), None), {}


def linear_moments(size: str, device: str, dtype: torch.dtype) -> Call:
    shape, _, _ = ACTIVATIONS[size]
    x, _, _, bias, weight = _layer(shape, shape[-1], device, dtype)
    return "linear_moments", (x, weight, bias, torch.randn_like(x)), {}


def folded_linear(size: str, device: str, dtype: torch.dtype) -> Call:
    return "folded_linear", _folded(size, 3, device, dtype), {"eps": EPS}


def folded_linear_geglu(size: str, device: str, dtype: torch.dtype) -> Call:
    return "folded_linear_geglu", _folded(size, 8, device, dtype), {"eps": EPS}


def folded_temporal_attention(size: str, device: str, dtype: torch.dtype) -> Call:
    return "folded_temporal_attention", _folded(size, 3, device, dtype), {"heads": ACTIVATIONS[size][1], "eps": EPS}


def geglu(size: str, device: str, dtype: torch.dtype) -> Call:
    (*leading, channels), _, _ = ACTIVATIONS[size]
    return "geglu", (torch.randn(*leading, 8 * channels, device=device, dtype=dtype),), {}


def linear_geglu(size: str, device: str, dtype: torch.dtype) -> Call:
    shape, _, _ = ACTIVATIONS[size]
    x, _, _, bias, weight = _layer(shape, 8 * shape[-1], device, dtype)
    return "linear_geglu", (x, weight, bias), {}


def feed_forward(size: str, device: str, dtype: torch.dtype) -> Call:
    shape, _, _ = ACTIVATIONS[size]
    x, norm_weight, norm_bias, bias, weight = _layer(shape, 8 * shape[-1], device, dtype)
    _, _, _, out_bias, out_weight = _layer((4 * shape[-1],), shape[-1], device, dtype)
    return "feed_forward", (x, norm_weight, norm_bias, weight, bias, out_weight, out_bias), {"eps": EPS}


def group_norm_silu(size: str, device: str, dtype: torch.dtype) -> Call:
    shape, _, groups = ACTIVATIONS[size]
    x, norm_weight, norm_bias, _, _ = _layer(shape, 1, device, dtype)
    settings = {"groups": groups, "eps": EPS, "over_frames": False, "silu": True}
    return "group_norm_silu", (x, norm_weight, norm_bias, None, None), settings


def residual_add(size: str, device: str, dtype: torch.dtype) -> Call:
    x, _, bias, _, _ = _layer(ACTIVATIONS[size][0], 1, device, dtype)
    return "residual_add", (x, torch.randn_like(x), bias), {}


def add_group_norm_silu(size: str, device: str, dtype: torch.dtype) -> Call:
    _, (x, norm_weight, norm_bias, _, _), settings = group_norm_silu(size, device, dtype)
    tensors = x, torch.randn_like(x), torch.randn_like(norm_bias), norm_weight, norm_bias
    return "add_group_norm_silu", tensors, settings


def temporal_conv(size: str, device: str, dtype: torch.dtype) -> Call:
    shape, _, _ = ACTIVATIONS[size]
    x, _, _, bias, weight = _layer(shape, 3 * shape[-1], device, dtype)
    taps = weight.view(3, shape[-1], shape[-1])
    return "temporal_conv", (x, taps, bias[: shape[-1]], torch.randn_like(x)), {}


def _folded(size: str, times: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, its moments, and a folded norm, and a layer from its channels to `times` as many."""
    shape, _, _ = ACTIVATIONS[size]
    x, norm_weight, norm_bias, bias, weight = _layer(shape, times * shape[-1], device, dtype)
    return x, row_moments(x), *fold_norm(norm_weight, norm_bias, weight, bias)


def _layer(shape: tuple[int, ...], outputs: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, norm_weight, norm_bias, bias and weight of a layer from shape's channels to `outputs`."""
    options = {"device": device, "dtype": dtype}
    channels = shape[-1]
    weight = torch.randn(outputs, channels, **options) / channels**0.5
    return tuple(torch.randn(n, **options) for n in (shape, channels, channels, outputs)) + (weight,)


OPS = (
    *(guided_update, ddim_step),
    *(temporal_attention, norm_temporal_attention, linear_residual, linear_moments),
    *(folded_linear, folded_linear_geglu, folded_temporal_attention, geglu, linear_geglu, feed_forward),
    *(group_norm_silu, residual_add, add_group_norm_silu, temporal_conv),
)


@pytest.mark.parametrize("size", LATENTS)
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("reference", "cpu"),
        ("cpu", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("reference", "triton", "cuda")),
    ],
)
@pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
def test_op(row, make: Callable[..., Call], backend: str, device: str, size: str):
    if backend not in (*SUPPORTED_DTYPES[make.__name__], "reference"):
        pytest.skip(f"has no {backend} form")
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    op, tensors, settings = make(size, device, dtype)

    def call() -> Tensor | tuple[Tensor, ...]:
        results: Tensor | tuple[Tensor, ...] = getattr(ops, op)(*tensors, **settings)
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    with torch.no_grad(), use_backend(backend):
        wide = (None if t is None else t.float() for t in tensors)
        expected = implementation(op, "reference")(*wide, **settings)
        for result, wanted in zip(tree_leaves(call()), tree_leaves(expected), strict=True):
            right = (result - wanted).abs() / (1 + wanted.abs()) <= TOLERANCE[dtype]
            assert (~right).float().mean() <= (MAX_SHARE_APART if op == "guided_update" else 0)
        row.group = f"{op} {size} {tuple(tensors[0].shape)}"
        row.extra_info |= {"op": op, "backend": backend, "device": device, "dtype": str(dtype).removeprefix("torch.")}
        row.pedantic(call, rounds=20, warmup_rounds=3)


def test_guided_update_beats_the_frame_loop():
    """All votes of one clip of 32 frames of 28x28 latents, against autograd vote by vote and frame by frame."""
    torch.manual_seed(0)
    _, (latents, noise, target, flow, coefficients), weights = guided_update("full", "cpu", torch.float32)
    config = PurifyConfig()
    steps = Schedule(config).vote_coefficients()

    def loop() -> Tensor:
        """The optimized latents of each vote, not the x0 of those that predict it: the last vote alone is compared."""
        states = zip(latents, noise, steps, strict=True)
        return torch.stack([reference.guidance_by_autograd(z, e, target, flow, step, config) for z, e, step in states])

    def fast() -> Tensor:
        return ops.guided_update(latents, noise, target, flow, coefficients, **weights)

    with use_backend("cpu"):
        right = torch.isclose(fast()[-1], loop()[-1], rtol=1e-5, atol=2e-5)  # the last vote is latents, not x0
        assert (~right).float().mean() <= MAX_SHARE_APART
        assert median_seconds(loop, 5) >= 20 * median_seconds(fast, 40)


@pytest.mark.parametrize("op", ["guided_update", "geglu"])
def test_a_batch_scales_with_threads(op):
    """Eight clips on two threads take less than 1/1.5 of the time on one."""
    threads = torch.get_num_threads()
    if threads < 2:
        pytest.skip("torch has one thread")
    torch.manual_seed(0)
    if op == "geglu":
        tensors, weights = (torch.randn(8, 16, 16, 16, 256),), {}
    else:
        _, (latents, noise, target, flow, steps), weights = guided_update("full", "cpu", torch.float32)
        latents, noise, steps = (t.repeat_interleave(8, 1) for t in (latents, noise, steps))
        tensors = (latents, noise, target.repeat_interleave(8, 0), flow.repeat_interleave(8, 0), steps)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        return median_seconds(lambda: getattr(ops, op)(*tensors, **weights), 20)

    try:
        with use_backend("cpu"):
            assert seconds(1) >= 1.5 * seconds(2)
    finally:
        torch.set_num_threads(threads)


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
