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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import native

BACKENDS = ("cuda", "triton", "cpu", "reference")
BACKEND_VARIABLE = "VIDEOPURE_FAST_BACKEND"

_SINGLE = (torch.float32,)
_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_LATENT_OP = {"cuda": _SINGLE, "triton": _SINGLE, "cpu": _SINGLE}
_ACTIVATION_OP = {"triton": _HALF_AND_SINGLE, "cpu": _SINGLE}
# The dtypes that each native form of an op takes. The reference takes all.
SUPPORTED_DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "guided_update": _LATENT_OP,
    "ddim_step": _LATENT_OP,
    "ddim_step_": _LATENT_OP,
    "temporal_attention": _ACTIVATION_OP,
    "norm_temporal_attention": _ACTIVATION_OP,
    "linear_residual": _ACTIVATION_OP,
    "geglu": _ACTIVATION_OP,
    "linear_geglu": _ACTIVATION_OP,
    "feed_forward": _ACTIVATION_OP,
    "group_norm_silu": _ACTIVATION_OP,
    "temporal_conv": _ACTIVATION_OP,
}
# Where an op's Triton form lies, if not in kernels/ under its own name.
_KERNEL_FILES = {"ddim_step_": "ddim_step", "norm_temporal_attention": "temporal_attention", "linear_geglu": "geglu"}
# The most frames that one tile of an op's Triton form holds.
_MOST_TRITON_FRAMES = {"temporal_attention": 64, "norm_temporal_attention": 64}

# Nobody wants the interpreter, with which triton serves CPU tensors, unless they ask for it.
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


def choose(op: str, x: Tensor) -> Callable[..., Tensor]:
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
def implementation(op: str, name: str) -> Callable[..., Tensor]:
    if name == "reference":
        return getattr(reference, op)
    if name == "triton":
        return getattr(importlib.import_module(f"videopure_fast.kernels.{_KERNEL_FILES.get(op, op)}"), op)
    return getattr(native, op)


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
    if name == "triton" and op in _MOST_TRITON_FRAMES and x.shape[1] > _MOST_TRITON_FRAMES[op]:
        return f"it takes {_MOST_TRITON_FRAMES[op]} frames at most, these are {x.shape[1]}"
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
    if error := native.load()[0].cuda_error(device):
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
