"""What concerns all ops: choice of backend, checks, registration with torch, gradients, Triton's interpreter."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from op_cases import INTERPRETED, normal
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from videopure_fast import ops
from videopure_fast.ops import backend, native
from videopure_fast.ops._register import register
from videopure_fast.ops.backend import OPS, SUPPORTED_DTYPES, choose, use_backend
from videopure_fast.ops.linear_moments import row_moments

TESTS = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="checks no kernel")

LATENTS, NORM = (2, 3, 4, 2, 5), {"norm_weight": (8,), "norm_bias": (8,)}
# op -> (shapes of small tensors, settings), both in the order of the reference's arguments.
SHAPES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "ddim_step": ({"latents": LATENTS, "noise": LATENTS, "coefficients": (2, 2)}, {"first_frame_noise": True}),
    "guided_update": (
        {
            "latents": (2, *LATENTS),
            "noise": (2, *LATENTS),
            "target": LATENTS,
            "flow": (2, 3, 2, 2, 5),
            "coefficients": (2, 2, 4),
        },
        {"spatial_weight": 100.0, "temporal_weight": 5.0},
    ),
    "temporal_attention": ({"qkv": (2, 3, 2, 1, 24)}, {"heads": 2}),
    "norm_temporal_attention": (
        {"x": (2, 3, 2, 1, 8), **NORM, "weight": (36, 8), "position": (3, 8)},
        {"heads": 2, "eps": 1e-5},
    ),
    "folded_temporal_attention": (
        {
            "x": (2, 3, 2, 1, 8),
            "moments": (2, 3, 2, 1, 1, 2),
            "weight": (36, 8),
            "weight_sums": (36,),
            "bias": (36,),
        },
        {"heads": 2, "eps": 1e-5},
    ),
    "linear_residual": (
        {"x": (2, 3, 5), "weight": (4, 7), "bias": (4,), "residual": (2, 3, 4), "skip": (2, 3, 2)},
        {},
    ),
    "linear_moments": ({"x": (2, 3, 5), "weight": (4, 5), "bias": (4,), "residual": (2, 3, 4)}, {}),
    "folded_linear": (
        {"x": (2, 3, 5), "moments": (2, 3, 1, 2), "weight": (4, 5), "weight_sums": (4,), "bias": (4,)},
        {"eps": 1e-5},
    ),
    "folded_linear_geglu": (
        {"x": (2, 3, 5), "moments": (2, 3, 1, 2), "weight": (8, 5), "weight_sums": (8,), "bias": (8,)},
        {"eps": 1e-5},
    ),
    "geglu": ({"x": (2, 3, 8)}, {}),
    "linear_geglu": ({"x": (2, 3, 5), "weight": (8, 5), "bias": (8,)}, {}),
    "feed_forward": (
        {"x": (2, 3, 8), **NORM, "weight": (12, 8), "bias": (12,), "out_weight": (8, 6), "out_bias": (8,)},
        {"eps": 1e-5},
    ),
    "group_norm_silu": (
        {"x": (2, 3, 2, 1, 8), "weight": (12,), "bias": (12,), "embedding": (2, 12), "skip": (2, 3, 2, 1, 4)},
        {"groups": 2, "eps": 1e-5, "over_frames": True, "silu": True},
    ),
    "residual_add": ({"x": (2, 3, 2, 1, 8), "addend": (2, 3, 2, 1, 8), "addend_bias": (8,)}, {}),
    "add_group_norm_silu": (
        {"x": (2, 3, 2, 1, 8), "addend": (2, 3, 2, 1, 8), "addend_bias": (8,), "weight": (8,), "bias": (8,)},
        {"groups": 2, "eps": 1e-5, "over_frames": True, "silu": True},
    ),
    "temporal_conv": (
        {"x": (2, 3, 2, 1, 8), "weight": (3, 4, 8), "bias": (4,), "residual": (2, 3, 2, 1, 4)},
        {},
    ),
}
OPTIONAL = {"position", "bias", "embedding", "residual"}
WITHOUT = [
    ("norm_temporal_attention", "position"),
    ("linear_residual", "bias"),
    ("linear_moments", "bias"),
    ("linear_moments", "residual"),
    ("linear_geglu", "bias"),
    ("group_norm_silu", "embedding"),
    ("group_norm_silu", "skip"),
    ("residual_add", "addend_bias"),
    ("add_group_norm_silu", "addend_bias"),
    ("temporal_conv", "residual"),
]
# The CPU form calls the extension's function of another op, or adds by torch.
EXTENSION = {"add_group_norm_silu": "group_norm_silu", "residual_add": "group_norm_silu"}
# The files of ops that share one with the op of its name.
FILES = {"ddim_step_": "ddim_step", "folded_linear_geglu": "folded_linear", "add_group_norm_silu": "residual_add"}
# Measured in float32 whatever the dtype of the others. They have no gradient.
MEASURED = {"moments", "weight_sums"}
every_op = pytest.mark.parametrize("op", SHAPES)
every_case = pytest.mark.parametrize(
    ("op", "without"),
    [*((op, None) for op in SHAPES), *WITHOUT],
    ids=[*SHAPES, *(f"{op} without {name}" for op, name in WITHOUT)],
)


def example(
    op: str, without: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Small inputs of an op, tensors and settings."""
    shapes, settings = SHAPES[op]
    tensors = {
        name: None if name == without else normal(*shape, seed=seed).to(torch.float32 if name in MEASURED else dtype)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    if without == "skip":  # x has all channels then
        tensors["x"] = torch.cat([tensors["x"], normal(*shapes["skip"]).to(dtype)], -1)
    if "moments" in tensors:  # sums of squares are not negative
        tensors["moments"] = row_moments(tensors["x"])
    if op == "guided_update":
        tensors["coefficients"] = 0.5 + tensors["coefficients"].abs()
        tensors["coefficients"][0, ..., 3] = 0
    return tensors, settings


def call(op: str, tensors: dict[str, Tensor | None], settings: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
    return getattr(ops, op)(*tensors.values(), **settings)


def differentiable(op: str, results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An op's results that have gradients: all but moments."""
    results = (results,) if isinstance(results, Tensor) else results
    return results[:1] if op == "linear_moments" else results


# Choice of backend


X = torch.zeros(1, 2, 2, 2, 8)


class TestChoice:
    def test_auto_takes_the_extension(self):
        assert choose("guided_update", X) is OPS["guided_update"].native
        with use_backend("auto"):
            assert choose("ddim_step_", X) is OPS["ddim_step_"].native

    def test_auto_goes_by_device_and_dtype(self):
        assert choose("ddim_step", X.to("meta")) is OPS["ddim_step"].reference
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert choose("ddim_step", X.to(dtype)) is OPS["ddim_step"].reference

    def test_environment_forces(self, monkeypatch):
        monkeypatch.setenv(backend.BACKEND_VARIABLE, "reference")
        assert choose("ddim_step", X) is OPS["ddim_step"].reference
        with use_backend("cpu"):
            assert choose("ddim_step", X) is OPS["ddim_step"].native, "use_backend wins over the environment"
        with use_backend("auto"):
            assert choose("ddim_step", X) is OPS["ddim_step"].native
        monkeypatch.setenv(backend.BACKEND_VARIABLE, "")
        assert choose("ddim_step", X) is OPS["ddim_step"].native

    def test_a_list_is_tried_in_order(self, monkeypatch):
        for names, expected in (
            ("cpu,reference", "native"),
            ("reference,cpu", "reference"),
            ("cuda, cpu", "native"),
            ("cuda,triton,reference", "reference"),
        ):
            with use_backend(names):
                assert choose("ddim_step", X) is getattr(OPS["ddim_step"], expected)
        monkeypatch.setenv(backend.BACKEND_VARIABLE, "cuda, reference")
        assert choose("ddim_step", X) is OPS["ddim_step"].reference
        with use_backend("cuda,triton"), pytest.raises(RuntimeError, match="'cuda' cannot.*; backend 'triton' cannot"):
            choose("ddim_step", X)

    def test_blocks_nest_and_end(self):
        with use_backend("reference"):
            with pytest.raises(KeyError), use_backend("cpu"):
                raise KeyError
            assert choose("ddim_step", X) is OPS["ddim_step"].reference
        assert choose("ddim_step", X) is OPS["ddim_step"].native

    @pytest.mark.parametrize("names", ["cudnn", "cpu,cudnn", "", "auto,cpu", "cpu,", "CPU"])
    def test_unknown_names(self, monkeypatch, names):
        with pytest.raises(ValueError, match="unknown backend '.*'; accepted: auto, or some of cuda, triton, cpu"):
            use_backend(names).__enter__()
        if names:
            monkeypatch.setenv(backend.BACKEND_VARIABLE, names)
            with pytest.raises(ValueError, match="unknown VIDEOPURE_FAST_BACKEND '"):
                choose("ddim_step", X)

    @pytest.mark.parametrize("name", ["cuda", "triton"])
    def test_gpu_backends_refuse_cpu_tensors(self, name):
        sentence = rf"backend '{name}' cannot serve this call of ddim_step: .*(GPU|CUDA|install|cuda)"
        with use_backend(name), pytest.raises(RuntimeError, match=sentence):
            choose("ddim_step", X)

    @pytest.mark.parametrize("op", [op for op in SUPPORTED_DTYPES if "cuda" not in SUPPORTED_DTYPES[op]])
    def test_missing_form(self, op):
        sentence = f"call of {op}: it has no cuda form; its forms are {', '.join(SUPPORTED_DTYPES[op])}, reference"
        with use_backend("cuda"), pytest.raises(RuntimeError, match=sentence):
            choose(op, X)

    def test_missing_dtype(self):
        sentence = r"it takes float32, this is torch\.float64; 'reference' takes every dtype"
        with use_backend("cpu"), pytest.raises(RuntimeError, match=sentence):
            choose("guided_update", X.double())

    def test_missing_frames(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setattr(backend, "_interpreted", lambda: True)
        with use_backend("triton"), pytest.raises(RuntimeError, match="it takes 64 frames at most, these are 65"):
            choose("temporal_attention", X[:, :1].expand(-1, 65, -1, -1, -1))

    def test_unbuilt_extension(self, monkeypatch):
        monkeypatch.setattr(native, "load", lambda: (None, "No module named 'videopure_fast._C'"))
        assert choose("ddim_step", X) is OPS["ddim_step"].reference
        with use_backend("cpu"), pytest.raises(RuntimeError, match=r"No module.*install videopure-fast again"):
            choose("ddim_step", X)
        assert "C++ compiler" in backend.backends()["cpu"]

    def test_backends_says_what_is_missing(self):
        report = backend.backends()
        assert tuple(report) == backend.BACKENDS
        assert report["reference"] == "available"
        assert report["cpu"] == "available"
        if not torch.cuda.is_available():
            assert "CUDA" in report["cuda"]
            assert "GPU" in report["triton"]

    @pytest.mark.parametrize("op", SUPPORTED_DTYPES)
    def test_forms_are_there(self, op):
        assert callable(OPS[op].reference)
        if {"cpu", "cuda"} & set(SUPPORTED_DTYPES[op]):
            assert callable(OPS[op].native)
        for device in {"cpu", "cuda"} & set(SUPPORTED_DTYPES[op]):
            extension, error = native.load()
            assert extension is not None, error
            if device == "cpu" or extension.has_cuda:
                assert callable(getattr(extension, f"{EXTENSION.get(op, op).removesuffix('_')}_{device}"))
        if "triton" in SUPPORTED_DTYPES[op]:
            pytest.importorskip("triton")
            file = importlib.import_module(f"videopure_fast.kernels.{OPS[op].kernel}")
            assert callable(getattr(file, op))

    def test_every_op_is_tested_here(self):
        assert set(SUPPORTED_DTYPES) == {*SHAPES, "ddim_step_"}


# One op, one file


class TestRegistry:
    def test_a_registered_op_is_public(self):
        assert set(OPS) == set(SUPPORTED_DTYPES) == set(ops.__all__)

    @pytest.mark.parametrize("op", OPS)
    def test_an_op_has_its_function_and_forms_in_its_file(self, op):
        file = importlib.import_module(f"videopure_fast.ops.{FILES.get(op, op)}")
        for function in filter(None, (getattr(ops, op), OPS[op].reference, OPS[op].native)):
            assert function.__module__ == file.__name__
        assert getattr(ops, op) is getattr(file, op)
        assert getattr(ops, op).__doc__

    @pytest.mark.parametrize("op", OPS)
    def test_the_forms_of_an_op_take_the_same_arguments(self, op):
        expected = list(inspect.signature(OPS[op].reference).parameters)
        assert list(inspect.signature(getattr(ops, op)).parameters) == expected
        if OPS[op].native is not None:
            assert list(inspect.signature(OPS[op].native).parameters) == expected
        schema = getattr(torch.ops.videopure_fast, op).default._schema
        assert [argument.name for argument in schema.arguments] == expected

    @pytest.mark.parametrize("op", OPS)
    def test_an_op_is_registered_whole(self, op):
        registered = getattr(torch.ops.videopure_fast, op)
        assert registered in flop_registry
        for key in ("CompositeExplicitAutograd", "Meta", *(() if op.endswith("_") else ("Autograd",))):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"videopure_fast::{op}", key)


def doubled(x: Tensor, scale: float) -> Tensor:
    return 2 * scale * x


def test_a_new_op_needs_its_registration_alone():
    operator = register(
        "doubled", reference=doubled, native=doubled, dtypes={"cpu": (torch.float32,)}, flops=lambda x, _: x[0]
    )
    try:
        x = torch.ones(3, requires_grad=True)
        operator(x, 4.0).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 8.0))
        assert choose("doubled", x) is doubled
        assert operator(META(3), 1.0).is_meta
        assert flops(operator, x, 1.0) == 3
        with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot serve this call of doubled"):
            operator(x, 1.0)
        torch.library.opcheck(operator, (x, 4.0))
    finally:
        del OPS["doubled"], SUPPORTED_DTYPES["doubled"]


# Checks


FLOATS, INTS, META = torch.zeros, lambda *s: torch.zeros(*s).int(), lambda *s: torch.zeros(*s, device="meta")
MISFITS = [
    ("ddim_step", {"latents": FLOATS(2, 3, 4, 5)}, r"latents must be \(B, C, F, h, w\) and not empty"),
    ("ddim_step", {"latents": FLOATS(2, 0, 4, 2, 5)}, "not empty, got"),
    ("ddim_step", {"latents": INTS(*LATENTS)}, "latents must be of a floating-point dtype, got torch.int32"),
    ("ddim_step", {"noise": FLOATS(2, 3, 1, 2, 5)}, r"noise must have the latents' shape, \(2, 3, 4, 2, 5\)"),
    ("ddim_step", {"noise": INTS(*LATENTS)}, "noise must be of a floating-point dtype, got torch.int32"),
    ("ddim_step", {"noise": META(*LATENTS)}, "noise must be on the latents' device, cpu, got meta"),
    ("ddim_step", {"coefficients": FLOATS(2)}, r"coefficients must be \(2, 2\) beside latents"),
    ("ddim_step", {"coefficients": FLOATS(2, 2).double()}, "coefficients must be of latents's dtype, torch.float32"),
    ("ddim_step", {"coefficients": META(2, 2)}, "coefficients must be on latents's device, cpu, got meta"),
    ("guided_update", {"latents": FLOATS(*LATENTS)}, r"latents must be \(V, B, C, F, h, w\).*got \(2, 3, 4, 2, 5\)"),
    ("guided_update", {"latents": FLOATS(2, 0, 3, 4, 2, 5)}, "not empty"),
    ("guided_update", {"latents": FLOATS(2, 2, 3, 4, 1, 5)}, "2x2 pixels or larger"),
    ("guided_update", {"latents": INTS(2, *LATENTS)}, "latents must be of a floating-point dtype"),
    ("guided_update", {"noise": FLOATS(2, 2, 3, 1, 2, 5)}, "noise must have the latents' shape"),
    ("guided_update", {"noise": INTS(2, *LATENTS)}, "noise must be of a floating-point dtype"),
    ("guided_update", {"target": FLOATS(2, *LATENTS)}, r"target must be \(2, 3, 4, 2, 5\)"),
    ("guided_update", {"target": FLOATS(*LATENTS).double()}, "target must be of latents's dtype"),
    ("guided_update", {"flow": FLOATS(2, 4, 2, 2, 5)}, r"flow must be \(2, 3, 2, 2, 5\).*got \(2, 4, 2, 2, 5\)"),
    ("guided_update", {"flow": META(2, 3, 2, 2, 5)}, "flow must be on latents's device, cpu, got meta"),
    ("guided_update", {"coefficients": FLOATS(2, 4)}, r"coefficients must be \(2, 2, 4\)"),
    ("temporal_attention", {"qkv": FLOATS(2, 3, 2, 24)}, r"qkv must be \(B, F, H, W, channels\)"),
    ("temporal_attention", {"qkv": INTS(2, 3, 2, 1, 24)}, "floats and not empty, got .* of torch.int32"),
    ("temporal_attention", {"qkv": FLOATS(2, 3, 0, 1, 24)}, "not empty"),
    ("temporal_attention", {"heads": 3}, "qkv's channels must be three times a multiple of 3 heads, got 24"),
    ("temporal_attention", {"heads": 0}, "heads must be 1 or more, got 0"),
    ("norm_temporal_attention", {"x": FLOATS(3, 8)}, r"x must be \(B, F, H, W, channels\)"),
    ("norm_temporal_attention", {"norm_weight": FLOATS(7)}, r"norm_weight must be \(8,\)"),
    ("norm_temporal_attention", {"norm_bias": META(8)}, "norm_bias must be on x's device"),
    ("norm_temporal_attention", {"weight": FLOATS(36, 7)}, r"weight must be \(36, 8\)"),
    ("norm_temporal_attention", {"weight": FLOATS(())}, r"weight must have a row for each output, got \(\)"),
    ("norm_temporal_attention", {"eps": -1.0}, "eps must be finite and not negative, got -1.0"),
    ("norm_temporal_attention", {"weight": FLOATS(35, 8)}, "weight's rows must be three times a multiple of 2 heads"),
    ("norm_temporal_attention", {"position": FLOATS(4, 8)}, r"position must be \(3, 8\)"),
    ("folded_temporal_attention", {"x": FLOATS(3, 8)}, r"x must be \(B, F, H, W, channels\)"),
    (
        "folded_temporal_attention",
        {"moments": FLOATS(2, 3, 2, 1, 2)},
        r"moments must be \(2, 3, 2, 1, 1, 2\) of torch.fl",
    ),
    ("folded_temporal_attention", {"weight_sums": FLOATS(36).half()}, r"weight_sums must be \(36,\) of torch.float32"),
    ("folded_temporal_attention", {"bias": FLOATS(12)}, r"bias must be \(36,\)"),
    ("folded_temporal_attention", {"weight": FLOATS(36, 7)}, r"weight must be \(36, 8\)"),
    ("folded_temporal_attention", {"heads": 5}, "weight's rows must be three times a multiple of 5 heads, got 36"),
    ("folded_temporal_attention", {"eps": -1.0}, "eps must be finite and not negative, got -1.0"),
    ("linear_residual", {"x": FLOATS(())}, r"x must be \(..., channels\)"),
    ("linear_residual", {"x": FLOATS(2, 0, 5)}, "not empty"),
    ("linear_residual", {"weight": FLOATS(4, 6)}, r"weight must be \(4, 7\) beside x of \(2, 3, 5\)"),
    ("linear_residual", {"weight": FLOATS(4, 7).half()}, "weight must be of x's dtype, torch.float32, got"),
    ("linear_residual", {"bias": FLOATS(5)}, r"bias must be \(4,\)"),
    ("linear_residual", {"residual": FLOATS(3, 4)}, r"residual must be \(2, 3, 4\)"),
    ("linear_residual", {"skip": FLOATS(3, 2)}, r"skip must be \(2, 3, channels\) beside x, not empty, got \(3, 2\)"),
    ("linear_residual", {"skip": FLOATS(2, 3, 0)}, r"skip must be \(2, 3, channels\) beside x, not empty, got"),
    ("linear_residual", {"skip": FLOATS(2, 1, 2)}, r"skip must be \(2, 3, 2\) beside x of \(2, 3, 5\)"),
    ("linear_residual", {"skip": FLOATS(2, 3, 3)}, r"weight must be \(4, 8\) beside x of \(2, 3, 5\)"),
    ("linear_moments", {"x": FLOATS(())}, r"x must be \(..., channels\)"),
    ("linear_moments", {"weight": FLOATS(4, 6)}, r"weight must be \(4, 5\) beside x of \(2, 3, 5\)"),
    ("linear_moments", {"bias": FLOATS(5)}, r"bias must be \(4,\)"),
    ("linear_moments", {"residual": FLOATS(3, 4)}, r"residual must be \(2, 3, 4\)"),
    ("folded_linear", {"moments": FLOATS(2, 3, 2, 2)}, r"moments must be \(2, 3, 1, 2\) of torch.float32 on cpu, got"),
    ("folded_linear", {"moments": FLOATS(2, 3, 1, 2).half()}, "moments must be .* got .* of torch.float16"),
    ("folded_linear", {"weight_sums": FLOATS(5)}, r"weight_sums must be \(4,\) of torch.float32"),
    ("folded_linear", {"bias": FLOATS(5)}, r"bias must be \(4,\)"),
    ("folded_linear", {"eps": -1.0}, "eps must be finite and not negative"),
    ("folded_linear_geglu", {"weight": FLOATS(8, 4)}, r"weight must be \(8, 5\)"),
    (
        "folded_linear_geglu",
        {"weight_sums": META(8)},
        r"weight_sums must be \(8,\) of torch.float32 on cpu, got .* on m",
    ),
    ("geglu", {"x": FLOATS(2, 3)}, "x must have an even number of channels"),
    ("geglu", {"x": INTS(2, 4)}, "floats and not empty"),
    ("linear_geglu", {"weight": FLOATS(7, 5)}, "weight must have an even number of rows"),
    ("linear_geglu", {"weight": FLOATS(0, 5)}, "weight must have a row for each output"),
    ("linear_geglu", {"weight": FLOATS(8, 4)}, r"weight must be \(8, 5\)"),
    ("linear_geglu", {"bias": FLOATS(4)}, r"bias must be \(8,\)"),
    ("feed_forward", {"bias": FLOATS(11)}, "bias must have an even number of values, got 11"),
    ("feed_forward", {"weight": FLOATS(10, 8)}, r"weight must be \(12, 8\)"),
    ("feed_forward", {"norm_weight": FLOATS(7)}, r"norm_weight must be \(8,\)"),
    ("feed_forward", {"out_weight": FLOATS(8, 12)}, r"out_weight must be \(8, 6\) beside x of \(2, 3, 8\)"),
    ("feed_forward", {"out_bias": FLOATS(6)}, r"out_bias must be \(8,\)"),
    ("feed_forward", {"eps": -1.0}, "eps must be finite and not negative"),
    ("group_norm_silu", {"x": FLOATS(2, 3, 8)}, r"x must be \(B, F, H, W, channels\)"),
    ("group_norm_silu", {"weight": FLOATS(8)}, r"weight must be \(12,\)"),
    ("group_norm_silu", {"bias": FLOATS(12).half()}, "bias must be of x's dtype"),
    ("group_norm_silu", {"embedding": FLOATS(3, 12)}, r"embedding must be \(2, 12\)"),
    ("group_norm_silu", {"skip": FLOATS(2, 3, 2, 4)}, r"skip must be \(2, 3, 2, 1, channels\) beside x"),
    ("group_norm_silu", {"skip": FLOATS(2, 1, 2, 1, 4)}, r"skip must be \(2, 3, 2, 1, 4\)"),
    ("group_norm_silu", {"groups": 5}, "groups must divide the 12 channels, got 5"),
    ("group_norm_silu", {"groups": 0}, "groups must be 1 or more, got 0"),
    ("group_norm_silu", {"eps": float("nan")}, "eps must be finite"),
    ("residual_add", {"x": FLOATS(2, 3, 8)}, r"x must be \(B, F, H, W, channels\)"),
    ("residual_add", {"addend": FLOATS(2, 3, 1, 1, 8)}, r"addend must be \(2, 3, 2, 1, 8\)"),
    ("residual_add", {"addend_bias": FLOATS(8).half()}, "addend_bias must be of x's dtype"),
    ("add_group_norm_silu", {"addend": FLOATS(2, 3, 2, 1, 4)}, r"addend must be \(2, 3, 2, 1, 8\)"),
    ("add_group_norm_silu", {"addend_bias": FLOATS(4)}, r"addend_bias must be \(8,\)"),
    ("add_group_norm_silu", {"weight": FLOATS(4)}, r"weight must be \(8,\)"),
    ("add_group_norm_silu", {"groups": 3}, "groups must divide the 8 channels, got 3"),
    ("add_group_norm_silu", {"eps": -1.0}, "eps must be finite and not negative"),
    ("temporal_conv", {"x": FLOATS(2, 3, 8)}, r"x must be \(B, F, H, W, channels\)"),
    ("temporal_conv", {"weight": FLOATS(4, 8, 3)}, r"weight must be \(3, 4, 8\)"),
    ("temporal_conv", {"bias": FLOATS(5)}, r"weight must be \(3, 5, 8\)"),
    ("temporal_conv", {"residual": FLOATS(2, 3, 2, 1, 8)}, r"residual must be \(2, 3, 2, 1, 4\)"),
]


@pytest.mark.parametrize(("op", "broken", "message"), MISFITS, ids=[f"{m[0]} {m[2]}"[:60] for m in MISFITS])
def test_misfits_are_refused(op, broken, message):
    tensors, settings = example(op)
    tensors.update({name: value for name, value in broken.items() if name in tensors})
    settings = {**settings, **{name: value for name, value in broken.items() if name in settings}}
    with pytest.raises(ValueError, match=message):
        call(op, tensors, settings)
    if op == "ddim_step":
        with pytest.raises(ValueError, match=message):
            call("ddim_step_", tensors, settings)


def test_in_place_refuses_gradients_and_expanded_latents():
    tensors, settings = example("ddim_step")
    for name in tensors:
        wanted = {**tensors, name: tensors[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match="hands on no gradient; use ddim_step"):
            call("ddim_step_", wanted, settings)
        with torch.no_grad():
            call("ddim_step_", {**wanted, "latents": tensors["latents"].clone()}, settings)
    memory = torch.zeros(LATENTS)
    overlapping = memory.as_strided(LATENTS, (60, 20, 5, 4, 1))
    negated = torch.zeros(LATENTS, dtype=torch.complex64).conj().imag
    for latents in (memory[:1].expand(LATENTS), overlapping, negated):
        with pytest.raises(ValueError, match="latents to overwrite must have a place for each value"):
            call("ddim_step_", {**tensors, "latents": latents}, settings)


WRONG_TYPES = [
    ("geglu", {"x": [1.0, 2.0]}, "x must be a tensor, got list"),
    ("ddim_step", {"latents": None}, "latents must be a tensor, got NoneType"),
    ("ddim_step", {"noise": None}, "noise must be a tensor, got NoneType"),
    ("linear_residual", {"weight": None}, "weight must be a tensor, got NoneType"),
    ("group_norm_silu", {"bias": 1.0}, "bias must be a tensor, got float"),
    ("temporal_attention", {"heads": "2"}, "heads must be an int, got '2'"),
    ("temporal_attention", {"heads": 2.0}, "heads must be an int, got 2.0"),
    ("group_norm_silu", {"groups": True}, "groups must be an int, got True"),
    ("folded_linear", {"eps": None}, "eps must be a number, got None"),
    ("folded_linear", {"moments": None}, "moments must be a tensor, got NoneType"),
    ("linear_residual", {"skip": 2.0}, "skip must be a tensor, got float"),
]


@pytest.mark.parametrize(("op", "broken", "message"), WRONG_TYPES, ids=[f"{w[0]} {w[2]}"[:60] for w in WRONG_TYPES])
def test_wrong_types_are_refused(op, broken, message):
    tensors, settings = example(op)
    tensors.update({name: value for name, value in broken.items() if name in tensors})
    settings = {**settings, **{name: value for name, value in broken.items() if name in settings}}
    with pytest.raises(TypeError, match=message):
        call(op, tensors, settings)


# Registration


@every_case
@pytest.mark.parametrize(
    ("dtype", "with_gradients"), [(torch.float32, False), (torch.float32, True), (torch.float64, True)]
)
def test_registration(op, without, dtype, with_gradients):
    tensors, settings = example(op, without, dtype)
    for tensor in filter(torch.is_tensor, tensors.values()):
        tensor.requires_grad_(with_gradients)
    registered = getattr(torch.ops.videopure_fast, op).default
    torch.library.opcheck(registered, (*tensors.values(), *settings.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration_in_place(dtype):
    tensors, settings = example("ddim_step", dtype=dtype)
    registered = torch.ops.videopure_fast.ddim_step_.default
    torch.library.opcheck(registered, (*tensors.values(), *settings.values()))


@every_case
def test_settings_reach_the_op(op, without):
    """Both default settings, which torch may drop from a call, and others."""
    tensors, settings = example(op, without)
    for changed in (settings, {n: not value if isinstance(value, bool) else value for n, value in settings.items()}):
        expected = OPS[op].reference(*tensors.values(), **changed)
        torch.testing.assert_close(call(op, tensors, changed), expected, rtol=1e-5, atol=2e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shapes_without_values(op, without, dtype):
    tensors, settings = example(op, without, dtype)
    expected = OPS[op].reference(*tensors.values(), **settings)
    meta = {name: None if tensor is None else tensor.to("meta") for name, tensor in tensors.items()}
    results = call(op, meta, settings)
    assert type(results) is type(expected)
    for result, wanted in zip(pytree.tree_leaves(results), pytree.tree_leaves(expected), strict=True):
        assert result.is_meta
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
        assert result.is_contiguous()


def test_compiles_whole():
    """Several ops, one of them in place, in one graph."""
    attention, _ = example("temporal_attention")
    norm, norm_settings = example("group_norm_silu")
    step, step_settings = example("ddim_step")

    def several(qkv: Tensor, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        x = x + ops.temporal_attention(qkv, heads=2)
        x = ops.geglu(ops.group_norm_silu(x, *list(norm.values())[1:], **norm_settings))
        ops.ddim_step_(latents, step["noise"], step["coefficients"], **step_settings)
        return x, ops.ddim_step(latents, step["noise"], step["coefficients"])

    inputs = attention["qkv"], norm["x"], step["latents"]
    with torch.no_grad():
        expected = several(*(tensor.clone() for tensor in inputs))
        actual = torch.compile(several, fullgraph=True)(*inputs)
    for compiled, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(compiled, eager)


@every_case
def test_traces_whole_with_any_sizes(op, without):
    """The graph that a compiler gets of each op; Inductor, which is slow, is left out."""
    tensors, settings = example(op, without)
    traced = torch.compile(getattr(ops, op), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(traced(*tensors.values(), **settings), call(op, tensors, settings))


# Gradients


@every_op
def test_none_is_refused_where_a_tensor_is_needed(op):
    tensors, settings = example(op)
    annotations = OPS[op].reference.__annotations__
    for name in (name for name in tensors if annotations[name] == "Tensor"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
            call(op, {**tensors, name: None}, settings)


@every_case
def test_gradients_are_the_references(monkeypatch, op, without):
    chosen = []
    monkeypatch.setattr("videopure_fast.ops._register.choose", lambda *call: chosen.append(call[0]) or choose(*call))
    tensors, settings = example(op, without)
    gradients, outputs = [], []
    for function in (getattr(ops, op), OPS[op].reference):
        inputs = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors.values()]
        outputs.append(differentiable(op, function(*inputs, **settings)))
        sum((y * normal(*y.shape, seed=9 + i)).sum() for i, y in enumerate(outputs[-1])).backward()
        gradients.append([None if tensor is None else tensor.grad for tensor in inputs])
    assert chosen == [op], "the forward pass alone is chosen"
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=2e-5)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@every_case
def test_gradients_in_float64(op, without):
    tensors, settings = example(op, without, torch.float64)
    for name, tensor in tensors.items():
        # One of the coefficients, predicts_x0, is a switch, which has no derivative.
        if tensor is not None and name not in MEASURED and (op, name) != ("guided_update", "coefficients"):
            tensor.requires_grad_()
    function, inputs = getattr(ops, op), tuple(tensors.values())
    assert torch.autograd.gradcheck(lambda *x: differentiable(op, function(*x, **settings)), inputs, fast_mode=True)


@every_case
def test_gradients_of_gradients(op, without):
    if op == "guided_update":
        pytest.skip("torch's grid_sample has no second derivative")
    tensors, settings = example(op, without, torch.float64)
    inputs = [t if t is None or name in MEASURED else t.requires_grad_() for name, t in tensors.items()]
    assert torch.autograd.gradgradcheck(
        lambda *x: differentiable(op, getattr(ops, op)(*x, **settings)), tuple(inputs), fast_mode=True
    )


@every_op
def test_forward_mode_is_refused(op):
    tensors, settings = example(op)
    first, *others = tensors.values()
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.jvp(lambda x: getattr(ops, op)(x, *others, **settings), (first,), (first,))


@every_op
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(op, backend):
    if backend not in (*SUPPORTED_DTYPES[op], "reference"):
        pytest.skip(f"{op} has no {backend} form")
    results = []
    for enabled in (False, True):
        tensors, settings = example(op)
        first = next(iter(tensors.values())).requires_grad_()
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, *_ = differentiable(op, call(op, tensors, settings))
            output.sum().backward()
        results.append((output, first.grad))
    for plain, autocast in zip(*results, strict=True):
        torch.testing.assert_close(autocast, plain, rtol=0, atol=0)


def test_gradients_only_where_asked():
    tensors, settings = example("guided_update")
    tensors["target"].requires_grad_()
    call("guided_update", tensors, settings).sum().backward()
    assert tensors["target"].grad is not None
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != "target")
    with torch.no_grad():
        assert not call("guided_update", tensors, settings).requires_grad


# FLOP


def flops(function: Any, *inputs: Any, **settings: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs, **settings)
    return counter.get_total_flops()


def test_flops_are_torchs():
    tokens, features, frames, outputs = 2 * 3 * 2 * 1, 8, 3, 4
    x = META(tokens, features)

    def linear(size: int) -> int:
        return flops(nn.Linear(features, size, device="meta"), x)

    def attention(channels: int) -> int:
        q = META(tokens // frames, 2, frames, channels // 2)
        return flops(F.scaled_dot_product_attention, q, q, q)

    expected = {
        "ddim_step": 0,
        "guided_update": 0,
        "temporal_attention": attention(8),
        "norm_temporal_attention": linear(36) + attention(12),
        "folded_temporal_attention": linear(36) + attention(12),
        "linear_residual": flops(nn.Linear(7, 4, device="meta"), META(2, 3, 7)),
        "linear_moments": flops(nn.Linear(5, 4, device="meta"), META(2, 3, 5)),
        "folded_linear": flops(nn.Linear(5, 4, device="meta"), META(2, 3, 5)),
        "folded_linear_geglu": flops(nn.Linear(5, 8, device="meta"), META(2, 3, 5)),
        "geglu": 0,
        "linear_geglu": flops(nn.Linear(5, 8, device="meta"), META(2, 3, 5)),
        "feed_forward": flops(nn.Linear(8, 12, device="meta"), META(2, 3, 8))
        + flops(nn.Linear(6, 8, device="meta"), META(2, 3, 6)),
        "group_norm_silu": 0,
        "residual_add": 0,
        "add_group_norm_silu": 0,
        "temporal_conv": flops(
            nn.Conv3d(features, outputs, (3, 1, 1), padding=(1, 0, 0), device="meta"), META(2, features, 3, 2, 1)
        ),
    }
    assert expected["temporal_attention"] > 0
    counted = {}
    for op in SHAPES:
        tensors, settings = example(op)
        counted[op] = flops(getattr(ops, op), *tensors.values(), **settings)
    assert counted == expected


# CUDA graphs


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("names", ["cuda,triton", "triton"])
def test_a_captured_op_reads_new_values(op, names):
    tensors, settings = example(op)
    static = {name: tensor.cuda() for name, tensor in tensors.items()}
    with torch.no_grad(), use_backend(names):
        call(op, static, settings)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(op, static, settings)
        for tensor in static.values():
            tensor.copy_(tensor.flip(0) * 0.75)
        graph.replay()
        torch.testing.assert_close(result, call(op, static, settings), rtol=0, atol=0)


# Views and transforms that torch's dispatcher resolves


def test_negated_views_count_as_what_they_stand_for():
    x = normal(3, 8)
    assert torch.equal(ops.geglu(torch._neg_view(x)), ops.geglu(-x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions_reach_the_ops():
    x = normal(3, 8)
    expected = OPS["geglu"].reference(x)

    def by_grad(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: t.sum() * ops.geglu(t.detach()).sum())(x)

    for transformed in (torch.vmap(ops.geglu), torch.func.functionalize(ops.geglu), by_grad):
        for _ in range(2):
            wanted = expected.sum().expand(x.shape) if transformed is by_grad else expected
            torch.testing.assert_close(transformed(x), wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ops.geglu(x), expected, rtol=1e-5, atol=1e-5)


# Triton's interpreter


@pytest.mark.parametrize("share", [0, 1, *(pytest.param(share, marks=pytest.mark.slow) for share in (2, 3))])
def test_triton_in_the_interpreter(share):
    """A quarter of the kernels' tests, in another process: triton reads TRITON_INTERPRET once, when it is imported."""
    pytest.importorskip("triton")
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if "from op_cases import" in path.read_text()]
    files = [path for path in files if path.name not in ("test_ops.py", "test_native.py")][share::4]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "triton-interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run([*command, *map(str, files)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert {line.split("::")[0].split("/")[-1] for line in lines if " PASSED" in line} == {path.name for path in files}


@pytest.mark.slow
def test_a_recorded_run_with_every_op_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-v", "-k", "triton-interpreted", str(TESTS / "test_golden.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "INTERPRET_ALL_OPS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_videopure_run" in done.stdout and " PASSED" in done.stdout
