"""Kernels compiled ahead of a call: the list is what the call launches, and processes bring it into Triton's cache."""

from __future__ import annotations

import json
import logging
import threading
from importlib import import_module

import pytest
import torch
from conftest import build_purifier, clips
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from videopure_fast import Purifier, use_backend
from videopure_fast.ops import backend
from videopure_fast.runtime import compile_ahead
from videopure_fast.runtime.compile_ahead import Kernel, compile_kernels, recorded
from videopure_fast.runtime.spans import EvaluationCounter, listening

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton's interpreter compiles nothing")

GPU = torch.device("cuda", 0)


class Driver:
    """Stands for Triton's driver on a machine with GPUs of this architecture."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A machine that seems to have a GPU, and an empty cache."""
    missing = backend._missing_reason
    monkeypatch.setattr(backend, "_missing_reason", lambda name: None if name == "triton" else missing(name))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(90))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class CallsOfOps(TorchDispatchMode):
    """Collects the calls of operators, their tensors moved to the meta device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == backend.NAMESPACE:
            self.calls.append((func.overloadpacket.__name__, tree_map_only(Tensor, on_meta, args)))
        return func(*args, **(kwargs or {}))


def on_meta(x):
    """With the offset of x, by which its address is aligned or not."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.empty(x.storage_offset() + extent, dtype=x.dtype, device="meta")
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def launched_by(calls):
    """What the launchers of these calls ask Triton for, each by itself."""
    found = set()

    def record(*, fn, compile, **_):
        found.add((fn.module, fn.name, compile["specialization_data"]))
        return True

    triton.knobs.runtime.jit_cache_hook = record
    try:
        for op, arguments in calls:
            backend.implementation(op, "triton")(*arguments)
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return found


def rehearsed(purifier, shape, *, last=False):
    with recorded(GPU) as kernels, purifier._inference():
        purifier._rehearse(shape, last)
    return kernels


@pytest.mark.parametrize("last", [False, True])
def test_the_list_for_the_packaged_prior_is_what_a_call_launches(monkeypatch, last):
    purifier = Purifier.from_pretrained("tiny", device="cpu", decode_chunk=32)
    kernels = rehearsed(purifier, (1, 3, 16, 32, 32), last=last)
    monkeypatch.setattr("videopure_fast.models.weights.is_available", lambda *_: True)  # evaluate as on a GPU
    with CallsOfOps() as seen, use_backend("reference"):  # the extension has a path of its own for small images
        purifier(clips(1, 3, 16, 32, 32), return_votes=not last, capture=False)
    expected = launched_by(seen.calls)
    assert len(expected) > 20
    assert {(kernel.module, kernel.function, kernel.specialization) for kernel in kernels} == expected
    assert len(kernels) == len(expected) and not any(kernel.cached for kernel in kernels)
    assert {kernel.target for kernel in kernels} == {("cuda", 90, 32)}


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": 2},
        {"method": "ddim_inversion"},
        {"method": "ddim"},
        {"method": "ddpm"},
        {"feedback": True},
        {"sign_temperature": 0.1},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_every_setting_can_be_rehearsed_and_nothing_is_left_behind(settings):
    purifier = build_purifier(**settings)
    before = torch.get_rng_state()
    heard = []
    with listening(EvaluationCounter(heard.append)):
        kernels = rehearsed(purifier, (2, 3, 5, 16, 18))
    assert len(kernels) > 10
    assert heard and torch.equal(torch.get_rng_state(), before)
    assert triton.knobs.runtime.jit_cache_hook is None and isinstance(triton.runtime.driver.active, Driver)
    assert not any(tensor.is_meta for tensor in (*purifier.parameters(), *purifier.buffers()))


def small_kernels(count=3):
    """The first kernels of a norm and a feed-forward, which compile in less than a second."""
    x, vector = torch.empty(1, 4, 8, 8, 16, device="meta"), torch.empty(16, device="meta")
    with recorded(GPU) as kernels:
        torch.ops.videopure_fast.group_norm_silu(x, vector, vector, None, None, 4, 1e-5, False, True)
        torch.ops.videopure_fast.geglu(x)
        torch.ops.videopure_fast.geglu(x)
        torch.ops.videopure_fast.geglu(x.half())
    assert len(kernels) == count
    return kernels


def function_of(kernel):
    return getattr(import_module(kernel.module), kernel.function)


def test_processes_bring_kernels_into_the_cache(gpu, monkeypatch):
    kernels = small_kernels()
    assert not any(kernel.cached for kernel in kernels)
    done = []
    assert compile_kernels(kernels, lambda: done.append(1)) == len(done) == 3
    assert all(kernel.cached for kernel in small_kernels())
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit))
    for kernel in kernels:
        function_of(kernel).device_caches.clear()
        function_of(kernel).preload(kernel.specialization)
    assert hits == [True] * 3


def test_kernels_that_are_in_memory_are_listed_and_not_launched(monkeypatch):
    kernels = small_kernels()
    for kernel in kernels:
        function_of(kernel).preload(kernel.specialization)
    assert [kernel._replace(cached=False) for kernel in small_kernels()] == kernels
    for kernel in kernels:
        function_of(kernel).device_caches.clear()


def test_other_threads_compile_while_one_records():
    (kernel, *_) = small_kernels()
    compiled = []
    with recorded(GPU) as kernels:
        work = lambda: compiled.append(function_of(kernel).preload(kernel.specialization))  # noqa: E731
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert kernels == [] and compiled[0].asm["cubin"]
    function_of(kernel).device_caches.clear()


def test_what_does_not_compile_is_left_to_its_launch():
    good, *_ = small_kernels()
    broken = good._replace(specialization=json.dumps({"name": "another"}))
    assert compile_kernels([broken, good]) == 1
    assert compile_kernels([Kernel(good.target, "videopure_fast.kernels.none", "none", "{}")]) == 0


@pytest.fixture
def on_gpu(monkeypatch):
    """Calls seem to go to a GPU; returns the lists of kernels that were handed to processes."""
    compiled = []
    monkeypatch.setattr(compile_ahead, "serves", lambda device: True)
    monkeypatch.setattr(compile_ahead, "recorded", lambda device: recorded(GPU))
    monkeypatch.setattr(
        compile_ahead, "compile_kernels", lambda kernels, done: compiled.append(kernels) or len(kernels)
    )
    return compiled


def test_a_first_call_compiles_what_is_missing_and_says_so_once(on_gpu, caplog):
    purifier, video = build_purifier(), clips(3, 4, 16, 16)
    expected = build_purifier()(video)
    on_gpu.clear()
    caplog.clear()
    for _ in range(2):
        assert torch.equal(purifier(video), expected)
    (kernels,) = on_gpu
    assert caplog.messages == [f"compiling {len(kernels)} GPU kernels, once; Triton keeps them on disk"]
    purifier(video, return_votes=True)
    purifier(clips(3, 20, 16, 16))  # windows of another length
    assert len(on_gpu) == 3


def test_a_call_that_is_counted_or_differentiated(on_gpu):
    purifier, video = build_purifier(), clips(1, 3, 4, 16, 16)
    with FlopCounterMode(display=False):
        purifier(video)
    assert not on_gpu  # or its operators would be counted twice
    purifier(video.requires_grad_()).sum().backward()
    assert len(on_gpu) == 1 and video.grad.abs().sum() > 0


def test_few_kernels_are_left_to_their_launches(on_gpu, caplog, monkeypatch):
    monkeypatch.setattr(compile_ahead, "LEAST_KERNELS", 1000)
    build_purifier()(clips(3, 4, 16, 16))
    assert not on_gpu and not caplog.messages


def test_a_rehearsal_that_fails_does_not_fail_the_call(on_gpu, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "videopure_fast")
    monkeypatch.setattr(Purifier, "_rehearse", lambda *_: 1 / 0)
    assert build_purifier()(clips(3, 4, 16, 16)).shape == (3, 4, 16, 16)
    assert not on_gpu and "division by zero" in caplog.text
    assert triton.knobs.runtime.jit_cache_hook is None and isinstance(triton.runtime.driver.active, Driver)


def test_on_a_cpu_nothing_is_rehearsed(monkeypatch):
    monkeypatch.setattr(compile_ahead, "recorded", lambda device: pytest.fail("it was rehearsed"))
    assert build_purifier()(clips(3, 4, 16, 16)).shape == (3, 4, 16, 16)


@pytest.mark.parametrize("backends", ["reference", "cuda", "cuda,reference"])
def test_a_gpu_without_triton_forms_needs_no_kernels(backends):
    with use_backend(backends):
        assert not compile_ahead.serves(GPU)
    assert compile_ahead.serves(GPU) and not compile_ahead.serves(torch.device("cpu"))
