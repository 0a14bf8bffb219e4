"""Which code runs an op: cuda, triton, cpu or reference; and the switches under which float32 means float32.

"cuda" and "cpu" are the compiled extension, "triton" is compiled at its first call, and "reference" is plain torch.
The first of this ladder that can serve a call does. `use_backend`, or else the environment variable
VIDEOPURE_FAST_BACKEND, names the rungs to use instead, in order: "triton" or "cuda,triton". A call that none of them
can serve raises RuntimeError, which says of each what it lacks.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native

BACKENDS = ("cuda", "triton", "cpu", "reference")
BACKEND_VARIABLE = "VIDEOPURE_FAST_BACKEND"

DtypesByBackend = Mapping[str, tuple[torch.dtype, ...]]
_SINGLE = (torch.float32,)
_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
# What the forms of most ops take: those on latents, and those on the models' activations.
LATENT_DTYPES: DtypesByBackend = {"cuda": _SINGLE, "triton": _SINGLE, "cpu": _SINGLE}
ACTIVATION_DTYPES: DtypesByBackend = {"triton": _HALF_AND_SINGLE, "cpu": _SINGLE}


class Op(NamedTuple):
    """The forms of an op, which take the same arguments in the same order.

    kernel: the module in kernels/ with the Triton form, a function of the op's name. max_triton_frames: the most frames
    that form takes, or None. run: what the registered operator runs, which chooses a form.
    """

    reference: Callable[..., Any]
    native: Callable[..., Any]
    kernel: str
    max_triton_frames: int | None
    run: Callable[..., Any]


# Both are filled by _register.py. The dtypes are those of each form of an op but the reference, which takes all.
OPS: dict[str, Op] = {}
SUPPORTED_DTYPES: dict[str, DtypesByBackend] = {}

# Triton serves CPU tensors in its interpreter, which is slow: only where it is asked for by name.
_AUTO = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

_override: ContextVar[tuple[str, ...] | None] = ContextVar("videopure_fast_backend", default=None)


@contextmanager
def use_backend(names: str) -> Iterator[None]:
    """Choose among these backends alone within a with block of this thread: "cpu", "cuda,triton", or "auto" for all.

    Wins over VIDEOPURE_FAST_BACKEND. ValueError for an unknown name.
    """
    token = _override.set(_ladder(names, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


def in_use() -> tuple[str, ...]:
    """The backends that were asked for, in order; none where every op is to choose by device."""
    ladder = _override.get()
    return _ladder(os.environ.get(BACKEND_VARIABLE) or "auto", BACKEND_VARIABLE) if ladder is None else ladder


def backends() -> dict[str, str]:
    """Each backend's name with "available", or a sentence on what it lacks on this machine and how to get it."""
    lacks = {name: _missing_reason(name) for name in BACKENDS}
    lacks["cuda"] = lacks["cuda"] or _unsupported_device_reason(torch.cuda.current_device())
    return {name: lack or "available" for name, lack in lacks.items()}


def choose(op: str, x: Tensor) -> Callable[..., Any]:
    """The function that serves an op whose first tensor is x. RuntimeError if none of the backends in use can."""
    obstacles = {}
    for name in in_use() or _AUTO.get(x.device.type, ("reference",)):
        obstacle = _unsupported_reason(op, name, x)
        if obstacle is None:
            return implementation(op, name)
        obstacles[name] = obstacle
    what = "; ".join(f"backend {name!r} cannot serve this call of {op}: {why}" for name, why in obstacles.items())
    raise RuntimeError(what)


def is_available(name: str, op: str, x: Tensor) -> bool:
    """Whether this backend is among those in use and can serve an op whose first tensor is x."""
    return name in (in_use() or _AUTO.get(x.device.type, ())) and _unsupported_reason(op, name, x) is None


@cache
def implementation(op: str, name: str) -> Callable[..., Any]:
    """The function of an op's form, by backend; cuda and cpu share one, which goes by the tensors' device."""
    if name == "reference":
        return OPS[op].reference
    if name == "triton":
        function: Callable[..., Any] = getattr(importlib.import_module(f"videopure_fast.kernels.{OPS[op].kernel}"), op)
        return function
    return OPS[op].native


def _unsupported_reason(op: str, name: str, x: Tensor) -> str | None:
    """What keeps a backend from serving an op on x, or None."""
    if name == "reference":
        return None
    forms = SUPPORTED_DTYPES[op]
    if name not in forms:
        return f"it has no {name} form; its forms are {', '.join((*forms, 'reference'))}"
    if lacks := _missing_reason(name):
        return lacks
    if x.dtype not in forms[name]:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in forms[name])
        return f"it takes {dtypes}, this is {x.dtype}; 'reference' takes every dtype"
    served = "cpu" if name == "cpu" or (name == "triton" and _interpreted()) else "cuda"
    if x.device.type != served:
        return f"it takes {served} tensors, these are on {x.device}"
    if name == "triton" and (most := OPS[op].max_triton_frames) is not None and x.shape[1] > most:
        return f"it takes {most} frames at most, these are {x.shape[1]}"
    return _unsupported_device_reason(x.get_device()) if name == "cuda" else None


def _missing_reason(name: str) -> str | None:
    """What a backend lacks on this machine and how to get it, or None."""
    if name == "reference":
        return None
    if name == "triton":
        if not _triton_installed():
            return "triton is not installed; pip install triton"
        return None if _interpreted() or torch.cuda.is_available() else _NO_GPU
    extension, error = native.load()
    if extension is None:
        return f"the compiled extension did not load ({error}); install videopure-fast again where a C++ compiler is"
    if name == "cpu":
        return None
    if not extension.has_cuda:
        return "the extension was built without CUDA; put nvcc on PATH and install videopure-fast again"
    return None if torch.cuda.is_available() else _NO_GPU


_NO_GPU = "torch sees no CUDA GPU; it needs an NVIDIA GPU with its driver and a CUDA build of torch"


@cache
def _unsupported_device_reason(device: int) -> str | None:
    """Why the extension's kernels cannot run on a GPU: an older driver than nvcc's, or an architecture left out."""
    extension, _ = native.load()
    assert extension is not None  # or the backend would lack it
    if error := extension.cuda_error(device):
        return f"GPU {device} cannot run the extension's kernels ({error}); install videopure-fast anew on this machine"
    return None


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors, slowly; triton reads this variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _ladder(names: str, source: str) -> tuple[str, ...]:
    """The backends named, none for "auto"."""
    if not isinstance(names, str):
        raise TypeError(f"{source} must be a string, got {names!r}")
    ladder = tuple(name.strip() for name in names.split(","))
    if ladder == ("auto",):
        return ()
    for name in ladder:
        if name not in BACKENDS:
            raise ValueError(f"unknown {source} {name!r}; accepted: auto, or some of {', '.join(BACKENDS)}")
    return ladder


_full_float32_lock = threading.Lock()
_full_float32_depth = 0
_full_float32_saved: list[tuple[Any, str]] = []


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """float32 means float32 within this block: no TF32, no reduced CPU products, no autocast on `device`.

    torch's switches belong to the process. The first block to begin saves the caller's settings, and the last to end,
    of all threads, puts them back.
    """
    global _full_float32_depth, _full_float32_saved
    with _full_float32_lock:
        if _full_float32_depth == 0:
            _full_float32_saved = [(switch, switch.fp32_precision) for switch in _float32_switches()]
            for switch, precision in _full_float32_saved:
                if precision not in ("ieee", "none"):
                    switch.fp32_precision = "ieee"
        _full_float32_depth += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _full_float32_lock:
            _full_float32_depth -= 1
            if _full_float32_depth == 0:
                for switch, precision in _full_float32_saved:
                    if precision not in ("ieee", "none"):
                        switch.fp32_precision = precision


def _float32_switches() -> tuple[Any, ...]:
    backends = torch.backends
    # cudnn.rnn has no part in this, but torch's older flag for cuDNN can be read only while both agree.
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv
