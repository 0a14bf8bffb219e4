"""Which code runs an op: cuda, triton, cpu or reference; and the switches under which float32 means float32.

"cuda" and "cpu" are the compiled extension, "triton" is compiled at its first call, and "reference" is plain torch.
They are tried in this order, and the first that can serve a call does. `use_backend`, or else the environment variable
VIDEOPURE_FAST_BACKEND, names the backends to try instead, in order: "triton" or "cuda,triton". A call that none of them
can serve raises RuntimeError, which says for each what is missing.
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

NAMESPACE = "videopure_fast"  # of the operators in torch's dispatcher
BACKENDS = ("cuda", "triton", "cpu", "reference")
BACKEND_VARIABLE = "VIDEOPURE_FAST_BACKEND"

DtypesByBackend = Mapping[str, tuple[torch.dtype, ...]]
_SINGLE = (torch.float32,)
_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
# Dtypes of the ops on latents, and of those on the models' activations.
LATENT_DTYPES: DtypesByBackend = {"cuda": _SINGLE, "triton": _SINGLE, "cpu": _SINGLE}
ACTIVATION_DTYPES: DtypesByBackend = {"triton": _HALF_AND_SINGLE, "cpu": _SINGLE}


class Op(NamedTuple):
    """The forms of an op, which take the same arguments in the same order.

    native: the form that calls the compiled extension, or None. kernel: the module in kernels/ with the Triton form, a
    function of the op's name. max_triton_frames: the most frames that form takes, or None for any number. run: what the
    registered operator runs; it chooses a form.
    """

    reference: Callable[..., Any]
    native: Callable[..., Any] | None
    kernel: str
    max_triton_frames: int | None
    run: Callable[..., Any]


# Both are filled by _register.py, by name of the op. The second holds the dtypes of each form but the reference, which
# takes all.
OPS: dict[str, Op] = {}
SUPPORTED_DTYPES: dict[str, DtypesByBackend] = {}

# Triton serves CPU tensors in its interpreter, which is slow: only where it is asked for by name.
_AUTO = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

_override: ContextVar[tuple[str, ...] | None] = ContextVar("videopure_fast_backend", default=None)
_meta_device: ContextVar[torch.device | None] = ContextVar("videopure_fast_meta_device", default=None)


@contextmanager
def use_backend(names: str) -> Iterator[None]:
    """Within this block of this thread, use only these backends: "cpu", "cuda,triton", or "auto" for all.

    Takes precedence over VIDEOPURE_FAST_BACKEND. ValueError for an unknown name.
    """
    token = _override.set(_parse(names, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def meta_stands_for(device: torch.device) -> Iterator[None]:
    """Within this block of this thread, tensors of the meta device are served as those of `device` would be."""
    token = _meta_device.set(device)
    try:
        yield
    finally:
        _meta_device.reset(token)


def _served_device(device: torch.device) -> torch.device:
    """The device whose forms serve tensors on this one."""
    return _meta_device.get() or device if device.type == "meta" else device


def in_use() -> tuple[str, ...]:
    """The backends that were asked for, in order; empty if the device decides."""
    names = _override.get()
    return _parse(os.environ.get(BACKEND_VARIABLE) or "auto", BACKEND_VARIABLE) if names is None else names


def backends() -> dict[str, str]:
    """Backend -> "available", or a sentence on what it lacks on this machine and how to get it."""
    missing = {name: _missing_reason(name) for name in BACKENDS}
    missing["cuda"] = missing["cuda"] or _unsupported_device_reason(torch.cuda.current_device())
    return {name: reason or "available" for name, reason in missing.items()}


def choose(op: str, x: Tensor) -> Callable[..., Any]:
    """The form of an op for a call whose first tensor is x. RuntimeError if no backend in use can serve it."""
    reasons = {}
    for name in in_use() or _AUTO.get(_served_device(x.device).type, ("reference",)):
        reason = _unsupported_reason(op, name, x)
        if reason is None:
            return implementation(op, name)
        reasons[name] = reason
    what = "; ".join(f"backend {name!r} cannot serve this call of {op}: {why}" for name, why in reasons.items())
    raise RuntimeError(what)


def is_available(name: str, op: str, x: Tensor) -> bool:
    """Whether this backend is in use and can serve a call of the op whose first tensor is x."""
    names = in_use() or _AUTO.get(_served_device(x.device).type, ())
    return name in names and _unsupported_reason(op, name, x) is None


@cache
def implementation(op: str, name: str) -> Callable[..., Any]:
    """The function of an op's form, by backend. Both cuda and cpu are `native`, which goes by the tensors' device."""
    if name == "reference":
        return OPS[op].reference
    function: Callable[..., Any] | None
    if name == "triton":
        function = getattr(importlib.import_module(f"videopure_fast.kernels.{OPS[op].kernel}"), op)
    else:
        function = OPS[op].native
    assert function is not None, f"{op} lists {name} among its dtypes, but has no such form"
    return function


def _unsupported_reason(op: str, name: str, x: Tensor) -> str | None:
    """Why a backend cannot serve a call of the op whose first tensor is x, or None if it can."""
    if name == "reference":
        return None
    forms = SUPPORTED_DTYPES[op]
    if name not in forms:
        return f"it has no {name} form; its forms are {', '.join((*forms, 'reference'))}"
    if missing := _missing_reason(name):
        return missing
    if x.dtype not in forms[name]:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in forms[name])
        return f"it takes {dtypes}, this is {x.dtype}; 'reference' takes every dtype"
    device = _served_device(x.device)
    served = "cpu" if name == "cpu" or (name == "triton" and _interpreted()) else "cuda"
    if device.type != served:
        return f"it takes {served} tensors, these are on {device}"
    if name == "triton" and (most := OPS[op].max_triton_frames) is not None and x.shape[1] > most:
        return f"it takes {most} frames at most, these are {x.shape[1]}"
    return _unsupported_device_reason(device.index) if name == "cuda" else None


def _missing_reason(name: str) -> str | None:
    """What a backend lacks on this machine and how to get it, or None if it lacks nothing."""
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
    """Why the extension's kernels cannot run on a GPU (driver too old, architecture not built), or None if they can."""
    extension, _ = native.load()
    assert extension is not None  # or the backend would lack it
    if error := extension.cuda_error(device):
        return f"GPU {device} cannot run the extension's kernels ({error}); install videopure-fast anew on this machine"
    return None


def compiles() -> bool:
    """Whether Triton is here and compiles kernels, rather than interpreting them."""
    return _triton_installed() and not _interpreted()


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors, slowly; triton reads this variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _parse(names: str, source: str) -> tuple[str, ...]:
    """The backends in a comma-separated list; empty for "auto"."""
    if not isinstance(names, str):
        raise TypeError(f"{source} must be a string, got {names!r}")
    backends = tuple(name.strip() for name in names.split(","))
    if backends == ("auto",):
        return ()
    for name in backends:
        if name not in BACKENDS:
            raise ValueError(f"unknown {source} {name!r}; accepted: auto, or some of {', '.join(BACKENDS)}")
    return backends


_full_float32_lock = threading.Lock()
_full_float32_depth = 0
_full_float32_saved: list[tuple[Any, str]] = []


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """float32 means float32 within this block: no TF32, no reduced CPU products, no autocast on `device`.

    torch's switches belong to the process: of the blocks of all threads, the first to begin saves the caller's
    settings, and the last to end restores them.
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
        with torch.autocast(_served_device(device).type, enabled=False):
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
    # The ops use no cudnn.rnn, but torch's older flag for cuDNN raises when it is read while conv and rnn differ.
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv
